"""Small data sets kept decoded in memory, so that training on them never waits for a decoder."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.config import Preprocess
from vitrail.data.clips import view_count
from vitrail.data.images import DecodeMode, decode_image
from vitrail.data.samples import ImageDataset
from vitrail.data.transforms import decode_for_eval
from vitrail.data.workers import available_cores

T = TypeVar("T")
MEMORY_LIMIT = 256 << 20  # bytes of decoded pictures kept for one data set
AHEAD = 8  # pictures in flight for each core


@dataclass(frozen=True)
class FittedPictures:
    """Pictures or clips as the model will see them. pixels: as `empty_fitted`; reasons: position -> why it is not readable."""

    pixels: Tensor
    reasons: dict[int, str]

    def take(self, positions: Tensor) -> UInt8[Tensor, "b c *t h w"]:
        """The pictures at `positions`, or the views of the videos there one after the other; channels innermost in memory."""
        return as_batch(self.pixels[positions])


@dataclass(frozen=True)
class WholePictures:
    """Decoded pictures of any sizes, before cropping: one buffer, so that loader processes share it in one piece."""

    pixels: Tensor  # uint8, all pictures one after the other, each (h, w, c)
    shapes: np.ndarray  # int64 (n, 3)
    starts: np.ndarray  # int64 (n,)
    reasons: dict[int, str]

    def read(self, index: int) -> UInt8[Tensor, "c h w"]:
        """One picture, a view. Raises ValueError with the reason where it could not be read."""
        if index in self.reasons:
            raise ValueError(self.reasons[index])
        start, shape = int(self.starts[index]), self.shapes[index].tolist()
        return self.pixels[start : start + shape[0] * shape[1] * shape[2]].view(shape).permute(2, 0, 1)


def fitted_bytes(number: int, preprocess: Preprocess) -> int:
    """Memory that `number` pictures, or the views of as many videos, take at the model's input size."""
    return number * math.prod(_fitted_shape(preprocess))


def empty_fitted(number: int, preprocess: Preprocess) -> Tensor:
    """Room for `number` pictures, uint8 (n, h, w, c), or for the views of as many videos, uint8 (n, v, t, h, w, c)."""
    return torch.empty((number, *_fitted_shape(preprocess)), dtype=torch.uint8)


def as_batch(pixels: UInt8[Tensor, "n *vt h w c"]) -> UInt8[Tensor, "b c *t h w"]:
    """What `empty_fitted` made room for as a model takes it; a view."""
    return (pixels if pixels.ndim == 4 else pixels.flatten(0, 1)).movedim(-1, 1)


def _fitted_shape(preprocess: Preprocess) -> tuple[int, ...]:
    frames = (view_count(preprocess), preprocess.frames) if preprocess.frames else ()
    return (*frames, *preprocess.image_size, preprocess.channels)


def keep_fitted(dataset: ImageDataset, preprocess: Preprocess, mode: DecodeMode) -> FittedPictures | None:
    """All pictures decoded and fitted, once per data set and preprocessing; None for videos and beyond `MEMORY_LIMIT`."""
    key = (preprocess, mode, 0, 1)
    if key not in dataset.pixels:
        # A clip is cut at another time in every epoch.
        if dataset.video or dataset.store.random or fitted_bytes(len(dataset), preprocess) > MEMORY_LIMIT:
            return None
        pixels = empty_fitted(len(dataset), preprocess)

        def fit(index: int) -> None:
            picture = decode_for_eval(dataset.read(index), preprocess, mode=mode, max_pixels=dataset.max_pixels)
            pixels[index] = picture.permute(1, 2, 0)

        reasons = {
            index: str(problem) for index, problem in enumerate(for_each(fit, range(len(dataset)))) if problem is not None
        }
        dataset.keep(key, FittedPictures(pixels, reasons))
    return dataset.pixels[key]


def keep_whole(dataset: ImageDataset, channels: int) -> WholePictures | None:
    """All pictures decoded at full size, once per data set; None where they exceed `MEMORY_LIMIT` or are no pictures."""
    key = ("whole", channels)
    if key not in dataset.pixels:
        if dataset.video:
            return None
        areas = dataset.sizes().prod(1)
        if dataset.store.random or not len(areas) or len(dataset) * channels * areas.mean() > MEMORY_LIMIT:
            return None
        parts = [torch.empty(0, dtype=torch.uint8)]
        shapes = np.zeros((len(dataset), 3), np.int64)
        reasons: dict[int, str] = {}
        total = 0

        def decode(index: int) -> Tensor:
            return decode_image(dataset.read(index), channels=channels, max_pixels=dataset.max_pixels)

        for index, picture in enumerate(for_each(decode, range(len(dataset)))):
            if isinstance(picture, Exception):
                reasons[index] = str(picture)
                continue
            parts.append(picture.permute(1, 2, 0).reshape(-1))
            shapes[index] = (*picture.shape[1:], picture.shape[0])
            total += len(parts[-1])
            if total > 2 * MEMORY_LIMIT:  # the sampled sizes were not typical
                return None
        lengths = shapes.prod(1)
        dataset.keep(key, WholePictures(torch.cat(parts), shapes, np.cumsum(lengths) - lengths, reasons))
    return dataset.pixels[key]


def for_each(work: Callable[[int], T], indices: Iterable[int], ahead: int = AHEAD) -> Iterator[T | Exception]:
    """`work(index)` of each, on all cores (decoders release the interpreter), in order, `ahead` results waiting for each core.

    What `work` raises because a picture is unreadable (OSError, ValueError) is yielded in place of its result.
    """

    def guarded(index: int) -> T | Exception:
        try:
            return work(index)
        except (OSError, ValueError) as problem:
            return problem

    cores = available_cores()
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[T | Exception]] = deque()
        for index in indices:
            waiting.append(pool.submit(guarded, index))
            if len(waiting) > ahead * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
