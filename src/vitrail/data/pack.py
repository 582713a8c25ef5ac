"""Pack a data set into one Arrow dataset folder of pre-resized pictures: it opens at once and decodes several times faster."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from vitrail.config import ConfigError, Preprocess
from vitrail.data.images import decode_image, image_size, read_file
from vitrail.data.samples import Data, DataError, ImageDataset
from vitrail.data.stores import Picture
from vitrail.data.tables import KEY_COLUMN
from vitrail.data.tabulate import each_sample
from vitrail.data.transforms import resize_fit

_ROWS, _BYTES = 256, 64 << 20  # of one record batch at most: what is held in memory while writing
_SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class PackResult:
    """What was written. kept: pictures taken over byte by byte; left_out: (name, reason) of the unreadable ones."""

    path: Path
    pictures: int
    kept: int
    size_before: int  # bytes of the pictures
    size_after: int
    left_out: tuple[tuple[str, str], ...]


def pack_data(
    data: Data, out: str | Path, *, size: int | None = None, quality: int = 95, channels: int = 3, progress: bool = True
) -> PackResult:
    """Write `data` to the folder `out`, which `open_data` and `datasets.load_from_disk` read.

    size: pictures whose shorter side is longer are resized to it (antialiased bicubic) and saved as JPEG of that `quality`
    (1 to 100); all others are kept as they are, byte by byte. None keeps every picture. Pick the input size divided by the
    crop fraction, or more to leave random crops some detail. Splits, names and class names are kept, and so are content
    keys: the packed set has the same samples in the same canonical order, and its subsets are the same.
    The folder appears when it is complete, or not at all. Raises ConfigError when it exists or a setting is out of
    range, DataError when no picture can be read.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another folder or remove it")
    if not 1 <= quality <= 100:
        raise ConfigError(f"quality: {quality} is not in 1..100")
    if size is not None and size < 1:
        raise ConfigError(f"size: {size} is not a number of pixels")
    if channels not in (1, 3) and size is not None:
        raise ConfigError(f"channels: pictures of {channels} channels cannot be saved as JPEG; pack them without a size")
    with _new_folder(out) as draft:
        writer = _Writer(draft, data)

        def work(dataset: ImageDataset, index: int) -> _Packed:
            return _packed(dataset.read(index), size, quality, channels, dataset.max_pixels)

        for split, index, result in each_sample(data, work, "packing", progress):
            writer.add(split, index, result)
        return writer.finish(out)


@dataclass(frozen=True)
class _Packed:
    data: bytes
    before: int
    kept: bool


def _packed(picture: Picture, size: int | None, quality: int, channels: int, max_pixels: int) -> _Packed:
    raw = read_file(picture) if isinstance(picture, str) else picture
    height, width = image_size(raw)
    if isinstance(raw, bytes) and (size is None or min(height, width) <= size):
        decode_image(raw, channels=channels, mode="scaled", min_size=(8, 8), max_pixels=max_pixels)  # a broken one raises
        return _Packed(raw, len(raw), True)
    image = decode_image(raw, channels=channels, max_pixels=max_pixels)
    smaller = size is not None and min(height, width) > size
    if size is not None and smaller:
        scale = size / min(height, width)
        target = (max(1, round(height * scale)), max(1, round(width * scale)))
        image = resize_fit(image, Preprocess(image_size=target, channels=channels, fit="stretch", interpolation="bicubic"))
    data = _encode(image, quality if smaller else None)
    return _Packed(data, len(raw) if isinstance(raw, bytes) else height * width * channels, False)


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
        self.features = datasets.Features(
            {"image": datasets.Image(), **kind, "name": datasets.Value("string"), KEY_COLUMN: datasets.Value("string")}
        )
        self.folder, self.data, self.splits = folder, data, data.splits()
        self.rows: list[dict[str, Any]] = []
        self.waiting = 0  # bytes of pictures in them
        self.streams: dict[str, pa.RecordBatchStreamWriter] = {}
        self.numbers = {"pictures": 0, "kept": 0, "size_before": 0, "size_after": 0}
        self.left_out = [bad for part in self.splits.values() for bad in part.bad]

    def add(self, split: str, index: int, result: _Packed | Exception) -> None:
        """Append one picture, or note why it is left out."""
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
        image = {"bytes": result.data, "path": None}
        self.rows.append({"image": image, **labels, "name": name, KEY_COLUMN: dataset.key(index).hex()})
        size = len(result.data)
        for what, amount in {"pictures": 1, "kept": result.kept, "size_before": result.before, "size_after": size}.items():
            self.numbers[what] += amount
        self.waiting += size
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
            raise DataError(f"{self.data.name}: no picture can be read; the first: {': '.join(self.left_out[0])}")
        for stream in self.streams.values():
            stream.close()
        with _no_bars():
            parts = {
                _SPLIT_NAMES[split]: datasets.Dataset.from_file(str(self._stream_path(split)), split=_SPLIT_NAMES[split])
                for split in self.streams
            }
            datasets.DatasetDict(parts).save_to_disk(str(self.folder))
        del parts
        for split in self.streams:
            self._stream_path(split).unlink()
        return PackResult(path=out, **self.numbers, left_out=tuple(self.left_out))


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
