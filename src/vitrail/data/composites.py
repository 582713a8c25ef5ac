"""Pictures with a class for every pixel, made on demand: embedded emoji pasted on textures that code draws."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from vitrail.config import DataConfig, unknown
from vitrail.data.embedded import read_embedded

LABELS = ("object", "category")
_WHITE = 224  # cells are drawn on white and stored with loss: from here on a channel counts as white


class Composites(Dataset[tuple[UInt8[Tensor, "c h w"], Int[Tensor, "h w"]]]):
    """`count` pictures (3, h, w) of one to three emoji on a texture, with the class of every pixel (h, w); 0 is the texture.

    Picture i is a pure function of (seed, i). labels: "object" (1 for any emoji) or "category" (1 to 8, see `classes`).
    designers: whose emoji are drawn, all by default. Raises ConfigError for labels or designers that do not exist.
    """

    def __init__(
        self,
        count: int,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        labels: str = "object",
        designers: tuple[str, ...] = (),
    ):
        if labels not in LABELS:
            raise unknown("labels", labels, LABELS)
        listing = read_embedded("emoji", DataConfig())
        drawn_by = [name.split("/")[0] for name in listing.names]
        for designer in designers:
            if designer not in drawn_by:
                raise unknown("emoji designer", designer, sorted(set(drawn_by)))
        self.rows = [i for i, who in enumerate(drawn_by) if not designers or who in designers]
        self.count, self.size, self.seed, self.labels = count, size, seed, labels
        self.store, self.names = listing.store, [(names or ("",))[0] for names in listing.labels]
        self.classes = ("texture", "object") if labels == "object" else ("texture", *sorted(set(self.names)))

    def __len__(self) -> int:
        """As many as asked for."""
        return self.count

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], Int[Tensor, "h w"]]:
        """The picture and the class of its pixels. Raises IndexError beyond the end."""
        if not 0 <= index < self.count:
            raise IndexError(f"picture {index} of {self.count}")
        rng = np.random.default_rng([self.seed, index])
        picture, truth = texture(rng, self.size), torch.zeros(self.size, dtype=torch.long)
        for _ in range(rng.integers(1, 4)):
            row = self.rows[rng.integers(len(self.rows))]
            label = 1 if self.labels == "object" else self.classes.index(self.names[row])
            self._paste(rng, picture, truth, row, label)
        return (picture * 255).round().to(torch.uint8), truth

    def _paste(self, rng: np.random.Generator, picture: Tensor, truth: Tensor, row: int, label: int) -> None:
        """Put an emoji of random size, wholly inside, over what is there."""
        cell = self.store.read(row)
        assert isinstance(cell, Tensor)
        side = round(min(self.size) * rng.uniform(0.3, 0.7))
        both = torch.cat([cell / 255, figure(cell)[None].float()])[None]
        both = F.interpolate(both, (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)
        top, left = (int(rng.integers(0, whole - side + 1)) for whole in self.size)
        alpha, place = both[3], (slice(top, top + side), slice(left, left + side))
        picture[(slice(None), *place)] = alpha * both[:3] + (1 - alpha) * picture[(slice(None), *place)]
        truth[place] = torch.where(alpha > 0.5, label, truth[place])


def figure(cell: UInt8[Tensor, "3 h w"]) -> Bool[Tensor, "h w"]:
    """What is drawn on a white cell: everything but the white that is connected to the border."""
    white = (cell >= _WHITE).all(0)
    reached = torch.zeros_like(white)
    for edge in (reached[0], reached[-1], reached[:, 0], reached[:, -1]):
        edge.fill_(True)
    reached &= white
    while True:
        grown = F.max_pool2d(reached[None].float(), 3, 1, 1)[0].bool() & white
        if torch.equal(grown, reached):
            return ~reached
        reached = grown


def texture(rng: np.random.Generator, size: tuple[int, int]) -> Float[Tensor, "3 h w"]:
    """Clouds between two colours, crossed by stripes of random direction, width and strength."""
    h, w = size
    cells = int(rng.integers(2, 9))
    noise = torch.from_numpy(rng.random((1, 1, cells, cells), dtype=np.float32))
    clouds = F.interpolate(noise, size, mode="bicubic", align_corners=False)[0, 0]
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 16)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    stripes = torch.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period))
    mixed = (clouds + rng.uniform(0, 0.4) * stripes).float().clamp(0, 1)
    low, high = torch.from_numpy(rng.random((2, 3, 1, 1), dtype=np.float32))
    return low + (high - low) * mixed
