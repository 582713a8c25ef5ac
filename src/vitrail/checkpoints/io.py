"""Containers: reading weights that strangers made without running their code, and writing ours whole or not at all."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .mapping import CheckpointError, State

MAX_BYTES = 64 * 2**30  # of tensors in one file: more than any published vision checkpoint
# Inert classes that published training checkpoints carry beside the weights (DeiT and Swin: their command line).
_ALLOWED: list[Any] = [argparse.Namespace, collections.OrderedDict, collections.defaultdict]
_WEIGHTS = ("model", "state_dict", "model_state", "model_ema")  # where projects keep the weights inside a checkpoint


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and text metadata as a whole."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata or {}))


def write_npz(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a flat NumPy archive as a whole (names may hold slashes)."""
    arrays = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in state.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_torch(path: Path, state: Mapping[str, Tensor], inside: str = "") -> None:
    """Write a torch file as a whole: the bare state dict, or with it under the key `inside`."""
    plain = {name: tensor.detach().to("cpu").clone() for name, tensor in state.items()}
    with replacing(path) as temporary:
        torch.save({inside: plain} if inside else plain, temporary)


def read_metadata(path: Path) -> dict[str, str]:
    """Text metadata of a safetensors file, without its tensors."""
    with _explained(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_state(path: Path) -> tuple[State, dict[str, str]]:
    """Weights and text metadata of a file: .safetensors, .npz, a torch file (.pth, .pt, .pyth, .bin, .tar), or flax msgpack.

    Torch files are read with an allow-list of inert classes: nothing in them is executed. Raises CheckpointError for files
    that are missing, cut short, of another kind, larger than 64 GiB, or that would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        with _explained(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    if path.suffix == ".npz":
        return _read_npz(path), {}
    with path.open("rb") as file:
        first = file.read(1)
    if first in _MSGPACK_MAPS:
        return read_flax(path), {}
    return _read_torch(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"{path}: not a complete safetensors file ({problem}); was it cut short?") from None


def _read_npz(path: Path) -> State:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise CheckpointError(f"{path}: unpacks to {size / 2**30:.0f} GiB; at most {MAX_BYTES / 2**30:.0f} GiB are read")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a complete NumPy archive of plain arrays ({problem})") from None


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # bfloat16, which NumPy does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.array(array))


# First bytes of a msgpack map with entries: of 1 to 15, of up to 2**16, of more. No torch file begins so.
_MSGPACK_MAPS = {bytes([b]) for b in (*range(0x81, 0x90), 0xDE, 0xDF)}
_CHUNKED = "__msgpack_chunked_array__"
_FLAX_ARRAY, _FLAX_SCALAR = 1, 3


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError:
        raise CheckpointError(
            "flax checkpoints are msgpack files; reading and writing them needs: pip install msgpack"
        ) from None
    return msgpack


def read_flax(path: Path) -> State:
    """Arrays of a flax msgpack file (flax.training.checkpoints) under their paths in the tree, joined by slashes.

    Only plain arrays, numbers and maps are read. Raises CheckpointError for anything else, and where msgpack is missing.
    """
    msgpack = _msgpack()

    def extension(code: int, data: bytes) -> Any:
        if code not in (_FLAX_ARRAY, _FLAX_SCALAR):
            raise ValueError(f"an extension type {code} that holds no array")
        shape, dtype, buffer = msgpack.unpackb(data, raw=False)
        if dtype == "bfloat16":
            return _tensor(np.frombuffer(buffer, "V2").reshape(shape))
        return _tensor(np.frombuffer(buffer, np.dtype(dtype)).reshape(shape))

    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as problem:
        raise CheckpointError(f"{path}: not a complete flax file ({problem})") from None
    return dict(_leaves(tree, ""))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping) and _CHUNKED in tree:
        chunks = [tree["chunks"][key] for key in sorted(tree["chunks"], key=int)]
        yield path, torch.cat(chunks).reshape([tree["shape"][key] for key in sorted(tree["shape"], key=int)])
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}" if path else str(key))


def write_flax(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors named by slashes as a flax tree under "params", as a whole."""
    msgpack = _msgpack()
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        node[leaf] = msgpack.ExtType(_FLAX_ARRAY, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
    with replacing(path) as temporary:
        temporary.write_bytes(msgpack.packb({"params": tree}))


def _read_torch(path: Path) -> tuple[State, dict[str, str]]:
    with path.open("rb") as file:
        begins = file.read(2)
    if begins != b"PK" and begins[:1] != b"\x80":  # a zip archive, or a pickle of protocol 2 and later
        raise CheckpointError(f"{path}: not a checkpoint (it is no safetensors, .npz, flax or torch file)")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.simplefilter("ignore")  # an odd pickle protocol ends in one of the errors below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as problem:
        named = re.search(r"GLOBAL ([\w.]+)", str(problem))  # torch's text also says how to switch its safety off
        reason = f": {named[1]}" if named else ""
        raise CheckpointError(
            f"{path}: refused, because reading it would run code of the file{reason}; ask for a safetensors version"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as problem:
        raise CheckpointError(f"{path}: not a complete torch file ({str(problem).splitlines()[0]})") from None
    return find_weights(content, str(path)), _named_inside(content)


def _named_inside(content: Any) -> dict[str, str]:
    """{"arch": the model's name} where a training checkpoint tells it (timm, torchvision's references, DeiT)."""
    if not isinstance(content, Mapping):
        return {}
    arguments = content.get("args")
    told = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    names = (content.get("arch"), told.get("model"), told.get("arch"))
    name = next((name for name in names if isinstance(name, str) and name), "")
    return {"arch": name} if name else {}


def find_weights(content: Any, name: str) -> State:
    """The state dict inside a checkpoint's nested dictionaries; a common prefix such as "module." is taken off."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            for prefix in ("module.", "_orig_mod."):
                if all(key.startswith(prefix) for key in tensors):
                    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
            return tensors
        inner = next((content[key] for key in _WEIGHTS if key in content), None)
        if inner is None:
            break
        content = inner
    raise CheckpointError(f"{name}: holds no weights (looked for tensors under {', '.join(_WEIGHTS)})")


def read_json(path: Path, limit: int = 64 * 2**20) -> dict[str, Any]:
    """A JSON object of bounded size, {} where the file is missing."""
    if not path.is_file():
        return {}
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise CheckpointError(f"{path}: not readable as JSON ({problem})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary folder that is then renamed to `folder`, which must not exist."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
