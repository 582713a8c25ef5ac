"""Answers drawn into the videos they are about: label, confidence and time on every frame, written as the answers come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vitrail.config import ConfigError
from vitrail.data.images import MAX_PIXELS
from vitrail.data.live import is_stream
from vitrail.data.video import Pixels, Video, VideoError, load_av
from vitrail.inference.inputs import STDIN, expand
from vitrail.inference.output import answer_text, printable
from vitrail.inference.predictor import Prediction

FILES = (".mp4", ".mov", ".mkv")
# Ticks a second: the common rates are whole numbers of them, and MPEG-4 Part 2 allows no more than 65,535.
_TICKS = 60_000
_LEAST_SIDE, _MOST_SIDE = 240, 4096  # smaller frames are enlarged, so that text can be read on them
_AMBER, _TRACK, _INK, _PANEL = (255, 176, 46), (255, 255, 255, 70), (255, 255, 255), (12, 14, 18, 175)


def draws_file(out: str | Path) -> bool:
    """Whether `out` names one video file, by its ending; else it names a folder."""
    return Path(out).suffix.lower() in FILES


def check_drawable(inputs: Iterable[str], out: str | Path) -> None:
    """Raises ConfigError at once, not after the first of them, where several videos are to be drawn into one file, or streams.

    Paths on stdin can be read only once; those are refused when their turn comes.
    """
    known = [item for item in inputs if item != STDIN]
    for item in known:
        if is_stream(item):
            raise ConfigError(f"{item} is a stream and cannot be read a second time: record it, then draw into the recording")
    if draws_file(out) and len(list(islice(expand(known, videos=True), 2))) > 1:
        raise ConfigError(several(out))


def several(out: str | Path) -> str:
    """Why several videos do not go into one file."""
    return f"{out} is one file, but there are several videos: name a folder to draw them into"


def annotated(predictions: Iterable[Prediction], out: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Prediction]:
    """The same predictions, while the videos they are about are written with the answers on their frames.

    predictions: of video files, those of one file after each other in the order of their times. out: a file (.mp4, .mov,
    .mkv) for one video, or a folder that gets one .mp4 for each. A frame shows the answer whose window has its middle
    nearest. Timestamps are those of the video; sound is left out. A file appears when it is complete.
    H.264 where PyAV's FFmpeg can write it, else MPEG-4 Part 2. One frame is held at a time.
    Raises ConfigError for a second video where `out` is a file, and where `out` is the video itself.
    """
    targets = _Targets(Path(out))
    with ExitStack() as open_file:
        drawn: _Drawn | None = None
        for prediction in predictions:
            if drawn is not None and drawn.path != prediction.path:
                drawn.finish()
                drawn = None
            if not prediction.error:
                if drawn is None:
                    open_file.close()
                    drawn = open_file.enter_context(_Drawn(prediction.path, targets.of(prediction.path), max_pixels))
                drawn.add(prediction)
            yield prediction
        if drawn is not None:
            drawn.finish()


class _Targets:
    """Where the drawn copy of each video is written."""

    def __init__(self, out: Path) -> None:
        self.out, self.taken = out, set[Path]()
        if not draws_file(out) and out.suffix and not out.is_dir():
            raise ConfigError(f"{out}: frames are drawn into {', '.join(FILES)}, or into a folder, not into {out.suffix}")

    def of(self, path: str) -> Path:
        if draws_file(self.out):
            if self.taken:
                raise ConfigError(several(self.out))
            target = self.out
        else:
            stem, number = Path(path).stem, 1
            while (target := self.out / f"{stem}{f'-{number}' if number > 1 else ''}.mp4") in self.taken:
                number += 1
        self.taken.add(target)
        if target.exists() and os.path.samefile(target, path):
            raise ConfigError(f"{target} is the video itself: draw into another file")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


class _Drawn:
    """One video and its drawn copy, some frames behind the answers."""

    def __init__(self, path: str, target: Path, max_pixels: int) -> None:
        self.path, self.target = path, target
        self.draft = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        self.video = Video(path, threads=0, max_pixels=max_pixels)
        self.frames = self.video.frames(range(len(self.video.times)))
        self.waiting: tuple[int, Pixels] | None = None
        self.newest: Prediction | None = None
        self.writer = _Writer(self.draft, self.video)

    def __enter__(self) -> _Drawn:
        return self

    def __exit__(self, *problem: object) -> None:
        self.video.close()
        self.writer.close()
        with suppress(FileNotFoundError):
            self.draft.unlink()

    def add(self, prediction: Prediction) -> None:
        """Draw the frames that belong to the answer before this one."""
        if self.newest is not None:
            self._draw_until((_middle(self.newest) + _middle(prediction)) / 2)
        self.newest = prediction

    def finish(self) -> None:
        """Draw the rest; the file takes its name."""
        self._draw_until(np.inf)
        self.video.close()
        self.writer.close()
        os.replace(self.draft, self.target)

    def _draw_until(self, end: float) -> None:
        assert self.newest is not None
        with suppress(VideoError):  # what cannot be decoded was answered with an error, or shows the frame before
            while True:
                frame = self.waiting or next(self.frames, None)
                self.waiting = frame
                if frame is None or self.video.times[frame[0]] >= end:
                    return
                self.writer.write(frame[1], float(self.video.times[frame[0]]), self.newest)
                self.waiting = None


def _middle(prediction: Prediction) -> float:
    return ((prediction.start or 0.0) + (prediction.end or 0.0)) / 2


class _Writer:
    """Frames of one size into a file."""

    def __init__(self, path: Path, video: Video) -> None:
        self.av = load_av()
        height, width = video.size
        scale = min(max(_LEAST_SIDE / min(height, width), 1.0), max(_MOST_SIDE / max(height, width), 1.0))
        self.scaled = (max(round(width * scale), 1), max(round(height * scale), 1))
        rate = len(video.times) / video.end if video.end > 0 else 25.0
        self.container = self.av.open(str(path), "w")
        self.stream: Any = self.container.add_stream(encoder(), rate=Fraction(rate).limit_denominator(1001))
        self.stream.width, self.stream.height = (side + side % 2 for side in self.scaled)
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, _TICKS)
        if encoder() == "libx264":
            self.stream.options = {"preset": "veryfast", "crf": "20"}
        else:
            self.stream.bit_rate = max(int(0.2 * self.stream.width * self.stream.height * rate), 200_000)
        self.ticks = -1

    def write(self, pixels: Pixels, seconds: float, prediction: Prediction) -> None:
        image = Image.fromarray(pixels)
        if image.size != self.scaled:
            image = image.resize(self.scaled, Image.Resampling.BICUBIC)
        draw_answer(image, prediction, seconds)
        frame = self.av.VideoFrame.from_ndarray(_even(np.asarray(image)), format="rgb24")
        self.ticks = max(round(seconds * _TICKS), self.ticks + 1)
        frame.pts, frame.time_base = self.ticks, Fraction(1, _TICKS)
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.container is not None:
            if self.ticks >= 0:
                self.container.mux(self.stream.encode(None))
            self.container.close()
            self.container = None


def _even(pixels: Pixels) -> UInt8[np.ndarray, "H W c"]:
    """The last row and column once more where a side is odd: colour is stored for two by two pixels."""
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))


@cache
def encoder() -> str:
    """What frames are written with: H.264 where this FFmpeg has an encoder, else MPEG-4 Part 2, which every build has."""
    return "libx264" if "libx264" in load_av().codecs_available else "mpeg4"


def draw_answer(image: Image.Image, prediction: Prediction, seconds: float) -> None:
    """Draw a panel along the lower edge: label at the left, probability and time at the right, a bar of the probability."""
    width, height = image.size
    size = max(min(width, height) // 18, 12)
    font, margin = _font(size), max(size // 2, 4)
    right = f"{100 * prediction.probability:.0f} %   {clock(seconds)}"
    top = height - size - size // 4 - 3 * margin
    pen = ImageDraw.Draw(image, "RGBA")
    pen.rectangle((0, top, width, height), fill=_PANEL)
    room = width - 3 * margin - pen.textlength(right, font)
    pen.text((margin, top + margin + size / 2), _shortened(printable(answer_text(prediction)), font, room), _INK, font, "lm")
    pen.text((width - margin, top + margin + size / 2), right, _INK, font, "rm")
    left, bar, lower = margin, top + 2 * margin + size, height - margin
    long = width - 2 * margin
    if long > 0:
        pen.rectangle((left, bar, left + long, lower), fill=_TRACK)
        pen.rectangle((left, bar, left + round(long * prediction.probability), lower), fill=_AMBER)


def clock(seconds: float) -> str:
    """`0:03.24`, from an hour on `1:00:03.24`."""
    hundredths = round(100 * seconds)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    first = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{first}:{rest // 100:02}.{rest % 100:02}"


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    fits = next((n for n in range(min(len(text), 200), 0, -1) if font.getlength(text[:n] + "…") <= room), 0)
    return text[:fits] + "…" if fits else ""


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as it comes with matplotlib: Latin, Greek, Cyrillic and more."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return ImageFont.truetype(str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
