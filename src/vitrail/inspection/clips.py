"""Maps over what a model was shown: over a picture, or over the frames of a clip beside each other, and over its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vitrail.inspection import draw
from vitrail.inspection.attention import Placed

MOST, ACROSS = 8, 4  # frames shown of a clip, and in a row
INPUT = "input"


def frames_of(pixels: UInt8[Tensor, "c *t h w"], count: int) -> list[UInt8[Tensor, "c h w"]]:
    """`count` frames of a clip at the middles of as many equal parts; a picture is its only frame."""
    return [pixels] if pixels.ndim == 3 else [pixels[:, i] for i in _middles(pixels.shape[1], count)]


def frames_shown(pixels: UInt8[Tensor, "c *t h w"], maps: Mapping[str, Placed]) -> list[int]:
    """Which frames of a clip a strip shows: one for each time that the finest map knows, `MOST` at most; [0] of a picture."""
    if pixels.ndim == 3:
        return [0]
    return _middles(pixels.shape[1], min(MOST, max(placed.cells.grid[0] for placed in maps.values())))


def strips(pixels: UInt8[Tensor, "c *t h w"], maps: Mapping[str, Placed]) -> dict[str, Image.Image]:
    """The input (key "input") and every map of it (b = 1) drawn over it; frames share one scale, the brightest of the clip."""
    height, width = pixels.shape[-2:]
    shown = frames_shown(pixels, maps)
    frames = [pixels if pixels.ndim == 3 else pixels[:, i] for i in shown]
    found = {INPUT: beside([draw.enlarged(frame) for frame in frames])}
    for name, placed in maps.items():
        over, times = placed.over(height, width)[0].cpu(), placed.cells.nearest(0, max(shown) + 1)
        largest = float(over.max().clamp_min(1e-12))
        found[name] = beside([draw.overlay(f, over[times[i]], largest) for f, i in zip(frames, shown, strict=True)])
    return found


def numbered(pixels: UInt8[Tensor, "c *t h w"], maps: Mapping[str, Placed]) -> str:
    """Which frames a strip shows, in words, counted from 1; "input" for a picture."""
    if pixels.ndim == 3:
        return INPUT
    return f"frames {', '.join(str(i + 1) for i in frames_shown(pixels, maps))} of {pixels.shape[1]}"


def over_time(placed: Placed) -> tuple[Float[Tensor, " e"], Float[Tensor, " t"]]:
    """How a map (b = 1) spreads over time: where its t cells begin and end, in frames from 1 on, and each one's share.

    Shares are of what lies on places, so that they add up to 1: what goes to tokens without a place is left out.
    """
    sums = placed.shares[0].flatten(1).sum(1).float().cpu()
    cells = placed.cells
    edges = cells.origin[0] + 0.5 + cells.step[0] * (torch.arange(cells.grid[0] + 1) - 0.5)
    return edges, sums / sums.sum().clamp_min(1e-12)


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in reading order, `ACROSS` in a row, thin gaps between them."""
    if len(pictures) == 1:
        return pictures[0]
    gap, (width, height), columns = 4, pictures[0].size, min(ACROSS, len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128,) * 3)
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * (width + gap), number // columns * (height + gap)))
    return canvas


def _middles(length: int, count: int) -> list[int]:
    return [min(int((i + 0.5) * length / count), length - 1) for i in range(count)]
