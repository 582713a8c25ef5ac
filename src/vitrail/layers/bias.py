"""Relative position biases of windows: learned tables, continuous ones, and tables resized to other windows."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .position import relative_index

BIAS_RULES = ("bicubic_corners", "bicubic_plain", "geometric")


def window_offsets(window: tuple[int, int]) -> Tensor:
    """Index (n * n) into the table of 2-D offsets query - key of a window's tokens in raster order, row offset first."""
    rows, columns = relative_index(window[0]), relative_index(window[1])
    both = rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None]  # rows columns rows columns
    return both.flatten()


class RelativeBias(nn.Module):
    """A learned bias per head and 2-D offset inside a window (Swin, equation 4)."""

    offsets: Tensor

    def __init__(self, window: tuple[int, int], heads: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("offsets", window_offsets(window), persistent=False)

    def forward(self) -> Float[Tensor, "k n n"]:
        """The bias of all pairs of a window's n tokens, queries first."""
        n = self.window[0] * self.window[1]
        return F.embedding(self.offsets, self.table).view(n, n, -1).permute(2, 0, 1).contiguous()


class ContinuousBias(nn.Module):
    """A bias per head as a function of the offset on a logarithmic scale, at most 16 (Swin v2, section 3.3).

    Offsets are measured in units of the window that the weights were trained with (`pretrained`, by default the window), so
    that another window needs no resizing.
    """

    offsets: Tensor
    coordinates: Tensor

    def __init__(self, window: tuple[int, int], heads: int, pretrained: tuple[int, int] | None = None, hidden: int = 512):
        super().__init__()
        self.window = window
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads, bias=False)
        self.register_buffer("offsets", window_offsets(window), persistent=False)
        self.register_buffer("coordinates", log_offsets(window, pretrained or window), persistent=False)

    def forward(self) -> Float[Tensor, "k n n"]:
        """The bias of all pairs of a window's n tokens, queries first; computed in the weights' precision also in autocast."""
        n = self.window[0] * self.window[1]
        device = self.coordinates.device.type
        known = torch.amp.is_autocast_available(device)  # not on "meta", where FLOPs are counted
        with torch.autocast(device, enabled=False) if known else nullcontext():
            table = 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(self.coordinates.to(self.fc1.weight.dtype)))))
        return F.embedding(self.offsets, table).view(n, n, -1).permute(2, 0, 1).contiguous()


def log_offsets(window: tuple[int, int], unit: tuple[int, int]) -> Float[Tensor, "m 2"]:
    """All offsets of a window, sign(r) log2(1 + 8 |r|) / 3 with r = offset / (unit - 1), in the order of `window_offsets`."""
    sides = [torch.arange(1 - a, a, dtype=torch.float32) / max(u - 1, 1) for a, u in zip(window, unit, strict=True)]
    r = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 1)
    return r.sign() * (1 + 8 * r.abs()).log2() / 3


def resize_bias(
    table: Float[Tensor, "n k"], old: tuple[int, int], new: tuple[int, int], rule: str = "bicubic_corners"
) -> Float[Tensor, "m k"]:
    """A table of 2-D offsets for another window; the same window returns the table itself.

    Rules: `bicubic_corners` (ours: the outermost offsets stay outermost), `bicubic_plain` (the original's loader),
    `geometric` (timm's, after BEiT: the old offsets are spread over the new ones in a geometric progression, dense near 0).
    """
    if old == new:
        return table
    sizes = [(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True)]
    grid = table.float().T.reshape(1, -1, sizes[0][0], sizes[1][0])
    if rule == "geometric":
        rows, columns = (_geometric_weights(*size) for size in sizes)
        grid = torch.einsum("yi,bkij,xj->bkyx", rows, grid.double(), columns).float()
    else:
        corners = rule == "bicubic_corners"
        grid = F.interpolate(grid, (sizes[0][1], sizes[1][1]), mode="bicubic", align_corners=corners)
    return grid.flatten(2)[0].T.contiguous().to(table.dtype)


def _geometric_weights(old: int, new: int) -> Float[Tensor, "new old"]:
    """Linear interpolation from `old` offsets, placed at 0, 1, 1 + q, 1 + q + q^2, ... and their negatives, to `new` ones.

    q is such that the outermost ones meet, between 1.01 and 1.5, found by halving down to 1e-6 as timm does.
    """
    count, low, high, ratio = old // 2, 1.01, 1.5, 1.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**count) / (1 - ratio) > new // 2 else (ratio, high)
    steps = torch.tensor([ratio**i for i in range(count)], dtype=torch.float64).cumsum(0)
    places = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    wanted = torch.arange(new, dtype=torch.float64) - new // 2
    right = torch.searchsorted(places, wanted).clamp(1, old - 1) if old > 1 else torch.zeros(new, dtype=torch.long)
    left = (right - 1).clamp(0)
    share = ((wanted - places[left]) / (places[right] - places[left]).clamp_min(1e-12)).clamp(0, 1)
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_add_(1, left[:, None], (1 - share)[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])
