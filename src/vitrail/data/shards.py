"""Tar shards in the webdataset layout, read in place at random through an index of member offsets.

Members of one sample share the name up to the first dot of its last part: `cat/001.jpg` and `cat/001.cls` are sample `cat/001`.
The index of a shard is written once, beside it (`<shard>.index.json`) or, where that is not possible, in the user's cache
folder; it counts only while the shard's size and time of change are those it was made from.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vitrail.config import DataConfig, unknown
from vitrail.data.listing import Listing, is_picture_name, label_names
from vitrail.data.samples import DataError, count
from vitrail.data.splits import role_in_name, role_of
from vitrail.data.stores import FootageStore, Store
from vitrail.data.tables import LABEL_COLUMNS
from vitrail.data.video import is_video_name

INDEX_VERSION = 1
LABEL_FIELDS = ("cls", "label", "labels", "json", "txt")
TEXT_LIMIT = 64 * 1024  # bytes of a member kept as text in the index; a label is never longer
OTHER_LIMIT = 256  # the same for a member that is only perhaps a label
OPEN_LIMIT = 64  # shards that one process keeps open


def expand_shards(source: str | Sequence[str]) -> list[Path]:
    """Paths of shards from a folder (and its train, val and test folders), a path, a pattern or a list of those, in order.

    Patterns know `*`, `?`, `{000..009}` and `{a,b}`. Raises DataError when one names nothing, or a compressed archive.
    """
    found: list[Path] = []
    for pattern in [source] if isinstance(source, str) else source:
        if os.path.isdir(pattern):
            folders = [Path(pattern), *(entry for entry in Path(pattern).iterdir() if entry.is_dir() and role_of(entry.name))]
            paths = [path for folder in folders for path in folder.glob("*.tar")]
        else:
            paths = []
            for text in expand_braces(pattern):
                matches = [text] if os.path.exists(text) else glob.glob(text)
                if not matches:
                    raise DataError(f"{text}: no such shard")
                paths += [Path(match) for match in matches]
        found += sorted(paths)
    for path in found:
        if path.suffix.lower() != ".tar":
            raise DataError(f"{path}: only plain .tar shards can be read at random; unpack a compressed archive first")
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> three names, `{x,y}.tar` -> two; several braces multiply. A plain name is returned as it is."""
    parts = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            first, last = span.groups()
            step = 1 if int(last) >= int(first) else -1
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            parts.append([f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)])
        elif part.startswith("{") and "," in part:
            parts.append(part[1:-1].split(","))
        else:
            parts.append([part])
    return ["".join(choice) for choice in itertools.product(*parts)]


def read_shards(paths: Sequence[Path], config: DataConfig) -> Listing:
    """List the samples of tar shards.

    The label is the member `cls`, `label` or `labels`, a field of `json`, or `txt`; `label_column` names another; without any
    it is the sample's folder. The split comes from the folders of the sample, or the shard's folder or name
    (`train-000.tar`). Raises DataError when there is no sample, or a member's name leads out of the archive.
    """
    names: list[str] = []
    labels: list[tuple[str, ...] | None] = []
    splits: list[str] = []
    places: list[tuple[int, int, int]] = []
    broken: dict[int, str] = {}
    no_picture: list[str] = []
    indices = [shard_index(path) for path in paths]
    videos = _holds_videos(indices, config, paths[0])
    is_sample = is_video_name if videos else is_picture_name
    for number, (path, index) in enumerate(zip(paths, indices, strict=True)):
        shard_split = role_in_name(path.name) or (path.parent.name if role_of(path.parent.name) else "")
        for key, fields in index["samples"].items():
            image = _image_field(key, fields, config, path, is_sample)
            if image is None:
                no_picture.append(key)
                continue
            folders = PurePosixPath(key).parts[:-1]
            split = folders[0] if folders and role_of(folders[0]) else ""
            labels.append(_label(key, fields, folders[1:] if split else folders, config))
            splits.append(split or shard_split)
            offset, length = fields[image][:2]
            if offset + length > index["size"]:
                broken[len(names)] = "the shard ends inside this picture"
            places.append((number, offset, length))
            names.append(f"{key}.{image}")
    if not names:
        raise DataError(f"{paths[0]}: no sample with a picture in {count(len(paths), 'shard')}")
    several = any(label is not None and len(label) > 1 for label in labels)
    if several or config.multi_label:
        labels = [() if label is None else label for label in labels]
    notes = _notes(paths, indices, no_picture)
    members = ShardStore(paths, np.array(places))
    store = FootageStore(members) if videos else members
    return Listing(store, names, labels, splits, several, broken=broken, notes=notes)


def _holds_videos(indices: Sequence[dict[str, Any]], config: DataConfig, path: Path) -> bool:
    """Whether samples are videos: what `media` says, else where there are videos and no picture."""
    if config.media == "frames":
        raise DataError(f"{path}: frames in tar shards are not supported; write each clip as a video")
    if config.media != "auto":
        return config.media == "videos"
    members = ["." + name for index in indices for fields in index["samples"].values() for name in fields]
    return any(map(is_video_name, members)) and not any(map(is_picture_name, members))


def _notes(paths: Sequence[Path], indices: Sequence[dict[str, Any]], no_picture: Sequence[str]) -> tuple[str, ...]:
    notes = [count(len(paths), "tar shard")]
    ignored = sum(index["ignored"] for index in indices)
    cut = [path.name for path, index in zip(paths, indices, strict=True) if index["cut"]]
    if ignored:
        notes.append(f"{count(ignored, 'link or special member')} of the shards ignored")
    if cut:
        notes.append(f"{count(len(cut), 'shard')} cut short: {', '.join(cut[:5])}")
    if no_picture:
        notes.append(f"{count(len(no_picture), 'sample')} without a picture ignored, such as {no_picture[0]}")
    return tuple(notes)


def _image_field(
    key: str, fields: dict[str, list[Any]], config: DataConfig, path: Path, is_sample: Callable[[str], bool]
) -> str | None:
    pictures = [name for name in fields if is_sample("." + name)]
    if config.image_column and pictures:
        if config.image_column not in fields:
            raise DataError(f"{path}, sample {key}: {unknown('member', config.image_column, fields)}")
        return config.image_column
    plain = [name for name in pictures if "." not in name]
    if len(plain or pictures) > 1:
        raise DataError(f"{path}, sample {key}: several pictures ({', '.join(pictures)}); choose one with image_column")
    return next(iter(plain or pictures), None)


def _label(key: str, fields: dict[str, list[Any]], folders: tuple[str, ...], config: DataConfig) -> tuple[str, ...] | None:
    for name in (config.label_column, "json") if config.label_column else LABEL_FIELDS:
        if name not in fields or len(fields[name]) < 3:
            continue
        text = fields[name][2]
        if name != "json":
            return label_names(text)
        try:
            record = json.loads(text)
        except ValueError as problem:
            raise DataError(f"sample {key}: its json member is not JSON ({problem})") from None
        columns = (config.label_column,) if config.label_column else ("cls", *LABEL_COLUMNS)
        for column in columns:
            if isinstance(record, dict) and column in record:
                return label_names(record[column])
    return label_names(folders[0]) if folders and not config.label_column else None


def shard_index(path: Path) -> dict[str, Any]:
    """The index of one shard: read where it is up to date, else made and written.

    {"samples": {key: {field: [offset, length, text where it may be a label]}}, "ignored": members that are no plain files,
    "cut": whether the archive ends early, "size", "mtime_ns", "version"}
    """
    path = path.absolute()
    stat = path.stat()
    facts = {"version": INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    elsewhere = hashlib.blake2b(bytes(path), digest_size=16).hexdigest()
    places = [path.with_name(path.name + ".index.json"), _cache_folder() / f"{elsewhere}.json"]
    for place in places:
        with suppress(OSError, ValueError):
            known = json.loads(place.read_bytes())
            if all(known.get(name) == value for name, value in facts.items()) and _sound(known):
                return known
    made = {**facts, **_scan(path)}
    for place in places:
        with suppress(OSError):
            _write(place, made)
            break
    return made


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / "shards"


def _sound(index: dict[str, Any]) -> bool:
    """Whether an index found on disk, which anyone may have written, names only places that can lie inside the shard."""
    try:
        return (
            type(index["ignored"]) is int
            and type(index["cut"]) is bool
            and all(
                type(field[0]) is int and type(field[1]) is int and field[0] >= 0 and 0 <= field[1] <= index["size"]
                for fields in index["samples"].values()
                for field in fields.values()
            )
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        return False


def _write(place: Path, index: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(index, separators=(",", ":")), encoding="utf-8")
        os.replace(draft, place)
    finally:
        draft.unlink(missing_ok=True)


def _scan(path: Path) -> dict[str, Any]:
    samples: dict[str, dict[str, list[Any]]] = {}
    ignored, cut = 0, False
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as raw:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                    raise DataError(f"{path}: member {member.name!r} leads out of the archive; the shard is refused")
                if member.isdir() or name.name.startswith((".", "__")):
                    continue
                if not member.isreg() or member.issparse():
                    ignored += 1
                    continue
                stem, _, kind = name.name.partition(".")
                place: list[Any] = [member.offset_data, member.size]
                if not is_picture_name(name.name):
                    place += _text(raw, member, TEXT_LIMIT if kind.lower() in LABEL_FIELDS else OTHER_LIMIT)
                fields = samples.setdefault((name.parent / stem).as_posix(), {})
                if kind.lower() in fields:
                    raise DataError(f"{path}: two members are called {member.name!r}")
                fields[kind.lower()] = place
    except tarfile.TarError as problem:
        if not samples:
            raise DataError(f"{path}: not a readable tar archive ({problem})") from None
        cut = True
    return {"samples": samples, "ignored": ignored, "cut": cut}


def _text(raw: Any, member: tarfile.TarInfo, limit: int) -> list[str]:
    """The text of a small member, for the index: labels are then known without touching the shard again."""
    if member.size > limit:
        return []
    raw.seek(member.offset_data)
    try:
        return [raw.read(member.size).decode("utf-8")]
    except UnicodeDecodeError:
        return []


class ShardStore(Store):
    """Members of tar shards, read in place. places: int64 (n, 3), the number of the shard, offset and length in bytes."""

    def __init__(self, paths: Sequence[Path], places: np.ndarray) -> None:
        self.paths = [str(Path(path).absolute()) for path in paths]
        self.places = places
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.places)

    def read(self, row: int) -> bytes:
        """The member's bytes. Raises OSError when the shard cannot be read or is shorter than its index says."""
        shard, offset, length = self.places[row].tolist()
        data = self._map(shard)[offset : offset + length]
        if len(data) < length:
            raise OSError(f"{self.paths[shard]} ends inside this picture")
        return data

    def _map(self, shard: int) -> mmap.mmap:
        """The shard in memory: a mapping has no position that forked processes could disturb."""
        with self._lock:
            if shard not in self._maps:
                with open(self.paths[shard], "rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if len(self._maps) > OPEN_LIMIT:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(shard)
            return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _maps=OrderedDict(), _lock=threading.Lock())
