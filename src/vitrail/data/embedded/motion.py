"""The embedded videos: an emoji that moves over a texture in one of eight ways, drawn when they are read.

The eight motions are four pairs, each the other played backwards: the reversed clip of a sample is exactly what would be drawn
for the opposite motion. So the frames of a clip, taken without their order, say nothing about which of the two it is, and a
model that does not use their order cannot be right more often than every other time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from vitrail.data.footage import Footage
from vitrail.data.listing import Listing
from vitrail.data.stores import Store, digest
from vitrail.data.video import Frames, Pixels

MOTIONS = ("left", "right", "up", "down", "zoom in", "zoom out", "turn left", "turn right")
SIDE, FRAMES, RATE = 64, 16, 16.0  # pixels, frames, frames per second
TRAIN_CLIPS, TEST_CLIPS = 4000, 800
TEST_DRAWINGS = 5  # every fifth drawing is kept for the test clips
_SHIFT, _ZOOM, _TURN = 1.0, 1.2, math.pi  # from first to last frame: halves of the picture, logarithm of the size, radians
_FOOT = 0.5  # what a drawing turns about, from its middle (0), where a disc would seem to rest, to its lower edge (1)
_SPRITE = 32
_WHITE = 244  # of the sheet's background, with what lossy compression did to it
_WAVES, _STRENGTH, _COLOURS = 3, 12, (96, 160)  # of the texture; pale beside the drawings, which are what moves
_CENTRES = (2 * torch.arange(SIDE) + 1) / SIDE - 1  # of pixels, in -1..1


@dataclass(frozen=True)
class Scene:
    """What one clip shows. drawing: number of the emoji; x, y: its place in the middle of the clip, in -1..1; size: of its
    side, as a fraction of the picture's; angle: radians; extent: of the motion from first to last frame, 0..1 of what is usual;
    texture: seed of the background."""

    motion: str
    drawing: int
    x: float
    y: float
    size: float
    angle: float
    extent: float
    texture: int


def opposite(motion: str) -> str:
    """The motion that this one is when played backwards."""
    return MOTIONS[MOTIONS.index(motion) ^ 1]


def scene(index: int, drawings: np.ndarray, seed: int = 0) -> Scene:
    """Scene number `index`: the motions come in turn, the rest is a pure function of (seed, index)."""
    rng = np.random.default_rng((seed, index))
    x, y = rng.uniform(-0.2, 0.2, 2)
    return Scene(
        motion=MOTIONS[index % len(MOTIONS)],
        drawing=int(drawings[rng.integers(len(drawings))]),
        x=float(x),
        y=float(y),
        size=float(rng.uniform(0.5, 0.75)),
        angle=float(rng.uniform(-0.5, 0.5)),
        extent=float(rng.uniform(0.6, 1.0)),
        texture=int(rng.integers(2**31)),
    )


def reverse(shown: Scene) -> Scene:
    """The scene that shows the same frames in the opposite order."""
    return replace(shown, motion=opposite(shown.motion))


def draw(
    shown: Scene, drawings: UInt8[Tensor, "n 4 s s"], numbers: Sequence[int] | np.ndarray = range(FRAMES)
) -> UInt8[Tensor, "3 t h w"]:
    """The clip of a scene, or of its frames those of these numbers; drawings: as `cut_out` makes them."""
    step = np.asarray(numbers)
    going = (2.0 * step - (FRAMES - 1)) / (2 * (FRAMES - 1))  # -0.5 .. 0.5, the same backwards with the other sign
    pair, forwards = divmod(MOTIONS.index(shown.motion), 2)
    going = (going if forwards else -going) * shown.extent
    x, y, size, angle = (np.full(len(step), value) for value in (shown.x, shown.y, shown.size, shown.angle))
    if pair == 0:
        x = x + _SHIFT * going
    elif pair == 1:
        y = y + _SHIFT * going
    elif pair == 2:
        size = size * np.exp(-_ZOOM * going)
    else:
        turned = angle + _TURN * going
        x = x + _FOOT * size * (np.sin(turned) - np.sin(angle))
        y = y - _FOOT * size * (np.cos(turned) - np.cos(angle))
        angle = turned
    # Where each pixel of the frame looks into the drawing: moved, turned, scaled.
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    matrices = np.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y])
    grid = torch.empty(len(step), SIDE, SIDE, 2)
    for axis, (across, down, start) in enumerate(torch.from_numpy(matrices).float().view(2, 3, -1, 1, 1)):
        torch.add(across * _CENTRES, down * _CENTRES[:, None] + start, out=grid[..., axis])
    picture = drawings[shown.drawing].float()[None]
    emoji = F.grid_sample(picture, grid.view(1, -1, SIDE, 2), align_corners=False)[0].unflatten(1, (-1, SIDE))  # 4 t h w
    frames = torch.addcmul(emoji[:3], _texture(shown.texture)[:, None], 1 - emoji[3:] / 255)
    return frames.round_().to(torch.uint8)


def cut_out(sheet: UInt8[Tensor, "n 3 s s"]) -> UInt8[Tensor, "n 4 s s"]:
    """Colour, and opacity: 0 (and colour 0) for what is white as far as the border, else 255."""
    bit = 1 << np.arange(_SPRITE, dtype=np.uint64)
    white = ((sheet.amin(1) >= _WHITE).numpy() * bit).sum(2, dtype=np.uint64)  # a row of pixels is a number
    outside = np.zeros((len(sheet), _SPRITE + 2), np.uint64)  # with a row above and one below
    outside[:, 0] = outside[:, -1] = bit.sum()
    inside, edges = outside[:, 1:-1], bit[0] | bit[-1]
    while True:
        near = outside[:, :-2] | outside[:, 2:] | inside | inside << np.uint64(1) | inside >> np.uint64(1) | edges
        grown = near & white
        if np.array_equal(grown, inside):
            break
        inside[:] = grown
    opaque = torch.from_numpy(inside[..., None] & bit == 0).unsqueeze(1)
    return torch.cat([sheet * opaque, opaque.byte() * 255], 1)


def _texture(seed: int) -> Float[Tensor, "3 h w"]:
    """A few waves of random length, direction and colour, in 0..255."""
    rng = np.random.default_rng(seed)
    place = np.arange(SIDE) / SIDE
    colour = rng.uniform(*_COLOURS, 3)[:, None, None]
    turn, length, phase = (rng.uniform(low, high, (_WAVES, 1)) for low, high in ((0, np.pi), (0.15, 0.8), (0, 2 * np.pi)))
    across, down = (2 * np.pi * place * way(turn) / length for way in (np.cos, np.sin))
    # The sine of a sum, as two products of functions of one coordinate each.
    rows = np.concatenate([np.sin(down + phase), np.cos(down + phase)])
    columns = np.concatenate([np.cos(across), np.sin(across)])
    strength = np.tile(rng.uniform(-_STRENGTH, _STRENGTH, (3, _WAVES)), 2)
    colour = colour + (strength[:, :, None] * rows).transpose(0, 2, 1) @ columns
    return torch.from_numpy(colour.clip(0, 255).astype(np.float32))


class DrawnFrames(Frames):
    """The frames of a scene, drawn when they are asked for."""

    def __init__(self, shown: Scene, drawings: UInt8[Tensor, "n 4 s s"]) -> None:
        super().__init__(np.arange(FRAMES) / RATE, FRAMES / RATE, (SIDE, SIDE))
        self.scene, self.drawings = shown, drawings

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels); at most 16 frames are held."""
        numbers = np.unique(np.asarray(wanted, np.int64))
        yield from zip(numbers.tolist(), draw(self.scene, self.drawings, numbers).permute(1, 2, 3, 0).numpy(), strict=True)


class MotionStore(Store):
    """Clips drawn when read: training ones first, then the test ones, which show other drawings."""

    video = True

    def __init__(self, drawings: UInt8[Tensor, "n 4 s s"]) -> None:
        self.drawings = drawings
        numbers = np.arange(len(drawings))
        tested = numbers % TEST_DRAWINGS == 0
        self.numbers = {"train": numbers[~tested], "test": numbers[tested]}

    def __len__(self) -> int:
        return TRAIN_CLIPS + TEST_CLIPS

    def scene(self, row: int) -> Scene:
        """What a row shows."""
        return scene(row, self.numbers["train" if row < TRAIN_CLIPS else "test"])

    def read(self, row: int) -> Footage:
        """The clip, 16 frames at 16 frames per second; nothing of it is drawn yet."""
        return Footage(DrawnFrames(self.scene(row), self.drawings))

    def key(self, row: int) -> bytes:
        """Made from the row number."""
        return digest(row)


def read_motion(drawings: UInt8[Tensor, "n 4 s s"]) -> Listing:
    """List the clips, of drawings as `cut_out` makes them; `left` and `turn left` change when a clip is mirrored."""
    store = MotionStore(drawings)
    motions = [MOTIONS[row % len(MOTIONS)] for row in range(len(store))]
    return Listing(
        store,
        names=[f"{motion}/{row:05d}" for row, motion in enumerate(motions)],
        labels=[(motion,) for motion in motions],
        splits=["train" if row < TRAIN_CLIPS else "test" for row in range(len(store))],
        classes=MOTIONS,
    )
