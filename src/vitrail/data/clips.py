"""Which frames make a clip, and clips as the model takes them: sampled by time, cut the same way in every frame.

What is drawn at random comes from the sample's own generator; nothing here has a state.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from vitrail.config import AugmentConfig, ConfigError, Preprocess
from vitrail.data.footage import Footage, open_footage
from vitrail.data.images import MAX_PIXELS
from vitrail.data.opened import ArrayImage
from vitrail.data.transforms import decode_box, frame_picture, random_box, resize_picture
from vitrail.data.video import Frames, VideoError


def view_count(preprocess: Preprocess) -> int:
    """Clips that the model sees of one video: temporal ones times spatial ones; 1 for a picture."""
    return preprocess.clips * preprocess.crops


def with_views(preprocess: Preprocess, clips: int | None, crops: int | None) -> Preprocess:
    """Another number of views. Raises ConfigError for a model of pictures, which has one."""
    wanted = {name: number for name, number in (("clips", clips), ("crops", crops)) if number is not None}
    if wanted and not preprocess.frames:
        raise ConfigError(f"{' and '.join(wanted)} are views of videos; this model takes pictures")
    changed = replace(preprocess, **wanted)  # type: ignore[arg-type]
    check_clips(changed)
    return changed


def clip_frames(
    times: Float64[np.ndarray, " n"],
    end: float,
    preprocess: Preprocess,
    *,
    speed: float = 1.0,
    clip: int = 0,
    clips: int = 1,
    generator: torch.Generator | None = None,
) -> Int64[np.ndarray, " t"]:
    """Numbers of the frames of one clip among those shown at `times` until `end`, in seconds.

    dense: `frames` frames, every `stride`-th one, or with an `fps` one every 1 / fps seconds, whatever the rate of the file
    (the frame on show at that time). With a generator the clip begins anywhere; else clip number `clip` of `clips`: the
    first of several begins at the beginning, the last one ends at the end, a single one lies in the middle. uniform: as many
    equal parts as frames, one frame of each at the same place within its part (Arnab et al. 2021, section 4.1); segment: at
    a random place of each (Wang et al. 2016, TSN). Of several clips each has its own place, a single one the middle.
    A video that is too short repeats its last frame. speed: a dense clip covers this many times more.
    """
    count = preprocess.frames
    if preprocess.sampling == "dense":
        share = _place(clip, clips, generator)
        if preprocess.fps:
            step = speed / preprocess.fps
            room = max(end - times[0] - count * step, 0.0)
            return frames_at(times, times[0] + share * room + step * np.arange(count))
        step = preprocess.stride * speed
        room = max(len(times) - 1 - (count - 1) * step, 0.0)
        first = math.floor(share * (room + 1)) if generator is not None else round(share * room)
        return np.minimum(np.floor(first + step * np.arange(count) + 1e-9), len(times) - 1).astype(np.int64)
    within: float | np.ndarray = (clip + 0.5) / clips
    if generator is not None:
        draws = count if preprocess.sampling == "segment" else 1
        within = torch.rand(draws, generator=generator, dtype=torch.float64).numpy()
    return frames_at(times, times[0] + (end - times[0]) * (np.arange(count) + within) / count)


def _place(clip: int, clips: int, generator: torch.Generator | None) -> float:
    if generator is not None:
        return float(torch.rand((), generator=generator, dtype=torch.float64))
    return clip / (clips - 1) if clips > 1 else 0.5


def frames_at(times: Float64[np.ndarray, " n"], wanted: Float64[np.ndarray, " t"]) -> Int64[np.ndarray, " t"]:
    """The frame on show at each wanted time: the last one that has begun (a microsecond's rounding forgiven)."""
    return np.clip(np.searchsorted(times, wanted + 1e-6, "right") - 1, 0, len(times) - 1)


def clip_for_train(
    footage: Footage,
    preprocess: Preprocess,
    augment: AugmentConfig,
    generator: torch.Generator,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "c t H W"]:
    """One clip from a random time; one random part (RandomResizedCrop) of all its frames, or the evaluation fit.

    Raises VideoError or ImageError with the reason.
    """
    with open_footage(footage, channels=preprocess.channels, max_pixels=max_pixels) as opened:
        first, times, end = stretch(opened, footage)
        numbers = first + clip_frames(times, end, preprocess, speed=footage.speed, generator=generator)
        box = None if augment.crop == "none" else random_box(opened.size, augment, generator)

        def cut(pixels: np.ndarray) -> Tensor:
            if box is None:
                return frame_picture(resized(pixels, preprocess), preprocess)
            return decode_box(ArrayImage(pixels, preprocess.channels), box, preprocess, "exact")

        shown = {number: cut(pixels) for number, pixels in opened.frames(numbers)}
    return _stack([shown[number] for number in numbers.tolist()])


def clips_for_eval(
    footage: Footage, preprocess: Preprocess, max_pixels: int = MAX_PIXELS, threads: int = 1
) -> UInt8[Tensor, "v c t H W"]:
    """All views of one video: its clips in order, of each its crops along the longer side, first to last.

    Every frame is decoded once, however many views show it. Raises VideoError or ImageError with the reason.
    """
    with open_footage(footage, channels=preprocess.channels, max_pixels=max_pixels, threads=threads) as opened:
        return stretch_views(opened, footage, preprocess, {})


def stretch_views(
    opened: Frames, footage: Footage, preprocess: Preprocess, shown: dict[int, Tensor]
) -> UInt8[Tensor, "v c t H W"]:
    """Views of a stretch of what is open. shown: resized frames by number, of earlier stretches those that are used again.

    Raises VideoError where no frame lies in the stretch.
    """
    first, times, end = stretch(opened, footage)
    chosen = [
        first + clip_frames(times, end, preprocess, speed=footage.speed, clip=clip, clips=preprocess.clips)
        for clip in range(preprocess.clips)
    ]
    wanted = np.unique(np.concatenate(chosen)).tolist()
    for number in set(shown) - set(wanted):
        if number < wanted[0]:
            del shown[number]
    if missing := [number for number in wanted if number not in shown]:
        shown.update((number, resized(pixels, preprocess)) for number, pixels in opened.frames(missing))
    places = [0.5] if preprocess.crops == 1 else np.linspace(0, 1, preprocess.crops).tolist()
    shape = (len(chosen) * len(places), preprocess.frames, *preprocess.image_size, preprocess.channels)
    views = torch.empty(shape, dtype=torch.uint8)
    for view, (numbers, place) in zip(views, product(chosen, places), strict=True):
        for frame, number in zip(view, numbers.tolist(), strict=True):
            frame.copy_(frame_picture(shown[number], preprocess, place).permute(1, 2, 0))
    return views.permute(0, 4, 1, 2, 3)


def stretch(opened: Frames, footage: Footage) -> tuple[int, Float64[np.ndarray, " n"], float]:
    """The number of the first frame that belongs to the footage, the times of all that do, and when they end.

    Raises VideoError where no frame does.
    """
    end = opened.end if footage.end is None else min(footage.end, opened.end)
    first = int(frames_at(opened.times, np.array([max(footage.start, 0.0)]))[0])
    last = int(np.searchsorted(opened.times, end - 1e-6, "left"))
    if footage.start >= opened.end or last <= first:
        until = "the end" if footage.end is None else f"{footage.end:.3f} s"
        raise VideoError(f"no frame from {footage.start:.3f} s to {until}: the video is {opened.end:.3f} s long")
    return first, opened.times[first:last], end


def resized(pixels: np.ndarray, preprocess: Preprocess) -> UInt8[Tensor, "c H W"]:
    """A frame (h, w, c) at the size it is cut from."""
    return resize_picture(_tensor(pixels), preprocess)


def _tensor(pixels: np.ndarray) -> UInt8[Tensor, "c h w"]:
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def _stack(pictures: list[Tensor]) -> UInt8[Tensor, "c t H W"]:
    """Channels innermost in memory, as pictures travel."""
    return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(3, 0, 1, 2)


def check_clips(preprocess: Preprocess) -> None:
    """Raises ConfigError for a way of cutting clips that makes no sense, naming the setting."""
    for name in ("stride", "clips", "crops"):
        if getattr(preprocess, name) < 1:
            raise ConfigError(f"{name} must be 1 or more, given {getattr(preprocess, name)}")
    if preprocess.fps < 0:
        raise ConfigError(f"fps must be 0 (every frame of the file counts) or more, given {preprocess.fps}")
    if preprocess.fps and preprocess.stride != 1:
        raise ConfigError(f"stride {preprocess.stride} counts frames of the file and fps {preprocess.fps:g} seconds: give one")
    if preprocess.sampling != "dense" and (preprocess.fps or preprocess.stride != 1):
        raise ConfigError(f"{preprocess.sampling} sampling spreads the frames over the video: stride and fps have no meaning")
    if preprocess.crops > 1 and preprocess.fit != "crop":
        raise ConfigError(f"{preprocess.crops} crops need fit crop, given {preprocess.fit}")


def average_views(logits: Float[Tensor, "n k"], views: int, multi_label: bool) -> Float[Tensor, "b k"]:
    """Scores of samples from those of their views, which follow each other: probabilities are averaged, as the papers do.

    (Feichtenhofer et al. 2019, section 4; Arnab et al. 2021, section 4.1.) Their softmax, or sigmoid, is that average.
    """
    if views == 1:
        return logits
    per_view = logits.view(-1, views, logits.shape[1])
    if multi_label:
        return per_view.double().sigmoid().mean(1).logit(1e-12).float()
    return (per_view.log_softmax(2).logsumexp(1) - math.log(views)).contiguous()
