"""Pack a data set into one Arrow dataset folder of smaller pictures or decoded videos: it opens at once and reads faster."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from vitrail.config import ConfigError, Preprocess
from vitrail.data.footage import Footage
from vitrail.data.images import decode_image, image_size, read_file
from vitrail.data.packed import VIDEO_COLUMN, pack_video, packed_features
from vitrail.data.samples import Data, DataError, ImageDataset
from vitrail.data.stores import Picture
from vitrail.data.tables import KEY_COLUMN
from vitrail.data.tabulate import each_sample
from vitrail.data.transforms import resize_fit

_FILE = 500 << 20  # bytes of samples in one file
_ROWS, _BYTES = 256, 64 << 20  # of one record batch at most: what is held in memory while writing
_SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class PackResult:
    """What was written. kept: pictures taken over byte by byte; left_out: (name, reason) of the unreadable samples."""

    path: Path
    noun: str  # what a sample is called
    samples: int
    kept: int
    size_before: int  # bytes of the files, each counted once
    size_after: int
    left_out: tuple[tuple[str, str], ...]


def pack_data(
    data: Data,
    out: str | Path,
    *,
    size: int | None = None,
    quality: int = 95,
    exact: bool = False,
    channels: int = 3,
    progress: bool = True,
) -> PackResult:
    """Write `data` to the folder `out`, which `open_data` and `datasets.load_from_disk` read.

    size: pictures whose shorter side is longer are resized to it (antialiased bicubic) and saved as JPEG of that `quality`
    (1 to 100); all others are kept as they are, byte by byte. None keeps every picture. Pick the input size divided by the
    crop fraction, or more to leave random crops some detail. Splits, names and class names are kept, and so are content
    keys: the packed set has the same samples in the same canonical order, and its subsets are the same.
    Of videos every frame becomes a JPEG of its own, resized if need be, or with `exact` its plain pixels. Times are kept,
    and so clips show the same frames. A few videos at a time are held in memory like that.
    The folder appears when it is complete, or not at all. Raises ConfigError when it exists or a setting is out of
    range, DataError when no sample can be read.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another folder or remove it")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality: {quality} is not in 1..100")
    if size is not None and size < 1:
        raise ConfigError(f"size: {size} is not a number of pixels")
    video = any(dataset.video for dataset in data.splits().values())
    if exact and not video:
        raise ConfigError("exact keeps the frames of videos as pixels; pictures without a size are kept as they are")
    if video and channels not in (1, 3):
        raise ConfigError(f"channels: {channels} is not one of 1 (grey) and 3 (colour), which frames of videos can have")
    if channels not in (1, 3) and size is not None:
        raise ConfigError(f"channels: pictures of {channels} channels cannot be saved as JPEG; pack them without a size")
    with _new_folder(out) as draft:
        writer = _Writer(draft, data)

        def work(dataset: ImageDataset, index: int) -> _Packed:
            sample = dataset.read(index)
            if isinstance(sample, Footage):
                return _packed_video(sample, size, None if exact else quality, channels, dataset.max_pixels)
            return _packed(sample, size, quality, channels, dataset.max_pixels)

        for split, index, result in each_sample(data, work, "packing", progress):
            writer.add(split, index, result)
        return writer.finish(out)


@dataclass(frozen=True)
class _Packed:
    """A cell of the column of samples. size: its bytes. origin: the file that `before` bytes are counted of, if it is one."""

    cell: dict[str, Any]
    size: int
    before: int
    kept: bool = False
    origin: str = ""


def _packed(picture: Picture, size: int | None, quality: int, channels: int, max_pixels: int) -> _Packed:
    raw = read_file(picture) if isinstance(picture, str) else picture
    height, width = image_size(raw)
    if isinstance(raw, bytes) and (size is None or min(height, width) <= size):
        decode_image(raw, channels=channels, mode="scaled", min_size=(8, 8), max_pixels=max_pixels)  # a broken one raises
        return _Packed({"bytes": raw, "path": None}, len(raw), len(raw), kept=True)
    image = decode_image(raw, channels=channels, max_pixels=max_pixels)
    resized = _resized(image, size)
    data = _encode(resized, quality if resized is not image else None)
    before = len(raw) if isinstance(raw, bytes) else height * width * channels
    return _Packed({"bytes": data, "path": None}, len(data), before)


def _packed_video(footage: Footage, size: int | None, quality: int | None, channels: int, max_pixels: int) -> _Packed:
    """quality: None keeps the pixels."""
    encode = None if quality is None else partial(_encode, quality=quality)
    made = pack_video(footage, partial(_resized, size=size), encode, channels, max_pixels)
    after = sum(map(len, made.frames))
    source = footage.source
    if isinstance(source, str):
        return _Packed(made._asdict(), after, os.path.getsize(source), origin=source)
    if isinstance(source, tuple):
        return _Packed(made._asdict(), after, sum(map(os.path.getsize, source)), origin=source[0])
    return _Packed(made._asdict(), after, len(source) if isinstance(source, bytes) else after)


def _resized(image: Tensor, size: int | None) -> Tensor:
    """A picture (c, h, w) whose shorter side is at most `size`; the same object where it is so already."""
    channels, height, width = image.shape
    if size is None or min(height, width) <= size:
        return image
    scale = size / min(height, width)
    target = (max(1, round(height * scale)), max(1, round(width * scale)))
    return resize_fit(image, Preprocess(image_size=target, channels=channels, fit="stretch", interpolation="bicubic"))


def _encode(image: Tensor, quality: int | None) -> bytes:
    """JPEG, without chroma subsampling from quality 90 on; PNG where no quality is given: pixels from memory stay exact.

    A picture whose channels are all alike is saved as grey.
    """
    grey = bool((image[:1] == image).all())
    made = Image.fromarray(np.ascontiguousarray(image[0] if grey else image.permute(1, 2, 0)))
    buffer = io.BytesIO()
    if quality is None:
        made.save(buffer, "PNG")
    else:
        made.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    return buffer.getvalue()


class _Writer:
    """Streams rows into one Arrow file per split, then has the `datasets` library save them in its own layout."""

    def __init__(self, folder: Path, data: Data) -> None:
        import datasets

        label = datasets.ClassLabel(names=list(data.classes))
        kind: dict[str, Any] = {"labels": datasets.Sequence(label)} if data.multi_label else {"label": label}
        self.folder, self.data, self.splits = folder, data, data.splits()
        first = next(iter(self.splits.values()))
        self.noun, self.column = first.noun, VIDEO_COLUMN if first.video else "image"
        samples = packed_features() if first.video else datasets.Image()
        self.features = datasets.Features(
            {self.column: samples, **kind, "name": datasets.Value("string"), KEY_COLUMN: datasets.Value("string")}
        )
        self.rows: list[dict[str, Any]] = []
        self.waiting = 0  # bytes of samples in them
        self.streams: dict[str, pa.RecordBatchStreamWriter] = {}
        self.numbers = {"samples": 0, "kept": 0, "size_before": 0, "size_after": 0}
        self.counted: set[str] = set()  # files of which parts are samples
        self.bytes_of: Counter[str] = Counter()  # by split
        self.left_out = [bad for part in self.splits.values() for bad in part.bad]

    def add(self, split: str, index: int, result: _Packed | Exception) -> None:
        """Append one sample, or note why it is left out."""
        dataset = self.splits[split]
        name = dataset.names(index)
        if isinstance(result, Exception):
            dataset.bad.add(name, str(result))
            self.left_out.append((name, str(result)))
            return
        if split not in self.streams:
            self._flush()
            self.streams[split] = pa.ipc.new_stream(str(self._stream_path(split)), self.features.arrow_schema)
        target = dataset.targets[index]
        labels = {"labels": np.flatnonzero(target).tolist()} if dataset.multi_label else {"label": int(target)}
        self.rows.append({self.column: result.cell, **labels, "name": name, KEY_COLUMN: dataset.key(index).hex()})
        before = 0 if result.origin in self.counted else result.before
        self.counted |= {result.origin} - {""}
        for what, amount in {"samples": 1, "kept": result.kept, "size_before": before, "size_after": result.size}.items():
            self.numbers[what] += amount
        self.bytes_of[split] += result.size
        self.waiting += result.size
        if len(self.rows) == _ROWS or self.waiting > _BYTES:
            self._flush()

    def _stream_path(self, split: str) -> Path:
        return self.folder / f"{split}.stream"

    def _flush(self) -> None:
        if self.rows:
            stream = list(self.streams.values())[-1]
            stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.features.arrow_schema))
            self.rows.clear()
            self.waiting = 0

    def finish(self, out: Path) -> PackResult:
        """Close the files and save them as a dictionary of splits in the folder."""
        import datasets

        self._flush()
        if not self.streams:
            raise DataError(f"{self.data.name}: no {self.noun} can be read; the first: {': '.join(self.left_out[0])}")
        for stream in self.streams.values():
            stream.close()
        with _no_bars():
            parts = {
                _SPLIT_NAMES[split]: datasets.Dataset.from_file(str(self._stream_path(split)), split=_SPLIT_NAMES[split])
                for split in self.streams
            }
            # No more files than rows: one video may be larger than what the library thinks a file should be.
            files = {
                _SPLIT_NAMES[split]: min(len(parts[_SPLIT_NAMES[split]]), 1 + self.bytes_of[split] // _FILE)
                for split in self.streams
            }
            datasets.DatasetDict(parts).save_to_disk(str(self.folder), num_shards=files)
        del parts
        for split in self.streams:
            self._stream_path(split).unlink()
        return PackResult(path=out, noun=self.noun, **self.numbers, left_out=tuple(self.left_out))


@contextmanager
def _no_bars() -> Iterator[None]:
    """The progress bars of the `datasets` library off, and back as they were."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and vanishes when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
