"""The embedded videos: an emoji that moves over a texture in one of eight ways, drawn when they are read.

The eight motions are four pairs, each the other played backwards: the reversed clip of a sample is exactly what would be drawn
for the opposite motion. So the frames of a clip, taken without their order, say nothing about which of the two it is, and a
model that does not use their order cannot be right more often than every other time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
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
_SPRITE = 32
_WHITE = 244  # of the sheet's background, with what lossy compression did to it
_WAVES = 3
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
    x, y = rng.uniform(-0.25, 0.25, 2)
    return Scene(
        motion=MOTIONS[index % len(MOTIONS)],
        drawing=int(drawings[rng.integers(len(drawings))]),
        x=float(x),
        y=float(y),
        size=float(rng.uniform(0.35, 0.55)),
        angle=float(rng.uniform(-0.5, 0.5)),
        extent=float(rng.uniform(0.6, 1.0)),
        texture=int(rng.integers(2**31)),
    )


def reverse(shown: Scene) -> Scene:
    """The scene that shows the same frames in the opposite order."""
    return replace(shown, motion=opposite(shown.motion))


def draw(
    shown: Scene, sheet: UInt8[Tensor, "n 3 s s"], numbers: Sequence[int] | np.ndarray = range(FRAMES)
) -> UInt8[Tensor, "3 t h w"]:
    """The clip of a scene, or of its frames those of these numbers; sheet: the drawings."""
    step = np.arange(FRAMES)
    going = (2.0 * step - (FRAMES - 1)) / (2 * (FRAMES - 1))  # -0.5 .. 0.5, the same backwards with the other sign
    pair, forwards = divmod(MOTIONS.index(shown.motion), 2)
    going = (going if forwards else -going) * shown.extent
    x, y, size, angle = (np.full(FRAMES, value) for value in (shown.x, shown.y, shown.size, shown.angle))
    if pair == 0:
        x = x + going
    elif pair == 1:
        y = y + going
    elif pair == 2:
        size = size * np.exp(-1.2 * going)
    else:
        angle = angle + 2.0 * going
    picture = _cut_out(sheet[shown.drawing])
    # Where each pixel of the frame looks into the drawing: moved, turned, scaled.
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    matrices = np.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y])[:, np.asarray(numbers)]
    count = matrices.shape[1]
    grid = torch.empty(count, SIDE, SIDE, 2)
    for axis, (across, down, start) in enumerate(torch.from_numpy(matrices).float().view(2, 3, count, 1, 1)):
        torch.add(across * _CENTRES, down * _CENTRES[:, None] + start, out=grid[..., axis])
    emoji = F.grid_sample(picture.expand(count, -1, -1, -1), grid, align_corners=False)
    frames = torch.addcmul(emoji[:, :3], _texture(shown.texture), 1 - emoji[:, 3:])
    return frames.round_().to(torch.uint8).transpose(0, 1)


def _cut_out(drawing: UInt8[Tensor, "3 s s"]) -> Tensor:
    """float32 (4, s, s): colour times opacity, and opacity: 0 for what is white as far as the border."""
    white = (drawing.amin(0) >= _WHITE).numpy()
    outside = np.zeros((_SPRITE + 2, _SPRITE + 2), bool)
    outside[0], outside[-1], outside[:, 0], outside[:, -1] = True, True, True, True
    while True:
        near = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
        grown = white & near
        if (grown <= outside[1:-1, 1:-1]).all():
            break
        outside[1:-1, 1:-1] |= grown
    opacity = torch.from_numpy(~outside[1:-1, 1:-1]).float()[None]
    return torch.cat([drawing.float() * opacity, opacity])


def _texture(seed: int) -> Tensor:
    """float32 (3, h, w): a few waves of random length, direction and colour."""
    rng = np.random.default_rng(seed)
    place = np.arange(SIDE) / SIDE
    colour = rng.uniform(60, 200, 3)[:, None, None]
    for _ in range(_WAVES):
        turn, length, phase = rng.uniform(0, np.pi), rng.uniform(0.15, 0.8), rng.uniform(0, 2 * np.pi)
        across = np.exp(2j * np.pi * place * np.cos(turn) / length)
        down = np.exp(1j * (2 * np.pi * place * np.sin(turn) / length + phase))
        wave = (down[:, None] * across[None, :]).imag  # the sine of the sum, by 2 x 64 functions instead of 64 x 64
        colour = colour + rng.uniform(-30, 30, 3)[:, None, None] * wave
    return torch.from_numpy(colour.clip(0, 255).astype(np.float32))


class DrawnFrames(Frames):
    """The frames of a scene, drawn when they are asked for."""

    def __init__(self, shown: Scene, sheet: UInt8[Tensor, "n 3 s s"]) -> None:
        super().__init__(np.arange(FRAMES) / RATE, FRAMES / RATE, (SIDE, SIDE))
        self.scene, self.sheet = shown, sheet

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels); at most 16 frames are held."""
        numbers = np.unique(np.asarray(wanted, np.int64))
        yield from zip(numbers.tolist(), draw(self.scene, self.sheet, numbers).permute(1, 2, 3, 0).numpy(), strict=True)


class MotionStore(Store):
    """Clips drawn when read: training ones first, then the test ones, which show other drawings."""

    video = True

    def __init__(self, sheet: UInt8[Tensor, "n 3 s s"]) -> None:
        self.sheet = sheet

    def __len__(self) -> int:
        return TRAIN_CLIPS + TEST_CLIPS

    def scene(self, row: int) -> Scene:
        """What a row shows."""
        numbers = np.arange(len(self.sheet))
        tested = numbers % TEST_DRAWINGS == 0
        return scene(row, numbers[tested if row >= TRAIN_CLIPS else ~tested])

    def read(self, row: int) -> Footage:
        """The clip, 16 frames at 16 frames per second; nothing of it is drawn yet."""
        return Footage(DrawnFrames(self.scene(row), self.sheet))

    def key(self, row: int) -> bytes:
        """Made from the row number."""
        return digest(row)


def read_motion(sheet: UInt8[Tensor, "n 3 s s"]) -> Listing:
    """List the clips; `left` and `turn left` change when a clip is mirrored."""
    store = MotionStore(sheet)
    motions = [MOTIONS[row % len(MOTIONS)] for row in range(len(store))]
    return Listing(
        store,
        names=[f"{motion}/{row:05d}" for row, motion in enumerate(motions)],
        labels=[(motion,) for motion in motions],
        splits=["train" if row < TRAIN_CLIPS else "test" for row in range(len(store))],
        classes=MOTIONS,
    )
