"""Weights from the network: repositories of the Hugging Face hub through its own library, and plain URLs.

Both keep what they fetched, resume a transfer that was cut, check the content against a published hash, honour
HF_HUB_OFFLINE, and answer a missing network with one error that says how to do it by hand. HF_ENDPOINT names a mirror of the
hub. Nothing here runs unless a hub id or a URL was named.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .mapping import CheckpointError
from .weights import SUFFIXES, WEIGHTS, Weights

BESIDE = ("config.json", "preprocessor_config.json")  # read with the weights where they are there
_FILES = ("model.safetensors", "pytorch_model.bin")
_PREFIXES = ("hf-hub:", "hf_hub:", "hf://")
_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?\Z")
_ATTEMPTS, _TIMEOUT, _BLOCK = 4, 30.0, 1 << 20


@dataclass(frozen=True)
class Fetched:
    """A file that is here now: its path, what it is called where it came from, and where that is."""

    path: Path
    name: str
    provenance: str


def is_remote(source: str) -> bool:
    """Whether a source is a hub id or a URL and not a path.

    "owner/name" is a hub id where nothing of that path and no folder "owner" is here; "hf-hub:owner/name" always is one.
    """
    if source.startswith((*_PREFIXES, "https://", "http://")):
        return True
    path = Path(source)
    plain = bool(_ID.match(source)) and not source.startswith(".") and not source.endswith(SUFFIXES)
    return plain and not path.exists() and not path.parent.is_dir()


def fetch(source: str) -> Fetched:
    """The weights of a hub id or URL as a file, with the hub's configuration files beside it.

    Raises CheckpointError for a repository without weights, content of another hash, or no network.
    """
    row = next((row for row in WEIGHTS if row.source == source or row.source == f"hf-hub:{source}"), None)
    if source.startswith(("https://", "http://")):
        path = _from_url(source, row.sha256 if row else "")
        return Fetched(path, path.name, f"downloaded from {source}")
    for prefix in _PREFIXES:
        source = source.removeprefix(prefix)
    found = _ID.match(source)
    if found is None:
        raise CheckpointError(f"{source!r} is no repository of the hub; one reads owner/name or owner/name@revision")
    return _from_hub(found[1], found[2], row)


def offline() -> bool:
    """Whether HF_HUB_OFFLINE asks for no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _from_hub(repository: str, revision: str | None, row: Weights | None) -> Fetched:
    from huggingface_hub import try_to_load_from_cache

    names = (row.file,) if row is not None and row.file else _FILES
    for name in names:
        kept = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(kept, str):
            return Fetched(Path(kept), repository, _origin(repository, Path(kept)))
    if offline():
        raise _unreachable(repository, names, "HF_HUB_OFFLINE is set")
    if why := _silence(_endpoint()):  # asked once and quickly: the hub's library would try for half a minute
        raise _unreachable(repository, names, why)
    for name in BESIDE:
        _download(repository, revision, name, names)
    for name in names:
        path = _download(repository, revision, name, names)
        if path is not None:
            _check_hub_file(repository, revision, name, path, row)
            return Fetched(path, repository, _origin(repository, path))
    raise CheckpointError(f"{repository} on the hub holds no weights that are read here ({' or '.join(names)})")


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _silence(url: str) -> str:
    """Why a server does not answer at all, "" if it does (whatever it says)."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, http.client.HTTPException) as problem:
        return _reason(problem)


def _origin(repository: str, path: Path) -> str:
    """Repository and commit; the cache keeps snapshots in folders named by commit."""
    return f"hub {repository}@{path.parent.name[:12]}"


def _download(repository: str, revision: str | None, name: str, wanted: tuple[str, ...]) -> Path | None:
    """A file of a repository, None where it has no such file."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except hub_errors.LocalEntryNotFoundError as problem:  # the library's way to say that nobody answered
        raise _unreachable(repository, wanted, _reason(problem.__cause__ or problem)) from None
    except hub_errors.EntryNotFoundError:
        return None
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{repository}: its owner wants to be asked; accept the conditions on its page, then set HF_TOKEN"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
        where = f" at revision {revision}" if revision else ""
        raise CheckpointError(f"{repository}{where} is not on the hub (or private: set HF_TOKEN)") from None
    except (OSError, RuntimeError) as problem:
        raise _unreachable(repository, wanted, _reason(problem)) from None


def _reason(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]


def _unreachable(repository: str, names: tuple[str, ...], why: str) -> CheckpointError:
    return CheckpointError(
        f"{repository}: not in the local cache, and the hub could not be asked ({why}). By hand: download {names[0]} and "
        f"config.json from {_endpoint()}/{repository}/tree/main on another machine into one folder, and name that folder"
    )


def _check_hub_file(repository: str, revision: str | None, name: str, path: Path, row: Weights | None) -> None:
    """Compare a fresh file with the hash that its row or else the hub's own header gives; a wrong one is deleted."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    expected = row.sha256 if row is not None else ""
    if not expected:
        etag = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision)).etag or ""
        expected = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else ""
    if expected:
        _check(path.resolve(), "sha256", expected, f"{repository}/{name}", (path, path.resolve()))


def _check(path: Path, algorithm: str, expected: str, what: str, forget: tuple[Path, ...]) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if not digest.startswith(expected):
        for each in forget:
            each.unlink(missing_ok=True)
        raise CheckpointError(
            f"{what}: the content has {algorithm} {digest[:16]}..., published is {expected[:16]}; deleted, nothing was loaded. "
            "Try again, and tell the publisher if it stays so"
        )


# Plain URLs -----------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / "downloads"


def _from_url(url: str, sha256: str) -> Path:
    """The content of a URL as a file of its own name in the cache."""
    name = Path(unquote(urlsplit(url).path)).name
    if not name.endswith(SUFFIXES):
        raise CheckpointError(f"{url} names no weights; known endings: {', '.join(SUFFIXES)}")
    target = _folder() / hashlib.sha256(url.encode()).hexdigest()[:12] / name
    by_hand = f"By hand: download it on another machine and name the file instead, or put it at {target}"
    if target.is_file():
        return target
    if offline():
        raise CheckpointError(f"{url}: not in the local cache, and HF_HUB_OFFLINE is set. {by_hand}")
    partial = target.with_name(name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    problem: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            headers = _transfer(url, partial)
            break
        except urllib.error.HTTPError as refusal:
            if refusal.code < 500 and refusal.code != 429:
                raise CheckpointError(f"{url}: the server answers {refusal.code} {refusal.reason}") from None
            problem = refusal
        except (OSError, http.client.HTTPException) as cut:
            problem = cut
    else:
        kept = f" ({partial.stat().st_size:,} bytes are kept; the next call goes on from there)" if partial.exists() else ""
        raise CheckpointError(f"{url}: could not be fetched: {_reason(problem or OSError())}{kept}. {by_hand}")
    algorithm, expected = _published_hash(name, sha256, headers)
    if expected:
        _check(partial, algorithm, expected, url, (partial, _tag_file(partial)))
    partial.replace(target)
    _tag_file(partial).unlink(missing_ok=True)
    return target


def _tag_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _transfer(url: str, partial: Path) -> Mapping[str, str]:
    """Append what is missing of a URL to `partial`, or begin anew where the server cannot or the content has changed.

    Returns the answer's headers, names in lower case. Raises OSError when the transfer is cut.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    have = partial.stat().st_size if partial.exists() else 0
    tag = _tag_file(partial).read_text() if have and _tag_file(partial).exists() else ""
    request = urllib.request.Request(url, headers={"User-Agent": "vitrail"})
    if have and tag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        resumed = answer.status == 206
        start = have if resumed else 0
        _tag_file(partial).write_text(headers.get("etag", ""))
        total = start + int(headers.get("content-length", 0))
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with (
            partial.open("ab" if resumed else "wb") as file,
            Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        ):
            task = bar.add_task(partial.name.removesuffix(".part"), total=total or None, completed=start)
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.advance(task, len(block))
            if total and file.tell() != total:
                raise ConnectionError(f"the connection ended after {file.tell():,} of {total:,} bytes")
    return headers


def _published_hash(name: str, sha256: str, headers: Mapping[str, str]) -> tuple[str, str]:
    """(algorithm, hexadecimal hash or its beginning): of the row, the file's name, or the server's headers; "" for none."""
    if sha256:
        return "sha256", sha256
    if named := re.search(r"-([0-9a-f]{8,64})\.\w+\Z", name):  # the convention of torch.hub and DeiT
        return "sha256", named[1]
    etag = headers.get("x-linked-etag", headers.get("etag", "")).strip('"')
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return "sha256", etag
    if md5 := re.search(r"md5=([\w+/=]+)", headers.get("x-goog-hash", "")):
        return "md5", base64.b64decode(md5[1]).hex()
    return "sha256", ""
