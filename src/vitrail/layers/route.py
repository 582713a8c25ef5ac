"""Where the tokens of an attention site lie in the input, and how tokens become other tokens on the way to the classifier.

A model describes itself by a `Route`; whatever looks at recorded attention reads it, so windows, strides, pooling and folded
axes are known in one place per family and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .position import Grid

Place = tuple[float, float, float]  # frame, pixel row, pixel column; pixel i spans from i to i + 1
MEAN, CLASS = "the mean over all patches", "the class token"


class Cells(NamedTuple):
    """A set of tokens: `prefix` without a place, then a grid (T, H, W) with centres `step` apart, the first at `origin`."""

    grid: Grid
    origin: Place
    step: Place
    prefix: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, prefix included."""
        return self.prefix + math.prod(self.grid)

    def centres(self) -> Float[Tensor, "n 3"]:
        """Frame, pixel row and pixel column of every token's centre; not a number for the prefix."""
        axes = [o + s * torch.arange(n, dtype=torch.float32) for n, o, s in zip(self.grid, self.origin, self.step, strict=True)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
        return torch.cat([torch.full((self.prefix, 3), math.nan), places])

    def nearest(self, axis: int, count: int) -> Int64[Tensor, " n"]:
        """The index along an axis (0 time, 1 rows, 2 columns) of the cell that each of `count` frames or pixels belongs to."""
        places = (torch.arange(count) + 0.5 - self.origin[axis]) / self.step[axis]
        # Halves up, so that a pixel on the border of two cells always goes the same way.
        return (places + 0.5).floor().long().clamp(0, self.grid[axis] - 1)


def tile(grid: Grid, size: Sequence[int], prefix: int = 0) -> Cells:
    """Cells that divide an input of (height, width) or (frames, height, width) evenly."""
    sides = (1, *size)[-3:]
    step = tuple(side / n for side, n in zip(sides, grid, strict=True))
    return Cells(grid, tuple(s / 2 for s in step), step, prefix)  # type: ignore[arg-type]


class Links(NamedTuple):
    """What tokens are made of: token later[i] takes the share share[i] from token earlier[i]; counts are (later, earlier).

    The shares of a token add up to 1, or to 0 for a learned token that comes from no other.
    """

    later: Int64[Tensor, " m"]
    earlier: Int64[Tensor, " m"]
    share: Float[Tensor, " m"]
    counts: tuple[int, int]

    def pull(self, rows: Float[Tensor, "b r n"]) -> Float[Tensor, "b r m"]:
        """Weights over the later tokens as weights over the earlier ones."""
        later, earlier, share = (part.to(rows.device) for part in self[:3])
        pulled = rows.new_zeros(*rows.shape[:2], self.counts[1])
        return pulled.index_add_(2, earlier, rows[:, :, later] * share)


def same(count: int) -> Links:
    """Every token stays itself."""
    each = torch.arange(count)
    return Links(each, each, torch.ones(count), (count, count))


class Site(NamedTuple):
    """Where the map recorded at an attention site lies.

    For b inputs it is (b * g, heads, n, m), all g groups of the first input first: in group g row i asks for token
    queries[g, i] of `asking`, and column j is token keys[g, j] of `cells`; -1 is padding. `links` says what the keys are
    made of where they are no tokens of the layer before but pooled from them. `apart`: pairs of a group that never meet.
    """

    name: str
    queries: Int64[Tensor, "g n"]
    keys: Int64[Tensor, "g m"]
    asking: Cells
    cells: Cells
    links: Links | None = None
    apart: Bool[Tensor, "g n m"] | None = None


class Step(NamedTuple):
    """From one set of tokens to the next, `after`: by attention at the sites (side by side), or without one by links alone.

    `shortcut` is how tokens go on past the attention (the residual connection); None where there is no such way. A token that
    asks at no site goes on as it is.
    """

    after: Cells
    sites: tuple[Site, ...]
    shortcut: Links | None


class Route(NamedTuple):
    """How a model attends, first step first, on an input of one size.

    `first` are the tokens that steps[0] starts from. `readout`: {what the classifier reads, in words: weights (n) over the last
    tokens}, the main one first; empty where other layers lie between the sites, so that they cannot be joined.
    """

    first: Cells
    steps: tuple[Step, ...] = ()
    readout: dict[str, Float[Tensor, " n"]] = {}  # noqa: RUF012  # never changed

    @property
    def sites(self) -> dict[str, Site]:
        """All sites by name."""
        return {site.name: site for step in self.steps for site in step.sites}

    def below(self, parent: str) -> Route:
        """The same route in a model that holds this one as its child `parent`."""
        steps = [
            step._replace(sites=tuple(site._replace(name=f"{parent}.{site.name}") for site in step.sites))
            for step in self.steps
        ]
        return self._replace(steps=tuple(steps))


def whole(name: str, cells: Cells) -> Step:
    """All tokens attend to all tokens."""
    everyone = torch.arange(cells.tokens)[None]
    return Step(cells, (Site(name, everyone, everyone, cells, cells),), same(cells.tokens))


def within(name: str, groups: Int64[Tensor, "g n"], cells: Cells, apart: Bool[Tensor, "g n n"] | None = None) -> Step:
    """The tokens of each group attend to each other, but for pairs that are `apart`."""
    return Step(cells, (Site(name, groups, groups, cells, cells, apart=apart),), same(cells.tokens))


def asked_by(cells: Cells, pool: str = "mean") -> dict[str, Float[Tensor, " n"]]:
    """The readout of a classifier that reads the first token (pool "cls"), the mean of the patches, or both ("cls_mean")."""
    patches = torch.zeros(cells.tokens)
    patches[cells.prefix :] = 1 / (cells.tokens - cells.prefix)
    token = torch.zeros(cells.tokens)
    token[0] = 1
    found = {CLASS: token} if pool.startswith("cls") else {}
    return found | ({MEAN: patches} if pool.endswith("mean") else {})


def coarser(
    cells: Cells, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], whole_last: bool = False
) -> Cells:
    """The cells after a window slides over these; `whole_last`: grids round up, the last window may leave the map.

    Kernel, stride and padding have two numbers (rows, columns) or three (frames first).
    """
    k, s, p = _three(kernel, 1), _three(stride, 1), _three(padding, 0)
    up = [step - 1 if whole_last else 0 for step in s]
    grid = tuple((n + 2 * p[a] - k[a] + up[a]) // s[a] + 1 for a, n in enumerate(cells.grid))
    origin = tuple(o + cells.step[a] * ((k[a] - 1) / 2 - p[a]) for a, o in enumerate(cells.origin))
    step = tuple(d * s[a] for a, d in enumerate(cells.step))
    return Cells(grid, origin, step, cells.prefix)  # type: ignore[arg-type]


def pooled(before: Cells, after: Cells, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Links:
    """What the cells after a sliding window are made of: its tokens in equal shares, those outside the map left out.

    Prefix tokens stay themselves where both sets have as many; otherwise they come from nothing.
    """
    k, s, p = _three(kernel, 1), _three(stride, 1), _three(padding, 0)
    axes = [_windows(before.grid[a], after.grid[a], k[a], s[a], p[a]) for a in range(3)]
    later, earlier, share = axes[0]
    for a, (i, j, w) in enumerate(axes[1:], 1):
        later = (later[:, None] * after.grid[a] + i).flatten()
        earlier = (earlier[:, None] * before.grid[a] + j).flatten()
        share = (share[:, None] * w).flatten()
    kept = torch.arange(after.prefix if after.prefix == before.prefix else 0)
    return Links(
        torch.cat([kept, later + after.prefix]), torch.cat([kept, earlier + before.prefix]),
        torch.cat([torch.ones(len(kept)), share]), (after.tokens, before.tokens),
    )  # fmt: skip


def _three(steps: Sequence[int], first: int) -> tuple[int, ...]:
    return (*(first,) * (3 - len(steps)), *steps)


def _windows(before: int, after: int, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: (later, earlier, share) of every pair of a window and a cell in it."""
    inside = torch.arange(after)[:, None] * stride - padding + torch.arange(kernel)
    valid = (inside >= 0) & (inside < before)
    later, place = valid.nonzero(as_tuple=True)
    return later, inside[later, place], 1 / valid.sum(1)[later]
