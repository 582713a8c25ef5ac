"""Groups of a clip's tokens that attend to each other: along one axis, within a block, or over a coarse lattice."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Grid = tuple[int, int, int]

SCHEMES = ("time", "space", "width", "height", "local", "sparse")


def groups_per_axis(grid: Grid, scheme: str) -> Grid:
    """Into how many groups a scheme cuts each axis (T, H, W).

    time, space, width, height: all tokens along that axis (space: of one frame). local: the clip in 2 x 2 blocks of
    T x H/2 x W/2 neighbours; sparse: every second token along each of the three axes (TimeSformer's sparse local-global
    scheme, arXiv 2102.05095, section 3).
    """
    t, h, w = grid
    table = {
        "time": (1, h, w), "space": (t, 1, 1), "width": (t, h, 1), "height": (t, 1, w), "local": (1, 2, 2), "sparse": (2, 2, 2),
    }  # fmt: skip
    return table[scheme]


def _layout(grid: Grid, scheme: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes (six: two per axis) to see the grid in, and the order that puts the three group axes first."""
    groups = groups_per_axis(grid, scheme)
    pairs = [(g, n // g) for n, g in zip(grid, groups, strict=True)]
    if scheme == "sparse":  # neighbours belong to different groups
        return tuple(size for g, m in pairs for size in (m, g)), (2, 4, 6, 1, 3, 5)
    return tuple(size for pair in pairs for size in pair), (1, 3, 5, 2, 4, 6)


def fold(x: Float[Tensor, "b n c"], grid: Grid, scheme: str) -> Float[Tensor, "g m c"]:
    """Tokens (b, T*H*W, c) as (b * groups, tokens of a group, c); a view where memory allows."""
    sizes, order = _layout(grid, scheme)
    groups = math.prod(groups_per_axis(grid, scheme))
    b, n, c = x.shape
    return x.reshape(b, *sizes, c).permute(0, *order, 7).reshape(b * groups, n // groups, c)


def fold_rows(grid: Grid, scheme: str) -> Int64[Tensor, "g m"]:
    """The numbers of the tokens of each group, as `fold` orders them."""
    return fold(torch.arange(math.prod(grid), dtype=torch.float64)[None, :, None], grid, scheme)[..., 0].long()


def unfold(x: Float[Tensor, "g m c"], grid: Grid, scheme: str) -> Float[Tensor, "b n c"]:
    """The inverse of `fold`."""
    sizes, order = _layout(grid, scheme)
    back = [order.index(axis) + 1 for axis in range(1, 7)]
    n, c = math.prod(grid), x.shape[-1]
    b = x.shape[0] * x.shape[1] // n
    return x.reshape(b, *(sizes[axis - 1] for axis in order), c).permute(0, *back, 7).reshape(b, n, c)
