"""Multiscale Vision Transformers v1 (Fan et al., arXiv 2104.11227) and v2 (Li et al., arXiv 2112.01526), pictures and clips.

Keys and values are pooled in every block, queries where a scale stage begins, so that the grid of tokens coarsens while the
channels grow.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.attention import AttentionSite, attend
from vitrail.layers.block import INITS, MLP, DropPath, init_encoder
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead
from vitrail.layers.pool import Pool, Steps, shrink, slide, to_maps, to_tokens
from vitrail.layers.position import POSITION_STD, ClipPosition, Grid, RelativePosition
from vitrail.layers.route import Route, Site, Step, asked_by, coarser, pooled, same, tile

from .base import Model, drop_path_rates

CHOICES = {
    "pool_mode": ("conv", "max", "avg"),
    "grow": ("attention", "mlp"),
    "position": ("none", "separable", "joint"),
    "pool": ("cls", "mean"),
    "init": INITS,
}


@dataclass(frozen=True)
class MViTConfig:
    """Everything that decides the function of an MViT. Kernels and strides have two numbers for pictures, three for clips."""

    image_size: tuple[int, int] = (224, 224)
    frames: int | None = None  # of a clip; None: pictures
    in_channels: int = 3
    num_classes: int = 1000
    depths: tuple[int, ...] = (1, 2, 11, 2)  # blocks of every scale stage
    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratio: float = 4.0
    patch_kernel: Steps = (7, 7)
    patch_stride: Steps = (4, 4)
    query_strides: tuple[Steps, ...] = ((1, 1), (2, 2), (2, 2), (2, 2))  # of the first block of every stage
    key_strides: tuple[Steps, ...] = ((4, 4), (2, 2), (1, 1), (1, 1))  # of all its blocks, for keys and values
    pool_kernel: Steps | None = (3, 3)  # None: the stride + 1 where the stride is above 1
    pool_mode: str = "conv"  # conv, max, avg
    pool_queries: bool = True  # v2 pools queries in every block, v1 only where their stride is above 1
    grow: str = "attention"  # v2: the first block of a stage widens in its attention; v1 "mlp": the last of the one before
    class_token: bool = False
    pool: str = "mean"  # cls, mean
    position: str = "none"  # none, separable, joint: tables added to the tokens (v1)
    relative: bool = True  # decomposed relative positions (v2)
    residual_pool: bool = True  # the pooled query is added to what it gathered (v2)
    residual_class: bool = False  # that of the class token too: timm; torchvision and PySlowFast leave it out
    norm_eps: float = 1e-6
    pool_norm_eps: float = 1e-6  # of the norms after pooling: pytorchvideo 1e-5
    init: str = "normal"  # 0.02, as published; xavier (positions 0.5): for narrow models from scratch
    qkv_bias: bool = True
    drop_path: float = 0.0  # published: 0.2 (v1-B, v2-S video), 0.3 (24 blocks), 0.1 (pictures; B 0.3)
    dropout: float = 0.0  # before the classifier; published: 0.5 for clips

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        stages = len(self.depths)
        for name in ("widths", "heads", "query_strides", "key_strides"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; depths names {stages} stages")
        axes = 2 if self.frames is None else 3
        kernels = () if self.pool_kernel is None else (self.pool_kernel,)
        for steps in (self.patch_kernel, self.patch_stride, *kernels, *self.query_strides, *self.key_strides):
            if len(steps) != axes:
                what = "pictures (frames is None) two" if axes == 2 else "clips three"
                raise ValueError(f"{steps} has {len(steps)} numbers; kernels and strides of {what}")
        for stride in {step for steps in self.query_strides for step in steps}:
            if stride > 1 and stride % 2:
                near = f"{stride - 1}, {stride + 1}"
                raise ValueError(f"query stride {stride} would give the shortcut another grid; nearest: {near}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} is not divisible by heads {heads}; nearest valid: {math.gcd(width, heads)}")
        if self.pool == "cls" and not self.class_token:
            raise ValueError("pool is 'cls' but class_token is off; allowed without a class token: mean")

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token)

    def grid(self, frames: int | None = None, image_size: tuple[int, int] | None = None) -> Grid:
        """Tokens (T, H, W) after the patch embedding, by default of the built size."""
        sides = (*(() if self.frames is None else (frames or self.frames,)), *(image_size or self.image_size))
        return shrink((1, *sides)[-3:], self.patch_kernel, self.patch_stride)


@dataclass(frozen=True)
class BlockShape:
    """What differs between the blocks of one model, derived from its config by `block_shapes`."""

    cin: int
    inner: int  # width of the attention and of the input of the MLP
    cout: int
    heads: int
    query_kernel: Steps | None  # None: queries are not pooled
    query_stride: Steps
    key_kernel: Steps | None  # None: keys and values are not pooled
    key_stride: Steps
    queries: Grid  # of the built size
    keys: Grid

    @property
    def strided(self) -> bool:
        """Whether a new scale begins here."""
        return max(self.query_stride) > 1


def block_shapes(config: MViTConfig, grid: Grid | None = None) -> list[BlockShape]:
    """Every block's widths, pools and grids, for an input whose patches lie on `grid` (by default of the built size)."""
    c, shapes = config, []
    grid = grid or c.grid()
    cin = c.widths[0]
    for stage, depth in enumerate(c.depths):
        for i in range(depth):
            stride = c.query_strides[stage] if i == 0 else (1,) * len(c.query_strides[stage])
            last = i == depth - 1 and stage + 1 < len(c.depths)
            inner = c.widths[stage] if c.grow == "attention" else cin
            cout = c.widths[stage + 1] if c.grow == "mlp" and last else inner
            query_kernel = _kernel(c, stride) if c.pool_queries or max(stride) > 1 else None
            key_kernel = _kernel(c, c.key_strides[stage])
            queries = grid if query_kernel is None else shrink(grid, query_kernel, stride)
            keys = grid if key_kernel is None else shrink(grid, key_kernel, c.key_strides[stage])
            shapes.append(BlockShape(cin, inner, cout, c.heads[stage], query_kernel, stride, key_kernel,
                                     c.key_strides[stage], queries, keys))  # fmt: skip
            grid, cin = queries, cout
    return shapes


def _half(kernel: Steps) -> Steps:
    return tuple(k // 2 for k in kernel)


def _kernel(config: MViTConfig, stride: Steps) -> Steps | None:
    """The kernel that belongs to a stride; None where nothing would be pooled."""
    kernel = tuple(s + 1 if s > 1 else 1 for s in stride) if config.pool_kernel is None else config.pool_kernel
    return None if max(kernel) == max(stride) == 1 else kernel


class PoolingAttention(nn.Module):
    """Multi-head attention between pooled queries and pooled keys and values; rows of `qkv` as in the plain attention."""

    def __init__(self, config: MViTConfig, shape: BlockShape):
        super().__init__()
        c, s = config, shape
        self.heads, self.prefix, self.residual, self.whole = s.heads, c.prefix, c.residual_pool, c.residual_class
        head_dim = s.inner // s.heads
        self.qkv = nn.Linear(s.cin, 3 * s.inner, bias=c.qkv_bias)
        made = [(s.query_kernel, s.query_stride), (s.key_kernel, s.key_stride), (s.key_kernel, s.key_stride)]
        self.pool_q, self.pool_k, self.pool_v = (
            Pool(c.pool_mode, head_dim, kernel, stride, c.pool_norm_eps) if kernel is not None else None
            for kernel, stride in made
        )
        self.relative = (
            RelativePosition(head_dim, s.queries, s.keys, c.prefix, time=c.frames is not None, scaled=False)
            if c.relative
            else None
        )
        self.site = AttentionSite()
        self.proj = nn.Linear(s.inner, s.inner)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m e"]:
        """`grid` is where the tokens of `x` lie."""
        # Three products instead of one and three copies: pooling wants every part contiguous.
        weights = self.qkv.weight.chunk(3)
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        parts = []  # b n k d
        for weight, bias, pool in zip(weights, biases, (self.pool_q, self.pool_k, self.pool_v), strict=True):
            part = F.linear(x, weight, bias)
            split = part.unflatten(2, (self.heads, -1)) if pool is None else pool(part, grid, self.heads, self.prefix)
            parts.append(split)
        q, k, v = parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)
        offsets = None if self.relative is None else self.relative(q, *self.grids(grid))
        y = attend(q, k, v, offsets, site=self.site).transpose(1, 2).flatten(2)
        if self.residual:
            asked = parts[0].flatten(2)
            if self.whole or not self.prefix:
                y = y + asked
            else:
                y = torch.cat([y[:, : self.prefix], y[:, self.prefix :] + asked[:, self.prefix :]], 1)
        return self.proj(y)

    def grids(self, grid: Grid) -> tuple[Grid, Grid]:
        """Where queries and keys lie when the block's input lies on `grid`."""
        queries = grid if self.pool_q is None else shrink(grid, self.pool_q.kernel, self.pool_q.stride)
        return queries, grid if self.pool_k is None else shrink(grid, self.pool_k.kernel, self.pool_k.stride)


class Block(nn.Module):
    """Pre-norm block whose shortcut follows its attention: pooled by a maximum, widened by a product of the normed input."""

    def __init__(self, config: MViTConfig, shape: BlockShape, drop_path: float):
        super().__init__()
        c, s = config, shape
        self.prefix, self.early = c.prefix, c.grow == "attention"
        self.stride = s.query_stride if s.strided else None
        self.norm1 = nn.LayerNorm(s.cin, c.norm_eps)
        self.attn = PoolingAttention(c, s)
        self.norm2 = nn.LayerNorm(s.inner, c.norm_eps)
        self.mlp = MLP(s.inner, int(s.inner * c.mlp_ratio), out=s.cout)
        self.proj = nn.Linear(s.cin, s.cout) if s.cin != s.cout else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b m e"]:
        """`grid` is where the tokens of `x` lie."""
        y = self.norm1(x)
        skip = self.proj(y) if self.proj is not None and self.early else x
        x = self._pool_skip(skip, grid) + self.drop_path(self.attn(y, grid))
        y = self.norm2(x)
        skip = self.proj(y) if self.proj is not None and not self.early else x
        return skip + self.drop_path(self.mlp(y))

    def _pool_skip(self, x: Tensor, grid: Grid) -> Tensor:
        if self.stride is None:
            return x
        kernel = tuple(s + 1 if s > 1 else 1 for s in self.stride)
        maps = to_maps(x[:, self.prefix :], grid, len(kernel))
        pooled = to_tokens(slide("max", maps, kernel, self.stride, _half(kernel)))
        return torch.cat([x[:, : self.prefix], pooled], 1) if self.prefix else pooled


class MViT(Model):
    """An MViT for pictures or clips of any size: grids round up, position tables are resized when it is not the built one."""

    family = "mvit"
    config: MViTConfig

    def __init__(self, config: MViTConfig):
        super().__init__()
        self.config = c = config
        convolution = nn.Conv2d if c.frames is None else nn.Conv3d
        padding = _half(c.patch_kernel)
        self.embed = convolution(c.in_channels, c.widths[0], c.patch_kernel, c.patch_stride, padding)  # type: ignore[arg-type]
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.widths[0])) if c.class_token else None
        self.positions = None
        if c.position != "none":
            self.positions = ClipPosition(c.position, c.widths[0], c.grid(), c.prefix, std=POSITION_STD[c.init])
        shapes, rates = block_shapes(c), drop_path_rates(c.drop_path, sum(c.depths))
        self.blocks = nn.ModuleList(Block(c, s, rate) for s, rate in zip(shapes, rates, strict=True))
        self.ends = tuple(sum(c.depths[: s + 1]) for s in range(len(c.depths)))  # number of blocks up to each stage's end
        self.norm = nn.LayerNorm(c.widths[-1], c.norm_eps)
        self.drop = nn.Dropout(c.dropout)
        self.head = ClassifierHead(c.widths[-1], c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c *t h w"]) -> Features:
        """Normalised tokens of the last scale. Raises ValueError for another rank or number of channels."""
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c *t h w"]) -> list[Features]:
        """The tokens after every scale stage, finest first; those of the last are normalised."""
        self.check_input(x)
        maps = self.embed(x)
        grid: Grid = (1, *maps.shape[2:])[-3:]  # type: ignore[assignment]
        tokens, prefix = to_tokens(maps), self.config.prefix
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1)
        if self.positions is not None:
            tokens = tokens + self.positions(grid)
        found = []
        for i, block in enumerate(self.blocks):
            tokens = self.run_block(block, tokens, grid)
            grid = block.attn.grids(grid)[0]  # type: ignore[union-attr,operator]
            if i + 1 in self.ends:
                found.append(Features(self.norm(tokens) if i + 1 == len(self.blocks) else tokens, grid, prefix))
        return found

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token, or the mean of the patch tokens."""
        return self.drop(features.tokens[:, 0] if self.config.pool == "cls" else features.patches.mean(1))

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Pooled cells are taken to be the even mean of their window, in keys, and in the shortcut where a scale begins."""
        c, kernel = self.config, self.config.patch_kernel
        pixels = tile((1, *size)[-3:], size)  # type: ignore[arg-type]
        first = cells = coarser(pixels, kernel, c.patch_stride, _half(kernel))._replace(prefix=c.prefix)
        steps = []
        for i, shape in enumerate(block_shapes(c, cells.grid)):
            before, keys, links, shortcut = cells, cells, None, same(cells.tokens)
            if shape.key_kernel is not None:
                window = (shape.key_kernel, shape.key_stride, _half(shape.key_kernel))
                keys = coarser(before, *window)
                links = pooled(before, keys, *window)
            if shape.strided:
                skip = tuple(s + 1 if s > 1 else 1 for s in shape.query_stride)
                cells = coarser(before, skip, shape.query_stride, _half(skip))
                shortcut = pooled(before, cells, skip, shape.query_stride, _half(skip))
            asked, held = torch.arange(cells.tokens)[None], torch.arange(keys.tokens)[None]
            site = Site(f"blocks.{i}.attn.site", asked, held, cells, keys, links)
            steps.append(Step(cells, (site,), shortcut))
        return Route(first, tuple(steps), asked_by(cells, c.pool))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width), or (channels, frames, height, width) of a model for clips."""
        c = self.config
        return (c.in_channels, *(() if c.frames is None else (c.frames,)), *c.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """Any size works."""
        return (1, 1)

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.widths[-1], num_classes).to(self.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, block i at i + 1, final norm and head last."""
        last = len(self.blocks) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            ids[name] = int(part[1]) + 1 if part[0] == "blocks" else (last if part[0] in ("norm", "head") else 0)
        return ids

    def no_weight_decay(self) -> set[str]:
        """The class token and the position tables."""
        return {n for n, _ in self.named_parameters() if n.startswith(("class_token", "positions.")) or ".relative." in n}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Products as the config says; the class token 0.02, as in the published code."""
        init_encoder(self, self.config.init)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)


def _v1(frames: int, **more: Any) -> MViTConfig:
    settings: dict[str, Any] = {
        "num_classes": 400, "patch_kernel": (3, 7, 7), "patch_stride": (2, 4, 4), "pool_kernel": (3, 3, 3),
        "query_strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)),
        "key_strides": ((1, 8, 8), (1, 4, 4), (1, 2, 2), (1, 1, 1)),
        "pool_queries": False, "grow": "mlp", "class_token": True, "pool": "cls", "position": "separable",
        "relative": False, "residual_pool": False,
    }  # fmt: skip
    return MViTConfig(frames=frames, **(settings | more))


def _v2(frames: int, **more: Any) -> MViTConfig:
    changes = {"pool_queries": True, "grow": "attention", "position": "none", "relative": True, "residual_pool": True}
    return _v1(frames, **(changes | more))


_MICRO: dict[str, Any] = {
    "num_classes": 10, "depths": (1, 2), "widths": (16, 32), "heads": (1, 2), "image_size": (16, 16), "patch_stride": (2, 2),
    "patch_kernel": (3, 3), "query_strides": ((1, 1), (2, 2)), "key_strides": ((4, 4), (2, 2)),
}  # fmt: skip
_MICRO_CLIP = _MICRO | {
    "patch_stride": (2, 2, 2), "patch_kernel": (3, 3, 3), "query_strides": ((1, 1, 1), (1, 2, 2)),
    "key_strides": ((1, 4, 4), (1, 2, 2)),
}  # fmt: skip

VARIANTS: dict[str, MViTConfig] = {
    # v1 paper, Tables 2 and 4
    "mvit_base_16x4": _v1(16),
    "mvit_base_32x3": _v1(32),
    "mvit_base_64x3": _v1(64),
    # v2 paper, Tables 1 and 4, and the published configurations (24 blocks)
    "mvitv2_small_16x4": _v2(16),
    "mvitv2_base_32x3": _v2(32, depths=(2, 3, 16, 3)),
    # v2 paper, Tables 1 and 5: pictures
    "mvitv2_tiny": MViTConfig(depths=(1, 2, 5, 2)),
    "mvitv2_small": MViTConfig(depths=(1, 2, 11, 2)),
    "mvitv2_base": MViTConfig(depths=(2, 3, 16, 3)),
    "mvitv2_micro": MViTConfig(**_MICRO),
    "mvitv2_micro_clip": _v2(4, **(_MICRO_CLIP | {"class_token": False, "pool": "mean"})),
    "mvit_micro": _v1(4, **_MICRO_CLIP),
}

CONFIG = MViTConfig
MODEL = MViT
