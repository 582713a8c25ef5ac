"""Stores: random access to raw pictures by row, wherever they lie. Nothing is decoded and nothing is copied to disk here."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from vitrail.data.bands import to_uint8
from vitrail.data.footage import Footage

Picture: TypeAlias = bytes | str | Tensor | Image.Image  # encoded bytes, a path, or pixels (a uint8 tensor is (c, h, w))

KEY_BYTES = 16
_EDGE = 32 * 1024  # a content key covers the length and this much of either end: cheap on large sets, and distinct in practice


def content_key(picture: Picture) -> bytes:
    """16 bytes that depend on the picture's content only, never on its name. A missing or unreadable file counts as empty."""
    if isinstance(picture, str):
        try:
            return _file_key(picture)
        except OSError:
            return digest(0)
    if isinstance(picture, Image.Image):
        picture = torch.from_numpy(np.array(picture))
    if isinstance(picture, Tensor):
        picture = picture.contiguous().numpy().tobytes()
    return digest(len(picture), picture[:_EDGE], picture[_EDGE:][-_EDGE:])


def _file_key(path: str) -> bytes:
    with open(path, "rb") as file:
        head = file.read(_EDGE)
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - _EDGE, len(head)))
        return digest(size, head, file.read(_EDGE))


def digest(number: int, head: bytes = b"", tail: bytes = b"") -> bytes:
    """16 bytes made of a number and some content."""
    made = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=KEY_BYTES)
    made.update(head)
    made.update(tail)
    return made.digest()


class Store:
    """Random access to raw pictures by row; rows never change. A store can be pickled, and read by processes and threads.

    random: reading may draw from the global random generators, which a loader then seeds for every sample. video: what it
    reads is `Footage`. played_faster: the speed of which is not always 1. by_content: keys depend on the content. packable: a
    packed copy would be read faster.
    """

    random = False
    video = False
    played_faster = False
    by_content = True
    packable = True

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, row: int) -> Any:
        """The raw sample of one row, a `Picture` or `Footage`. Raises OSError or ValueError when it cannot be read."""
        raise NotImplementedError

    def key(self, row: int) -> bytes:
        """The row's content key (see `content_key`)."""
        try:
            return content_key(self.read(row))
        except (OSError, ValueError):
            return content_key(b"")

    def part(self, row: int) -> tuple[float, ...]:
        """What a sample depends on besides the content that `key` covers: which part of a video, how fast."""
        return ()


def text_array(texts: Sequence[str]) -> pa.LargeStringArray:
    """Texts in one buffer: there are no reference counts to copy into forked workers.

    Made from its buffers because pa.array imports pandas where that is installed, which takes half a second.
    """
    encoded = [text.encode() for text in texts]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=ends[1:])
    return pa.LargeStringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


class PathStore(Store):
    """Files of a file system: paths relative to `root` (absolute ones stay absolute). Reading returns the path."""

    def __init__(self, root: str | Path, paths: Sequence[str]) -> None:
        self.root = str(root)
        self.paths = text_array(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> str:
        """The path of the file."""
        return os.path.join(self.root, self.paths[row].as_py())


class TensorStore(Store):
    """Pictures of one size in memory, uint8 (n, c, h, w)."""

    packable = False

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Tensor:
        """uint8 (c, h, w), a view."""
        return self.images[row]


class ObjectStore(Store):
    """Any map-style collection of (picture, label) from Python. What a data set's own code yields may change from call to
    call (random transforms), so a row's key is its number, not its content."""

    by_content = False

    def __init__(self, items: Any) -> None:
        self.items = items
        self.random = not isinstance(items, (list, tuple))

    def __len__(self) -> int:
        return len(self.items)

    def read(self, row: int) -> Picture:
        """The picture of item `row`; arrays become uint8 tensors. Raises ValueError when it is no picture."""
        return as_picture(self.items[row][0])

    def key(self, row: int) -> bytes:
        """Made from the row number."""
        return digest(row)


class ColumnStore(Store):
    """An Arrow column in memory or memory-mapped: encoded bytes, paths relative to `root`, or structs {bytes, path}."""

    def __init__(self, column: pa.ChunkedArray, root: str | Path = "") -> None:
        self.column = column
        self.root = str(root)
        self.starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks]).tolist()

    def __len__(self) -> int:
        return len(self.column)

    def read(self, row: int) -> Picture:
        """Encoded bytes where the column holds them, else the path."""
        part = bisect_right(self.starts, row) - 1
        value = self.column.chunk(part)[row - self.starts[part]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return os.path.join(self.root, value)
        if not isinstance(value, bytes):
            raise ValueError("the cell is empty" if value is None else f"the cell holds {type(value).__name__}, not a picture")
        return value


class FootageStore(Store):
    """The videos of another store, whole or in part. starts, ends: seconds (nan: the end); speeds: of playback."""

    video = True

    def __init__(
        self,
        files: Store,
        starts: Sequence[float] | None = None,
        ends: Sequence[float] | None = None,
        speeds: Sequence[float] | None = None,
    ) -> None:
        self.files = files
        number = len(files)
        self.starts = np.zeros(number) if starts is None else np.asarray(starts, np.float64)
        self.ends = np.full(number, np.nan) if ends is None else np.asarray(ends, np.float64)
        self.speeds = np.ones(number) if speeds is None else np.asarray(speeds, np.float64)
        self.played_faster = bool((self.speeds != 1).any())

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> Footage:
        """Where the clip is cut from; the file is not opened."""
        end = float(self.ends[row])
        return Footage(
            self.files.read(row), float(self.starts[row]), None if np.isnan(end) else end, speed=float(self.speeds[row])
        )

    def key(self, row: int) -> bytes:
        """That of the whole file: parts of one video never fall on both sides of a split."""
        return self.files.key(row)

    def part(self, row: int) -> tuple[float, ...]:
        """Start and end in seconds, and speed."""
        return float(self.starts[row]), float(self.ends[row]), float(self.speeds[row])


class FrameFolderStore(Store):
    """Folders of pictures that are the frames of a clip, in the order of the numbers in their names."""

    video = True

    def __init__(self, root: str | Path, folders: Sequence[str], rate: float, is_frame: Callable[[str], bool]) -> None:
        self.folders = PathStore(root, folders)
        self.rate, self.is_frame = rate, is_frame

    def __len__(self) -> int:
        return len(self.folders)

    def read(self, row: int) -> Footage:
        """The paths of the frames. Raises OSError where there is no such folder, ValueError where it holds no picture."""
        return Footage(self._paths(row), rate=self.rate)

    def _paths(self, row: int) -> tuple[str, ...]:
        folder = self.folders.read(row)
        names = [name for name in os.listdir(folder) if self.is_frame(name) and not name.startswith(".")]
        if not names:
            raise ValueError("a folder without pictures")
        return tuple(os.path.join(folder, name) for name in sorted(names, key=_by_number))

    def key(self, row: int) -> bytes:
        """From the first, middle and last frame and their number."""
        try:
            paths = self._paths(row)
        except (OSError, ValueError):
            return content_key(b"")
        some = [content_key(paths[at]) for at in (0, len(paths) // 2, -1)]
        return digest(len(paths), b"".join(some))

    def part(self, row: int) -> tuple[float, ...]:
        """The rate, which decides what is sampled by seconds."""
        return (self.rate,)


def _by_number(name: str) -> tuple[list[int], str]:
    """frame2 comes before frame10."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


class ConcatStore(Store):
    """Several stores, one after the other. Raises ValueError where some hold pictures and others videos."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = tuple(stores)
        self.video = any(store.video for store in stores)
        self.played_faster = any(store.played_faster for store in stores)
        if not all(store.video == self.video for store in stores):
            raise ValueError("some parts of this source are pictures, others videos")
        self.random = any(store.random for store in stores)
        self.by_content = all(store.by_content for store in stores)
        self.packable = any(store.packable for store in stores)
        self.starts = np.cumsum([0] + [len(store) for store in stores]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, row: int) -> tuple[Store, int]:
        part = bisect_right(self.starts, row) - 1
        return self.stores[part], row - self.starts[part]

    def read(self, row: int) -> Any:
        """What the store that holds the row reads."""
        store, inner = self._find(row)
        return store.read(inner)

    def key(self, row: int) -> bytes:
        """The key in the store that holds the row."""
        store, inner = self._find(row)
        return store.key(inner)

    def part(self, row: int) -> tuple[float, ...]:
        """The part in the store that holds the row."""
        store, inner = self._find(row)
        return store.part(inner)


def as_picture(value: Any) -> Picture:
    """Whatever a Python collection yields as one picture, as a `Picture`.

    Arrays are (h, w), (h, w, c) or, as a tensor, (c, h, w); floats must lie in 0..1, 16-bit values keep their upper 8 bits.
    Raises ValueError otherwise.
    """
    if isinstance(value, (bytes, str, Image.Image)):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        return as_picture(value.get("bytes") or value.get("path"))
    if isinstance(value, np.ndarray):
        pixels = torch.from_numpy(np.require(to_uint8(value), requirements=["C", "W"]))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    elif isinstance(value, Tensor):
        pixels = torch.from_numpy(to_uint8(value.detach().cpu().numpy()))
    else:
        raise ValueError(f"expected a picture (path, bytes, PIL image, array or tensor), got {type(value).__name__}")
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise ValueError(f"expected a picture of shape (channels, height, width), got {tuple(pixels.shape)}")
    return pixels
