"""Predictor: from pictures wherever they are to class names, with the preprocessing and the names the model carries."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, Preprocess
from vitrail.cost import pick_device, pick_precision
from vitrail.data.clips import average_views, clips_for_eval, view_count, with_views
from vitrail.data.footage import Footage
from vitrail.data.images import MAX_PIXELS, DecodeMode
from vitrail.data.live import Stream
from vitrail.data.transforms import decode_for_eval
from vitrail.data.windows import Window, windows_for_eval, windows_of_stream
from vitrail.inference.engines import Engine
from vitrail.inference.inputs import Asked, Input, expand
from vitrail.models import Model

LABEL_THRESHOLD = 0.5  # a label of a multi-label model is given from this probability on
_AHEAD = 2  # batches of pictures decoded while the model runs


@dataclass(frozen=True)
class Prediction:
    """The answer to one picture, one video, or a part of a video.

    path: its path, or #place for a picture in memory. label, probability: the likeliest class. top: (label, probability),
    likeliest first. labels: what is given: `label`, or for a multi-label model every label of at least 50 %. error: why
    there is no answer, "" if there is one. start, end: seconds from the beginning of the video, where it was asked in windows.
    """

    path: str
    label: str = ""
    probability: float = 0.0
    top: tuple[tuple[str, float], ...] = ()
    labels: tuple[str, ...] = ()
    error: str = ""
    start: float | None = None
    end: float | None = None


class Predictor:
    """Answers pictures, or videos, with a trained model.

    `model` is a model, or the path of a checkpoint, folder or run; a model in memory is copied, not changed. Pictures:
    paths, folders, patterns, "-" (paths on stdin), bytes, PIL images, arrays (h, w, c) and tensors (c, h, w), uint8 or
    0..1. device and precision as in the settings of a run; `top` answers per picture; `decode` "scaled" is faster and
    slightly less exact on large JPEGs; `workers` threads decode (-1: one per core, at most 16); `errors` "raise" ends at
    the first picture that cannot be read, "keep" answers it with its `.error`.

    Videos, for a model that takes clips: paths, folders, patterns, "-", whole files as bytes, uint8 arrays (t, h, w, c) and
    tensors (c, t, h, w). How clips are cut comes with the model; `clips` x `crops` views are averaged. With a `window` in
    seconds, or "clip" for the length of one clip, a video gets one answer for every such stretch, one `every` so many
    seconds (default: one after the other); it streams through, however long it is. Only so can a stream be asked (an
    address such as rtsp://..., or a pipe): each window is answered when its last frame has come, until the stream stops.
    Raises ValueError for a model that does not fit its own card, and for settings that do not exist.
    """

    def __init__(
        self,
        model: Model | str | Path,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 32,
        top: int = 5,
        decode: str = "exact",
        workers: int = -1,
        errors: str = "keep",
        max_pixels: int = MAX_PIXELS,
        clips: int | None = None,
        crops: int | None = None,
        window: float | str = 0.0,
        every: float = 0.0,
    ):
        for name, value, allowed in (("decode", decode, ("exact", "scaled")), ("errors", errors, ("keep", "raise"))):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        try:
            seconds = None if window == "clip" else float(window)
        except (TypeError, ValueError):
            raise ConfigError(f'window is {window!r}; it is a number of seconds, or "clip"') from None
        finite = math.isfinite(seconds or 0) and math.isfinite(every)
        if not finite or min(seconds or 0, every) < 0 or (every and seconds == 0):
            raise ConfigError(f"window and every are seconds, every needs a window; got {window} and {every:g}")
        if batch_size < 1 or top < 1:
            raise ConfigError(f"batch_size and top must be at least 1, got {batch_size} and {top}")
        model = model if isinstance(model, Model) else load_model(model)
        count, card = model.config.num_classes, model.card
        self.classes: tuple[str, ...] = (card.classes if card else ()) or tuple(str(i) for i in range(count))
        if len(self.classes) != count:
            raise ConfigError(f"the model answers {count} classes, but its card names {len(self.classes)}")
        self.multi_label = bool(card and card.multi_label)
        preprocess = (card.preprocess if card else None) or Preprocess(
            image_size=model.config.image_size,
            channels=model.config.in_channels,
            frames=model.input_shape[1] if model.takes_clips else 0,
        )
        self.preprocess: Preprocess = with_views(preprocess, clips, crops)
        self.views, self.window, self.every = view_count(self.preprocess), seconds, every
        if seconds != 0 and not self.preprocess.frames:
            raise ConfigError("this model takes pictures: windows, streams (addresses and pipes) and drawing are for videos")
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.batch_size, self.top, self.errors = batch_size, min(top, count), errors
        self.decode = cast(DecodeMode, decode)
        self.workers = workers if workers > 0 else min(os.cpu_count() or 1, 16)
        self.max_pixels = max_pixels
        self.engine = Engine(model, self.preprocess, self.device, self.precision)

    def __call__(self, inputs: Input | Iterable[Input]) -> list[Prediction]:
        """One prediction per picture, video or window, in order."""
        return list(self.stream(inputs))

    def stream(self, inputs: Input | Iterable[Input]) -> Iterator[Prediction]:
        """Predictions one after the other, in order, in memory that does not grow with their number."""
        if self.window != 0:
            yield from self._windows(inputs)
            return
        for batch in self._batches(inputs):
            pictures = [picture for _, picture in batch if isinstance(picture, Tensor)]
            answers = iter(self._answers(self._scores(pictures)) if pictures else ())
            for name, picture in batch:
                yield Prediction(name, error=picture) if isinstance(picture, str) else replace(next(answers), path=name)

    def logits(self, inputs: Input | Iterable[Input]) -> Float[Tensor, "n k"]:
        """Raw scores, float32. Raises ValueError for a picture that cannot be read: there is no score to put in its place."""
        scores = [torch.empty(0, len(self.classes))]
        for batch in self._batches(inputs):
            for name, picture in batch:
                if isinstance(picture, str):
                    raise ValueError(f"{name}: {picture}")
            scores.append(self._scores([picture for _, picture in batch]))  # type: ignore[misc]
        return torch.cat(scores)

    def _scores(self, samples: list[Tensor]) -> Float[Tensor, "b k"]:
        """Of pictures (c, h, w), or of videos by their views (v, c, t, h, w)."""
        if not self.preprocess.frames:
            return self.engine(torch.stack(samples))
        scores = [self.engine(clips) for clips in torch.cat(samples).split(self.batch_size)]
        return average_views(torch.cat(scores), self.views, self.multi_label)

    def _windows(self, inputs: Input | Iterable[Input]) -> Iterator[Prediction]:
        waiting: list[tuple[str, Window]] = []

        def answered() -> Iterator[Prediction]:
            if waiting:
                for (name, part), answer in zip(
                    waiting, self._answers(self._scores([part.views for _, part in waiting])), strict=True
                ):
                    yield replace(answer, path=name, start=part.start, end=part.end)
                waiting.clear()

        for item in expand(inputs, videos=True):
            reason, live = item.error, isinstance(item.picture, Stream)
            try:
                for part in self._parts(item):
                    waiting.append((item.name, part))
                    if live or len(waiting) * self.views >= self.batch_size:
                        yield from answered()
            except (OSError, ValueError) as problem:
                reason = str(problem)
            yield from answered()
            if reason and self.errors == "raise":
                raise ValueError(f"{item.name}: {reason}")
            if reason:
                yield Prediction(item.name, error=reason)

    def _parts(self, item: Asked) -> Iterator[Window]:
        if isinstance(item.picture, Stream):
            return windows_of_stream(item.picture, self.preprocess, self.window, self.every, self.max_pixels)
        if isinstance(item.picture, Footage):
            return windows_for_eval(item.picture, self.preprocess, self.window, self.every, self.max_pixels)
        return iter(())

    def _answers(self, scores: Float[Tensor, "b k"]) -> Iterator[Prediction]:
        probabilities = scores.sigmoid() if self.multi_label else scores.softmax(1)
        best = probabilities.topk(self.top)
        for row, values, places in zip(probabilities, best.values.tolist(), best.indices.tolist(), strict=True):
            top = tuple((self.classes[i], value) for i, value in zip(places, values, strict=True))
            given = [self.classes[i] for i in (row >= LABEL_THRESHOLD).nonzero()[:, 0].tolist()]
            labels = tuple(given) if self.multi_label else (top[0][0],)
            yield Prediction("", top[0][0], top[0][1], top, labels)

    def _batches(self, inputs: Input | Iterable[Input]) -> Iterator[list[tuple[str, Tensor | str]]]:
        """Decoded pictures, or the reason there is none, by name; the threads work ahead while the caller computes."""
        asked = expand(inputs, videos=bool(self.preprocess.frames))
        group = max(self.batch_size // self.views, 1)
        waiting: deque[tuple[str, Future[Tensor | str]]] = deque()
        pool = ThreadPoolExecutor(self.workers, "decode")
        try:
            while True:
                while len(waiting) < _AHEAD * group and (item := next(asked, None)) is not None:
                    waiting.append((item.name, pool.submit(self._read, item)))
                if not waiting:
                    return
                ready = [waiting.popleft() for _ in range(min(group, len(waiting)))]
                yield [(name, future.result()) for name, future in ready]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, item: Asked) -> Tensor | str:
        reason = item.error
        if item.picture is not None:
            try:
                if isinstance(item.picture, Stream):
                    raise ValueError('a stream is answered in windows: give window seconds, or "clip"')
                if isinstance(item.picture, Footage):
                    return clips_for_eval(item.picture, self.preprocess, self.max_pixels)
                return decode_for_eval(item.picture, self.preprocess, mode=self.decode, max_pixels=self.max_pixels)
            except Exception as problem:  # whatever a decoder makes of a stranger's file must not end the run
                reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        if self.errors == "raise":
            raise ValueError(f"{item.name}: {reason}")
        return reason
