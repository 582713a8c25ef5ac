"""What a data set looks like: samples per class, sizes, lengths, kinds of files, and the mean and deviation of each channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.data.clips import stretch
from vitrail.data.footage import Footage, open_footage
from vitrail.data.images import decode_image, image_size
from vitrail.data.samples import Data, ImageDataset
from vitrail.data.tabulate import Table, each_sample, shortened

FRAMES_MEASURED = 16  # of a video, evenly spaced
SIZE_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # pixels of the shorter side


@dataclass(frozen=True)
class Lengths:
    """How long videos are, or the parts of them that are samples. seconds, frames: of the shortest, the median and the longest
    one. rates: frames per second -> videos, the most frequent first."""

    seconds: tuple[float, ...]
    frames: tuple[int, ...]
    total_seconds: float
    total_frames: int
    rates: dict[str, int]


@dataclass(frozen=True)
class DataStats:
    """Figures of a data set.

    mean and std are of pixel values in 0..1 over the training split (the first one where there is none), every sample
    counting the same; their use is `Preprocess.mean` and `.std`. shorter_sides: samples by the shorter side, in pixels.
    sizes: the most frequent "width x height". endings: of the samples' names. grey: samples whose channels are all alike.
    readable, unreadable: numbers of samples. lengths: of videos.
    """

    name: str
    noun: str  # what a sample is called
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
    readable: int
    unreadable: int
    lengths: Lengths | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    def tables(self, limit: int = 20) -> list[Table]:
        """A summary, classes by split, sizes, and of videos lengths and rates; at most `limit` rows each."""
        pixels = [f"{width} x {height}" for height, width in (self.smallest, self.median, self.largest)]
        summary = [
            (f"{self.noun}s", f"{self.readable:,}, {self.grey:,} of them grey"),
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
        many = f"{self.noun}s"
        tables = [
            Table(f"Statistics of {self.name}", ("", "found"), summary),
            Table("Classes", ("class", *splits), shortened(classes, limit)),
            Table("Shorter side in pixels", ("pixels", many), sides),
            Table("Most frequent sizes", ("width x height", many), [(k, f"{n:,}") for k, n in self.sizes.items()]),
        ]
        if self.lengths is not None:
            rates = [(rate, f"{number:,}") for rate, number in self.lengths.rates.items()]
            summary += [
                ("shortest, median, longest", ", ".join(f"{seconds:.2f} s" for seconds in self.lengths.seconds)),
                ("frames of these", ", ".join(f"{number:,}" for number in self.lengths.frames)),
                ("together", f"{self.lengths.total_seconds / 60:,.1f} minutes, {self.lengths.total_frames:,} frames"),
            ]
            tables.append(Table("Frame rates", ("frames per second", many), shortened(rates, limit)))
        return tables


class _Measured(NamedTuple):
    size: tuple[int, int]
    mean: np.ndarray  # (c,), of values in 0..1
    square: np.ndarray  # (c,), mean of squares
    grey: bool
    seconds: float = 0.0
    frames: int = 0
    rate: str = ""


def data_stats(data: Data, *, channels: int = 3, progress: bool = True) -> DataStats:
    """Decode every picture, and `FRAMES_MEASURED` frames of every video, and count and measure.

    channels: that they are decoded to; 1 measures luma. Unreadable samples are counted, and raise nothing.
    """
    splits = data.splits()
    measured_split = next(iter(splits))
    found: list[_Measured] = []
    means, squares = [], []
    unreadable = {(split, name) for split, part in splits.items() for name, _ in part.bad}
    endings: Counter[str] = Counter()

    for split, index, result in each_sample(data, partial(_measure, channels=channels), "measuring", progress):
        if isinstance(result, Exception):
            unreadable.add((split, splits[split].names(index)))
            continue
        found.append(result)
        endings[PurePosixPath(splits[split].names(index)).suffix.lower() or "none"] += 1
        if split == measured_split:
            means.append(result.mean)
            squares.append(result.square)
    mean = np.mean(means, 0) if means else np.zeros(channels)
    std = np.sqrt(np.maximum(np.mean(squares, 0) - mean**2, 0)) if means else np.zeros(channels)
    sizes = [measured.size for measured in found]
    array = np.array(sizes or [(0, 0)])
    area = array.prod(1)
    return DataStats(
        name=data.name,
        noun=splits[measured_split].noun,
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
        grey=sum(measured.grey for measured in found),
        readable=len(found),
        unreadable=len(unreadable),
        lengths=_lengths(found) if splits[measured_split].video else None,
    )


def _measure(dataset: ImageDataset, index: int, channels: int) -> _Measured:
    sample = dataset.read(index)
    if isinstance(sample, Footage):
        return _measure_video(sample, channels, dataset.max_pixels)
    image = decode_image(sample, channels=channels, max_pixels=dataset.max_pixels)
    mean, square, grey = _moments(image)
    return _Measured(image_size(sample), mean, square, grey)


def _measure_video(footage: Footage, channels: int, max_pixels: int) -> _Measured:
    with open_footage(footage, channels=channels, max_pixels=max_pixels) as opened:
        first, times, end = stretch(opened, footage)
        chosen = first + np.linspace(0, len(times) - 1, min(len(times), FRAMES_MEASURED)).astype(int)
        moments = [_moments(torch.tensor(pixels).permute(2, 0, 1)) for _, pixels in opened.frames(chosen)]
        means, squares, grey = zip(*moments, strict=True)
        begin = max(footage.start, float(times[0]))
        return _Measured(opened.size, np.mean(means, 0), np.mean(squares, 0), all(grey), end - begin, len(times), _rate(times))


def _moments(image: UInt8[Tensor, "c h w"]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Mean and mean of squares by channel, of values in 0..1, and whether all channels are alike."""
    values = image.flatten(1).to(torch.float32) / 255
    return values.mean(1).double().numpy(), values.square().mean(1).double().numpy(), bool((image[:1] == image).all())


def _rate(times: np.ndarray) -> str:
    """Frames per second; "variable" where the time between two frames is a third shorter or longer than usual."""
    steps = np.diff(times)
    if not len(steps):
        return "one frame"
    usual = np.median(steps)
    steady = steps.max() < 1.34 * usual and steps.min() > 0.66 * usual
    return f"{round(len(steps) / (times[-1] - times[0]), 1):g}" if steady else "variable"


def _lengths(found: Sequence[_Measured]) -> Lengths:
    seconds = np.array([measured.seconds for measured in found] or [0.0])
    frames = np.array([measured.frames for measured in found] or [0])
    order = np.argsort(seconds, kind="stable")
    three = [order[0], order[(len(order) - 1) // 2], order[-1]]
    return Lengths(
        seconds=tuple(float(seconds[at]) for at in three),
        frames=tuple(int(frames[at]) for at in three),
        total_seconds=float(seconds.sum()),
        total_frames=int(frames.sum()),
        rates=dict(Counter(measured.rate for measured in found).most_common()),
    )


def _histogram(sides: np.ndarray) -> dict[str, int]:
    counts = np.bincount(np.searchsorted(SIZE_EDGES, sides, side="right"), minlength=len(SIZE_EDGES) + 1).tolist()
    names = [f"< {SIZE_EDGES[0]}", *(f"{low} - {high - 1}" for low, high in pairwise(SIZE_EDGES))]
    return dict(zip([*names, f">= {SIZE_EDGES[-1]}"], counts, strict=True))


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
