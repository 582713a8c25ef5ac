"""Pooling of tokens that lie on a grid, of pictures and of clips (MViT, arXiv 2104.11227, section 3.1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .conv import depthwise3d
from .position import Grid

Steps = tuple[int, ...]  # a kernel or a stride: (time, height, width) of clips, (height, width) of pictures


def shrink(grid: Grid, kernel: Steps, stride: Steps) -> Grid:
    """The grid after a window of odd or even `kernel`, padded by half of it; pictures keep their single frame."""
    full_kernel, full_stride = ((1,) * (3 - len(steps)) + steps for steps in (kernel, stride))
    t, h, w = ((n + k // 2 * 2 - k) // s + 1 for n, k, s in zip(grid, full_kernel, full_stride, strict=True))
    return t, h, w


def to_maps(tokens: Float[Tensor, "b n c"], grid: Grid, axes: int) -> Tensor:
    """Tokens as maps (b, c, [t,] h, w), a view: channels stay innermost in memory, where convolutions run fastest."""
    return tokens.unflatten(1, grid[3 - axes :]).movedim(-1, 1)


def to_tokens(maps: Tensor) -> Float[Tensor, "b n c"]:
    """The inverse of `to_maps`."""
    return maps.movedim(1, -1).flatten(1, -2)


class Pool(nn.Module):
    """Pooling attention's pool (v1, section 3.1): the same window for every head, then, after a convolution, a norm per head.

    Prefix tokens are not pooled, but normalised with the others.
    """

    def __init__(self, mode: str, head_dim: int, kernel: Steps, stride: Steps, eps: float):
        super().__init__()
        self.mode, self.kernel, self.stride = mode, kernel, stride
        self.padding = tuple(k // 2 for k in kernel)
        self.weight = nn.Parameter(torch.empty(head_dim, 1, *kernel)) if mode == "conv" else None
        self.norm = nn.LayerNorm(head_dim, eps) if mode == "conv" else nn.Identity()
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid, heads: int, prefix: int) -> Float[Tensor, "b m k d"]:
        """Tokens of the coarser grid, split into heads."""
        maps = to_maps(x[:, prefix:] if prefix else x, grid, len(self.kernel))
        if self.weight is None:
            maps = slide(self.mode, maps, self.kernel, self.stride, self.padding)
        else:
            # Heads are channels here: one depthwise convolution with every head's copy of the kernel, nothing is moved.
            weight = self.weight.repeat(heads, *[1] * (self.weight.ndim - 1))
            if maps.ndim == 5:
                maps = depthwise3d(maps, weight, None, self.stride, self.padding)  # type: ignore[arg-type]
            else:
                maps = F.conv2d(maps, weight, None, self.stride, self.padding, 1, x.shape[2])
        pooled = to_tokens(maps)
        if prefix:
            pooled = torch.cat([x[:, :prefix], pooled], 1)
        return self.norm(pooled.unflatten(2, (heads, -1)))


def slide(mode: str, maps: Tensor, kernel: Steps, stride: Steps, padding: Steps) -> Tensor:
    """Maximum or mean over a sliding window; zeros of the border count in a mean (as in the source)."""
    if maps.ndim == 4:
        return F.max_pool2d(maps, kernel, stride, padding) if mode == "max" else F.avg_pool2d(maps, kernel, stride, padding)
    return F.max_pool3d(maps, kernel, stride, padding) if mode == "max" else F.avg_pool3d(maps, kernel, stride, padding)
