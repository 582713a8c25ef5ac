"""Long videos and streams in windows: one after the other, the frames of one window held at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vitrail.config import Preprocess
from vitrail.data.clips import resized, stretch_views
from vitrail.data.footage import Footage, open_footage
from vitrail.data.images import MAX_PIXELS
from vitrail.data.live import Arriving, Stream
from vitrail.data.video import Frames, VideoError

SPREAD_SECONDS = 2.0  # a window where neither the user nor the model's card says how long one is


class Window(NamedTuple):
    """A stretch of a video, in seconds, and its views, uint8 (v, c, t, h, w)."""

    start: float
    end: float
    views: Tensor


def windows_for_eval(
    footage: Footage,
    preprocess: Preprocess,
    window: float | None,
    every: float = 0.0,
    max_pixels: int = MAX_PIXELS,
    threads: int = 0,
) -> Iterator[Window]:
    """Windows of `window` seconds (None: as long as a clip), one every `every` seconds (0: one after the other).

    The last one lies at the end of the video. It streams through: only the frames of one window are held.
    Raises VideoError or ImageError with the reason.
    """
    with open_footage(footage, channels=preprocess.channels, max_pixels=max_pixels, threads=threads) as opened:
        shown: dict[int, Tensor] = {}
        if window is None:
            window = clip_seconds(len(opened.times) / opened.end if opened.end > 0 else footage.rate, preprocess)
        for start in window_starts(opened.end, window, every or window):
            end = min(start + window, opened.end)
            yield Window(start, end, stretch_views(opened, footage._replace(start=start, end=end), preprocess, shown))


def clip_seconds(rate: float, preprocess: Preprocess) -> float:
    """How long a stretch of a video of `rate` frames per second a clip is made for.

    A clip that is spread over its video, however long that is, says nothing about it: `SPREAD_SECONDS`.
    """
    if preprocess.sampling != "dense":
        return SPREAD_SECONDS
    return preprocess.frames / preprocess.fps if preprocess.fps else preprocess.frames * preprocess.stride / rate


def window_starts(length: float, window: float, every: float) -> list[float]:
    """Where windows over a video begin: at multiples of `every`, and one that ends with the video."""
    last = max(length - window, 0.0)
    starts = [step * every for step in range(int(last / every + 1e-9) + 1)]
    return starts if last - starts[-1] < 1e-6 * every else [*starts, last]


def windows_of_stream(
    stream: Stream, preprocess: Preprocess, window: float | None, every: float = 0.0, max_pixels: int = MAX_PIXELS
) -> Iterator[Window]:
    """Windows as in `windows_for_eval`, each as soon as its last frame has arrived.

    A stream that stops has its last window where it ends; what arrives no more has none. Raises VideoError when there is no
    stream or not one frame comes, and, after the last window, where it broke off instead of ending.
    """
    with Arriving(stream, preprocess.channels, max_pixels) as arriving:
        window = clip_seconds(arriving.rate, preprocess) if window is None else window
        held = _Held(preprocess, window, every or window)
        for seconds, pixels in arriving:
            yield from held.complete(seconds)
            held.add(seconds, pixels)
        yield from held.rest(1 / arriving.rate)
        if not held.times:
            raise VideoError("the stream stopped before its first frame" + (f": {arriving.ended}" if arriving.ended else ""))
        if arriving.ended:
            raise VideoError(f"the stream stopped after {held.times[-1]:.2f} s: {arriving.ended}")


class _Held:
    """The frames, already resized, of the window that is not complete yet."""

    def __init__(self, preprocess: Preprocess, window: float, every: float) -> None:
        self.preprocess, self.window, self.every = preprocess, window, every
        self.times: list[float] = []
        self.pictures: list[Tensor] = []
        self.size = (0, 0)
        self.steps, self.answered = 0, 0.0  # windows begun, and the end of the last one

    def add(self, seconds: float, pixels: np.ndarray) -> None:
        self.size = (pixels.shape[0], pixels.shape[1])
        self.times.append(seconds)
        self.pictures.append(resized(pixels, self.preprocess))

    def complete(self, now: float) -> Iterator[Window]:
        """The windows that end before a frame that begins now, frames that no later window needs let go of."""
        while self.times and (start := self.steps * self.every) + self.window <= now + 1e-6:
            if self.times[-1] > start - 1e-6 or self.steps == 0:
                yield self._window(start, start + self.window)
            else:  # nothing came for longer than a window: go on where it comes again
                self.steps = max(int(now / self.every) - 1, self.steps)
            self.steps += 1
            first = min(self.steps * self.every, now - self.window)  # the stream may end now, and its last window with it
            gone = max(int(np.searchsorted(self.times, first + 1e-6, "right")) - 1, 0)
            del self.times[:gone], self.pictures[:gone]

    def rest(self, frame: float) -> Iterator[Window]:
        """The windows that are left when no more frames come: the last one ends with the last frame."""
        if self.times:
            end = self.times[-1] + frame
            yield from self.complete(end)
            if end > self.answered + 1e-6:
                yield self._window(max(end - self.window, 0.0), end)

    def _window(self, start: float, end: float) -> Window:
        self.answered = end
        opened = Frames(np.array(self.times), end, self.size)
        views = stretch_views(opened, Footage("", start, end), self.preprocess, dict(enumerate(self.pictures)))
        return Window(start, end, views)
