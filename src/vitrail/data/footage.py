"""What a clip is cut from: a video file, a row of pictures, or pixels in memory, all with frames that have a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.data.images import MAX_PIXELS, decode_image, image_size
from vitrail.data.pillow import match_channels
from vitrail.data.video import Frames, Pixels, Video, VideoData


class Footage(NamedTuple):
    """A labelled stretch of video, nothing of it read yet.

    source: a path or a whole file as bytes, the paths of the frames in order, pixels, uint8 (c, t, h, w), or frames in colour
    that are made when asked for. start, end: seconds since the first frame, end None is the end. rate: frames per second, where
    the source does not say (pictures, pixels). speed: how many times faster it is played.
    """

    source: VideoData | tuple[str, ...] | Tensor | Frames
    start: float = 0.0
    end: float | None = None
    rate: float = 25.0
    speed: float = 1.0


class PictureFrames(Frames):
    """Frames that are picture files, one after the other. Raises ImageError for the first one if it cannot be read."""

    def __init__(self, paths: Sequence[str], rate: float, channels: int, max_pixels: int) -> None:
        super().__init__(np.arange(len(paths)) / rate, len(paths) / rate, image_size(paths[0]))
        self.paths, self.channels, self.max_pixels = paths, channels, max_pixels

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels); raises ImageError naming the frame that cannot be read."""
        for number in np.unique(np.asarray(wanted, np.int64)).tolist():
            image = decode_image(self.paths[number], channels=self.channels, max_pixels=self.max_pixels)
            yield number, image.permute(1, 2, 0).numpy()


class TensorFrames(Frames):
    """Pixels in memory."""

    def __init__(self, pixels: UInt8[Tensor, "c t h w"], rate: float, channels: int) -> None:
        super().__init__(np.arange(pixels.shape[1]) / rate, pixels.shape[1] / rate, (pixels.shape[2], pixels.shape[3]))
        self.pixels, self.channels = pixels.permute(1, 2, 3, 0), channels

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels), views."""
        for number in np.unique(np.asarray(wanted, np.int64)).tolist():
            yield number, match_channels(self.pixels[number].numpy(), self.channels)


class ConvertedFrames(Frames):
    """Frames of another number of channels."""

    def __init__(self, source: Frames, channels: int) -> None:
        super().__init__(source.times, source.end, source.size)
        self.source, self.channels = source, channels

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels), converted one by one."""
        for number, pixels in self.source.frames(wanted):
            yield number, match_channels(pixels, self.channels)


def open_footage(footage: Footage, *, channels: int = 3, max_pixels: int = MAX_PIXELS, threads: int = 1) -> Frames:
    """Its frames, to be closed (`with open_footage(...) as frames`). Raises VideoError or ImageError with the reason."""
    source = footage.source
    if isinstance(source, Frames):
        return source if channels == 3 else ConvertedFrames(source, channels)
    if isinstance(source, Tensor):
        return TensorFrames(source, footage.rate, channels)
    if isinstance(source, tuple):
        return PictureFrames(source, footage.rate, channels, max_pixels)
    return Video(source, channels=channels, threads=threads, max_pixels=max_pixels)


def media_size(sample: Any) -> tuple[int, int]:
    """(height, width) of a picture or of the frames of footage, as shown. Raises ImageError or VideoError."""
    if not isinstance(sample, Footage):
        return image_size(sample)
    with open_footage(sample) as opened:
        return opened.size


def as_footage(value: Any) -> Footage:
    """A video handed over from Python: a whole file as bytes, or uint8 frames as an array (t, h, w, c) or tensor (c, t, h, w).

    Raises ValueError otherwise.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Footage(bytes(value))
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = torch.from_numpy(np.require(value, requirements=["C", "W"])).permute(3, 0, 1, 2)
    if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype != torch.uint8 or 0 in value.shape:
        raise ValueError(
            "expected a video: a path, bytes, a uint8 array (frames, height, width, channels) or a uint8 tensor "
            f"(channels, frames, height, width), got {type(value).__name__} {getattr(value, 'dtype', '')} "
            f"{tuple(getattr(value, 'shape', ()))}"
        )
    return Footage(value.detach().cpu())
