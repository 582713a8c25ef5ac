"""Position embeddings of every kind, and their resizing.

Kinds (ViT, appendix D.4): `none`; `1d`, one learned vector per patch in raster order; `2d`, two learned tables (rows, columns)
of half the width, concatenated; `sincos`, fixed sines and cosines of row and column; `relative`, learned offsets that meet the
query inside the attention. All but the last are added to the tokens: once (`stem`), before every block from a table of its
own (`layers`), or before every block from one table (`shared`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Grid = tuple[int, int, int]
KINDS = ("none", "1d", "2d", "sincos", "relative")
PLACES = ("stem", "layers", "shared")
POSITION_STD = {"xavier": 0.5, "normal": 0.02}  # of tables of clips, by the initialisation of the products
VIDEO_KINDS = ("none", "joint", "separate")
RESIZE_RULES = ("bicubic", "bicubic_plain", "bicubic_offset", "bilinear_corners", "nearest", "nearest_sequence")


@dataclass(frozen=True)
class PositionConfig:
    """Which position embedding, where it is added, and by which rule it is resized to another grid.

    `prefix`: whether class and register tokens have positions of their own (the original ViT: yes; big_vision and timm's
    register models: no); `registers`: whether the registers share in that (DINOv2: the class token alone). `resize`: `bicubic`
    (antialiased, ours and timm's), `bicubic_plain` (transformers, DeiT), `bicubic_offset` (DINO and DINOv2: plain, by the
    factor (new + 0.1) / old instead of new / old), `bilinear_corners` (the original JAX code: corners aligned), `nearest`
    (TimeSformer), `nearest_sequence` (TimeSformer's loader, which takes the grid for one line).
    """

    kind: str = "1d"
    place: str = "stem"
    prefix: bool = True
    registers: bool = True
    resize: str = "bicubic"

    def __post_init__(self) -> None:
        """Raise ValueError for a word that does not exist."""
        for name, allowed in (("kind", KINDS), ("place", PLACES), ("resize", RESIZE_RULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"position.{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")


def resize_grid(
    table: Float[Tensor, "n c"], old: tuple[int, ...], new: tuple[int, ...], rule: str = "bicubic"
) -> Float[Tensor, "m c"]:
    """Resample a table of vectors on an (H, W) or (T, H, W) grid to another grid; the same grid returns the table itself.

    In three dimensions time is resampled as by `resize_line`, then each frame by `rule`.
    """
    if tuple(old) == tuple(new):
        return table
    if rule == "nearest_sequence":
        return resize_line(table, math.prod(new), "nearest")
    if len(old) == 2:
        return _resize_frames(table[None], (old[0], old[1]), (new[0], new[1]), rule)[0]
    line = resize_line(table.unflatten(0, (old[0], -1)).flatten(1), new[0], rule)  # t (n c)
    frames = line.unflatten(1, (old[1] * old[2], -1))
    return _resize_frames(frames, (old[1], old[2]), (new[1], new[2]), rule).flatten(0, 1)


def _resize_frames(
    frames: Float[Tensor, "t n c"], old: tuple[int, int], size: tuple[int, int], rule: str
) -> Float[Tensor, "t m c"]:
    if old == size:
        return frames
    dtype = frames.dtype
    work = frames if dtype == torch.float64 else frames.float()
    grid = work.transpose(1, 2).unflatten(2, old)
    if rule == "bicubic" and size[1] == 1:  # where one column is left, the antialiased kernel repeats its first row
        grid = F.interpolate(grid.mT, size[::-1], mode="bicubic", antialias=True).mT
    elif rule == "bicubic":
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
    elif rule == "bicubic_plain":
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
    elif rule == "bicubic_offset":  # a guard against rounding down, which shifts the sampling points by up to 0.1 cells
        factors = ((size[0] + 0.1) / old[0], (size[1] + 0.1) / old[1])
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    elif rule == "bilinear_corners":
        grid = F.interpolate(grid, size, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, size, mode="nearest")
    return grid.flatten(2).transpose(1, 2).to(dtype)


def resize_line(table: Float[Tensor, "n c"], new: int, rule: str = "bicubic") -> Float[Tensor, "m c"]:
    """Resample a one-dimensional table; the same length returns the table itself.

    Linearly, with aligned corners under `bilinear_corners`; to the nearest entry under `nearest`.
    """
    if table.shape[0] == new:
        return table
    line = (table if table.dtype == torch.float64 else table.float()).T[None]
    if rule == "nearest":
        line = F.interpolate(line, new, mode="nearest")
    else:
        line = F.interpolate(line, new, mode="linear", align_corners=rule == "bilinear_corners")
    return line[0].T.to(table.dtype)


def sincos_2d(height: int, width: int, channels: int, temperature: float = 10_000.0) -> Float[Tensor, "n c"]:
    """Fixed 2-D sine-cosine table in MoCo v3's order [sin x, cos x, sin y, cos y], channels / 4 frequencies (big_vision)."""
    if channels % 4:
        raise ValueError(
            f"sine-cosine positions need a width divisible by 4, got {channels}; nearest: {round(channels / 4) * 4}"
        )
    omega = torch.arange(channels // 4, dtype=torch.float64) / max(channels // 4 - 1, 1)
    omega = temperature**-omega
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    waves = [f(axis.flatten()[:, None] * omega) for axis in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, 1).float()


class PositionTable(nn.Module):
    """A table of vectors to add to the tokens, for one grid, resized on the way when the grid differs."""

    waves: Tensor

    def __init__(self, config: PositionConfig, width: int, grid: tuple[int, int], prefix: int):
        super().__init__()
        self.kind, self.grid, self.rule = config.kind, grid, config.resize
        self.prefix = prefix if config.prefix else 0
        std = 0.02
        if self.kind == "1d":
            self.table = nn.Parameter(torch.empty(1, self.prefix + grid[0] * grid[1], width))
            nn.init.trunc_normal_(self.table, std=std)
        elif self.kind == "2d":
            if width % 2:
                raise ValueError(f"two axis tables need an even width, got {width}; nearest: {width + 1}")
            self.rows = nn.Parameter(torch.empty(grid[0], width // 2))
            self.columns = nn.Parameter(torch.empty(grid[1], width // 2))
            nn.init.trunc_normal_(self.rows, std=std)
            nn.init.trunc_normal_(self.columns, std=std)
            if self.prefix:
                self.prefix_table = nn.Parameter(torch.zeros(1, self.prefix, width))
        else:
            self.prefix = 0  # a fixed wave has no place for tokens without a place
            self.register_buffer("waves", sincos_2d(*grid, width)[None], persistent=False)

    def forward(self, grid: tuple[int, int]) -> tuple[Float[Tensor, "1 p c"] | None, Float[Tensor, "1 n c"]]:
        """(table of the prefix tokens or None, table of the patches) for a grid of (rows, columns)."""
        if self.kind == "1d":
            table = self.table[0]
            patches = resize_grid(table[self.prefix :], self.grid, grid, self.rule)
            return (table[None, : self.prefix] if self.prefix else None), patches[None]
        if self.kind == "2d":
            rows, columns = resize_line(self.rows, grid[0]), resize_line(self.columns, grid[1])
            half = rows.shape[1]
            both = [rows[:, None].expand(-1, grid[1], half), columns[None].expand(grid[0], -1, half)]
            return (self.prefix_table if self.prefix else None), torch.cat(both, -1).flatten(0, 1)[None]
        waves = self.waves if grid == self.grid else sincos_2d(*grid, self.waves.shape[-1])[None].to(self.waves)
        return None, waves


class VideoPosition(nn.Module):
    """Learned positions of a clip's tokens, for one grid (T, H, W), resized on the way when the grid differs.

    `joint`: one vector per place and time (ViViT); `separate`: one per place plus one per time, the latter starting at zero
    (TimeSformer) unless a `std` is given, which both are then drawn with. Prefix tokens have vectors of their own and no time.
    """

    def __init__(self, kind: str, width: int, grid: tuple[int, int, int], prefix: int, rule: str, std: float | None = None):
        super().__init__()
        self.kind, self.grid, self.prefix, self.rule = kind, grid, prefix, rule
        places = grid[1] * grid[2]
        self.table = nn.Parameter(torch.empty(1, prefix + (places * grid[0] if kind == "joint" else places), width))
        nn.init.trunc_normal_(self.table, std=0.02 if std is None else std)
        self.time = nn.Parameter(torch.zeros(1, grid[0], width)) if kind == "separate" else None
        if self.time is not None and std is not None:
            nn.init.trunc_normal_(self.time, std=std)

    def forward(self, grid: tuple[int, int, int]) -> Float[Tensor, "1 n c"]:
        """The vectors of the prefix tokens and of the tokens of a grid, frame by frame."""
        if grid == self.grid and self.time is None:
            return self.table
        table = self.resized(self.table, self.grid, grid)
        if self.time is None:
            return table
        time = self.resized_time(self.time, self.grid, grid)
        patches = table[:, None, self.prefix :] + time[:, :, None]  # 1 t n c
        return torch.cat([table[:, : self.prefix], patches.flatten(1, 2)], 1)

    def resized(self, table: Float[Tensor, "1 n c"], old: tuple[int, ...], new: tuple[int, ...]) -> Float[Tensor, "1 m c"]:
        """A table made for the grid `old` as it serves the grid `new`; only places count where time is separate."""
        if self.kind == "separate":
            old, new = old[1:], new[1:]
        if tuple(old) == tuple(new):
            return table
        patches = resize_grid(table[0, self.prefix :], old, new, self.rule)
        return torch.cat([table[:, : self.prefix], patches[None]], 1)

    def resized_time(self, time: Float[Tensor, "1 t c"], old: tuple[int, ...], new: tuple[int, ...]) -> Float[Tensor, "1 s c"]:
        """The table of times made for the grid `old` as it serves the grid `new`."""
        return resize_line(time[0], new[0], self.rule)[None]


def relative_index(queries: int, keys: int | None = None) -> Tensor:
    """Index (queries, keys) into a table of offsets query - key, shifted to start at 0.

    Where one side is coarser, its steps count as many of the finer side's (MViT v2, arXiv 2112.01526, section 4.1), rounded
    down; the table has 2 * max(queries, keys) - 1 rows.
    """
    keys = queries if keys is None else keys
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if queries >= keys:
        return i + (keys - 1 - j) * queries // keys
    return i * keys // queries + keys - 1 - j


class RelativePosition(nn.Module):
    """Relative attention: the query meets a learned vector per offset, the products bias the logits (ViT, appendix D.4).

    The ViT paper counts offsets in raster order; here rows, columns and, with `time`, frames have a table each, whose
    products add up (MViT v2, section 4.1), because raster offsets make patches at opposite edges neighbours. Queries and keys
    may lie on grids (T, H, W) of different coarseness. Prefix tokens get no bias. `scaled`: the products are scaled like the
    logits (MViT v2: they are not).
    """

    def __init__(self, head_dim: int, queries: Grid, keys: Grid, prefix: int, *, time: bool = False, scaled: bool = True):
        super().__init__()
        self.prefix, self.scaled = prefix, scaled
        lengths = [2 * max(q, k) - 1 for q, k in zip(queries, keys, strict=True)]
        self.frames = nn.Parameter(torch.empty(lengths[0], head_dim)) if time else None
        self.rows = nn.Parameter(torch.empty(lengths[1], head_dim))
        self.columns = nn.Parameter(torch.empty(lengths[2], head_dim))
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, q: Float[Tensor, "b k n d"], queries: Grid, keys: Grid | None = None) -> Float[Tensor, "b k n m"]:
        """The bias of the scaled logits for queries on one grid and keys on another (by default the same)."""
        keys = queries if keys is None else keys
        patches = q[:, :, self.prefix :].unflatten(2, queries)  # b k t h w d
        if self.scaled:
            patches = patches * q.shape[-1] ** -0.5
        by_row = torch.einsum("bkthwd,hyd->bkthwy", patches, _offsets(self.rows, queries[1], keys[1]).to(q.dtype))
        by_column = torch.einsum("bkthwd,wxd->bkthwx", patches, _offsets(self.columns, queries[2], keys[2]).to(q.dtype))
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(5)  # b k t h w (y x)
        if self.frames is not None:
            vectors = _offsets(self.frames, queries[0], keys[0]).to(q.dtype)
            by_frame = torch.einsum("bkthwd,tsd->bkthws", patches, vectors)
            bias = (by_frame[..., :, None] + bias[..., None, :]).flatten(5)  # b k t h w (s y x)
        elif keys[0] > 1:
            bias = bias.repeat(1, 1, 1, 1, 1, keys[0])
        bias = bias.flatten(2, 4)
        return F.pad(bias, (self.prefix, 0, self.prefix, 0)) if self.prefix else bias

    def refit(self, name: str, found: Tensor) -> Tensor:
        """A table of a model built for another size, resampled to this one's."""
        return resize_line(found, getattr(self, name).shape[0])


def _offsets(table: Tensor, queries: int, keys: int) -> Tensor:
    """The vector of every pair, (queries, keys, d)."""
    return resize_line(table, 2 * max(queries, keys) - 1)[relative_index(queries, keys).to(table.device)]


class ClipPosition(nn.Module):
    """Learned tables to add to the tokens of a clip (MViT, arXiv 2104.11227, section 4.1).

    `separable`: one vector per place of a frame plus one per frame, prefix tokens with their own; `joint`: one vector per
    token. Resized on the way when the grid (T, H, W) differs from the built one: places by `rule`, frames linearly.
    """

    def __init__(self, kind: str, width: int, grid: Grid, prefix: int, rule: str = "bicubic", std: float = 0.02):
        super().__init__()
        self.grid, self.prefix, self.rule = grid, prefix, rule
        t, h, w = grid
        self.joint = kind == "joint"
        if self.joint:
            self.table = nn.Parameter(torch.empty(1, prefix + t * h * w, width))
        else:
            self.places = nn.Parameter(torch.empty(1, h * w, width))
            self.frames = nn.Parameter(torch.empty(1, t, width))
            self.prefix_table = nn.Parameter(torch.empty(1, prefix, width)) if prefix else None
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=std)

    def forward(self, grid: Grid) -> Float[Tensor, "1 n c"]:
        """The table of all tokens, the prefix first."""
        if self.joint:
            patches = resize_grid(self.table[0, self.prefix :], self.grid, grid, self.rule)[None]
            return torch.cat([self.table[:, : self.prefix], patches], 1) if self.prefix else patches
        places = resize_grid(self.places[0], self.grid[1:], grid[1:], self.rule)
        patches = (resize_line(self.frames[0], grid[0])[:, None] + places).flatten(0, 1)[None]
        return patches if self.prefix_table is None else torch.cat([self.prefix_table, patches], 1)

    def refit(self, name: str, found: Tensor) -> Tensor | None:
        """A table of a model built for another size, resampled to this one's; None where its grid cannot be told.

        Pictures are taken to have been square, and a joint table to have been made for as many frames.
        """
        t, h, w = self.grid
        if name == "frames":
            return resize_line(found[0], t)[None]
        prefix = self.prefix if name == "table" else 0
        frames = t if name == "table" else 1
        side = math.isqrt((found.shape[1] - prefix) // frames)
        if name == "prefix_table" or prefix + frames * side * side != found.shape[1]:
            return None
        old, new = ((t, side, side), (t, h, w)) if name == "table" else ((side, side), (h, w))
        return torch.cat([found[:, :prefix], resize_grid(found[0, prefix:], old, new, self.rule)[None]], 1)


def grid_side(count: int) -> int:
    """Side of a square grid of `count` patches; raises ValueError when it is not a square."""
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} positions do not form a square grid; nearest squares: {side * side}, {(side + 1) ** 2}")
    return side
