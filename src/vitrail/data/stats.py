"""What a data set looks like: pictures per class, sizes, kinds of files, and the mean and deviation of each channel."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from vitrail.data.images import decode_image, image_size
from vitrail.data.samples import Data, ImageDataset
from vitrail.data.tabulate import Table, each_sample, shortened

SIZE_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # pixels of the shorter side


@dataclass(frozen=True)
class DataStats:
    """Figures of a data set.

    mean and std are of pixel values in 0..1 over the training split (the first one where there is none), every picture
    counting the same; their use is `Preprocess.mean` and `.std`. shorter_sides: pictures by the shorter side, in pixels.
    sizes: the most frequent "width x height". endings: of the samples' names. grey: pictures whose channels are all alike.
    """

    name: str
    class_counts: dict[str, dict[str, int]]  # split -> class -> samples
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter_sides: dict[str, int]
    sizes: dict[str, int]
    smallest: tuple[int, int]  # (height, width) by area
    median: tuple[int, int]  # of heights, of widths
    largest: tuple[int, int]
    endings: dict[str, int]
    grey: int
    pictures: int
    unreadable: int

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def tables(self, limit: int = 20) -> list[Table]:
        """A summary, classes by split, and sizes; at most `limit` rows each."""
        pixels = [f"{width} x {height}" for height, width in (self.smallest, self.median, self.largest)]
        summary = [
            ("pictures", f"{self.pictures:,}, {self.grey:,} of them grey"),
            ("unreadable", f"{self.unreadable:,}"),
            ("mean", ", ".join(f"{value:.4f}" for value in self.mean)),
            ("std", ", ".join(f"{value:.4f}" for value in self.std)),
            ("smallest, median, largest", ", ".join(pixels)),
            ("kinds of files", ", ".join(f"{ending} {number:,}" for ending, number in self.endings.items())),
        ]
        splits = tuple(self.class_counts)
        names = next(iter(self.class_counts.values()))
        classes = [(name, *(f"{self.class_counts[split][name]:,}" for split in splits)) for name in names]
        sides = [(edge, f"{number:,}") for edge, number in self.shorter_sides.items() if number]
        return [
            Table(f"Statistics of {self.name}", ("", "found"), summary),
            Table("Classes", ("class", *splits), shortened(classes, limit)),
            Table("Shorter side in pixels", ("pixels", "pictures"), sides),
            Table("Most frequent sizes", ("width x height", "pictures"), [(k, f"{n:,}") for k, n in self.sizes.items()]),
        ]


class _Measured(NamedTuple):
    size: tuple[int, int]
    mean: np.ndarray  # (c,), of values in 0..1
    square: np.ndarray  # (c,), mean of squares
    grey: bool


def data_stats(data: Data, *, channels: int = 3, progress: bool = True) -> DataStats:
    """Decode every picture once and count and measure. channels: that pictures are decoded to; 1 measures luma.

    Unreadable pictures are counted, and raise nothing.
    """
    splits = data.splits()
    measured_split = next(iter(splits))
    sizes: list[tuple[int, int]] = []
    means, squares, grey = [], [], 0
    unreadable = {(split, name) for split, part in splits.items() for name, _ in part.bad}
    endings: Counter[str] = Counter()

    def measure(dataset: ImageDataset, index: int) -> _Measured:
        return _measure(dataset, index, channels)

    for split, index, result in each_sample(data, measure, "measuring", progress):
        if isinstance(result, Exception):
            unreadable.add((split, splits[split].names(index)))
            continue
        sizes.append(result.size)
        grey += result.grey
        endings[PurePosixPath(splits[split].names(index)).suffix.lower() or "none"] += 1
        if split == measured_split:
            means.append(result.mean)
            squares.append(result.square)
    mean = np.mean(means, 0) if means else np.zeros(channels)
    std = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, 0)) if means else np.zeros(channels)
    array = np.array(sizes or [(0, 0)])
    area = array.prod(1)
    return DataStats(
        name=data.name,
        class_counts={
            split: dict(zip(data.classes, part.class_counts().tolist(), strict=True)) for split, part in splits.items()
        },
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        shorter_sides=_histogram(array.min(1)) if sizes else {},
        sizes={f"{width} x {height}": number for (height, width), number in Counter(sizes).most_common(10)},
        smallest=_pair(array[area.argmin()]),
        median=_pair(np.median(array, 0)),
        largest=_pair(array[area.argmax()]),
        endings=dict(endings.most_common()),
        grey=grey,
        pictures=len(sizes),
        unreadable=len(unreadable),
    )


def _measure(dataset: ImageDataset, index: int, channels: int) -> _Measured:
    picture = dataset.read(index)
    image = decode_image(picture, channels=channels, max_pixels=dataset.max_pixels)
    values = image.flatten(1).to(torch.float32) / 255
    grey = bool((image[:1] == image).all())
    return _Measured(image_size(picture), values.mean(1).double().numpy(), values.square().mean(1).double().numpy(), grey)


def _histogram(sides: np.ndarray) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(SIZE_EDGES, sides, side="right"), minlength=len(SIZE_EDGES) + 1).tolist()
    names = [f"< {SIZE_EDGES[0]}", *(f"{low} - {high - 1}" for low, high in pairwise(SIZE_EDGES))]
    return dict(zip([*names, f">= {SIZE_EDGES[-1]}"], counts, strict=True))


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
