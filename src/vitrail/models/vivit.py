"""Video Vision Transformer (Arnab et al., "ViViT: A Video Vision Transformer", arXiv 2103.15691)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.attention import AttentionSite, attend
from vitrail.layers.block import MLP, Attention, Block, BlockConfig, DropPath, heads_problem, init_encoder
from vitrail.layers.embed import TubeletEmbed, frames_problem, size_problem
from vitrail.layers.features import Features
from vitrail.layers.fold import Grid, fold, fold_rows, unfold
from vitrail.layers.head import ClassifierHead
from vitrail.layers.position import VIDEO_KINDS, VideoPosition
from vitrail.layers.route import Cells, Links, Route, Site, Step, asked_by, same, tile, whole, within

from .base import Model, drop_path_rates

MODELS = ("joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")  # the paper's 1 to 4
ORDERS = ("time_space", "space_time")


@dataclass(frozen=True)
class ViViTConfig:
    """Everything that decides the function of a ViViT; image_size is (height, width), tubelet (frames, height, width)."""

    image_size: tuple[int, int] = (224, 224)
    frames: int = 32
    tubelet: tuple[int, int, int] = (2, 16, 16)
    in_channels: int = 3
    num_classes: int = 400
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    model: str = "joint"  # joint, factorised_encoder, factorised_self_attention, factorised_dot_product (section 3.3)
    order: str = "time_space"  # of factorised self-attention: scenic's default; the paper's text says space first
    temporal_depth: int = 4  # of the factorised encoder; 0: frames are averaged (the paper's Table 2, last row)
    temporal_heads: int | None = None  # by default those of the spatial encoder
    temporal_mlp_dim: int | None = None
    pool: str = "cls"  # cls or mean; cls brings a class token along
    position: str = "joint"  # joint (one table over space and time), separate (space + time), none
    resize: str = "bilinear_corners"  # scenic's rule for positions of another grid
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"  # scenic (flax.linen.gelu) and transformers (gelu_fast)
    qkv_bias: bool = True
    representation: int | None = None  # width of the tanh layer before the classifier
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        for problem in (
            size_problem(self.image_size, self.tubelet[1:]),
            frames_problem(self.frames, self.tubelet[0]),
            heads_problem(self.width, self.heads),
            heads_problem(self.width, self.temporal_heads or self.heads),
        ):
            if problem:
                raise ValueError(problem)
        for name, value, allowed in (
            ("model", self.model, MODELS), ("order", self.order, ORDERS), ("pool", self.pool, ("cls", "mean")),
            ("position", self.position, VIDEO_KINDS),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.model in MODELS[2:] and self.pool == "cls":
            raise ValueError(f"{self.model} knows no class token (section 3.3); allowed pool: mean")
        if self.model == "factorised_dot_product" and self.heads % 2:
            raise ValueError(
                f"half of the heads attend over time, so {self.heads} is no valid number; nearest: {self.heads + 1}"
            )

    @property
    def grid(self) -> Grid:
        """Tubelets along time, height and width at the built size."""
        t, h, w = self.tubelet
        return self.frames // t, self.image_size[0] // h, self.image_size[1] // w

    @property
    def prefix(self) -> int:
        """Tokens before the tubelets."""
        return int(self.pool == "cls")


class FactorisedBlock(nn.Module):
    """Model 3: attention among the tokens of a frame and among those of a place, one after the other, then the MLP."""

    def __init__(self, config: BlockConfig, drop_path: float, order: str):
        super().__init__()
        self.order = order.split("_")
        self.norm = nn.ModuleDict({axis: nn.LayerNorm(config.width, config.norm_eps) for axis in self.order})
        self.attn = nn.ModuleDict({axis: Attention(config) for axis in self.order})
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_dim, config.activation, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Tokens of the grid, without a class token."""
        for axis in self.order:
            y = self.attn[axis](fold(self.norm[axis](x), grid, axis))
            x = x + self.drop_path(unfold(y, grid, axis))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FactorisedAttention(nn.Module):
    """Model 4: the first half of the heads attends over time, the second over space (equation 7; order as in scenic)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.time = AttentionSite(config.attention_dropout)
        self.space = AttentionSite(config.attention_dropout)
        self.proj = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Tokens of the grid, without a class token."""
        b, n, c = x.shape
        t, s, k, d = grid[0], grid[1] * grid[2], self.heads // 2, c // self.heads
        parts = self.qkv(x).view(b, t, s, 3, 2, k, d)
        q, v, w = parts[:, :, :, :, 0].permute(3, 0, 2, 4, 1, 5).reshape(3, b * s, k, t, d).unbind(0)
        over_time = attend(q, v, w, site=self.time).view(b, s, k, t, d).permute(0, 3, 1, 2, 4)
        q, v, w = parts[:, :, :, :, 1].permute(3, 0, 1, 4, 2, 5).reshape(3, b * t, k, s, d).unbind(0)
        over_space = attend(q, v, w, site=self.space).view(b, t, k, s, d).transpose(2, 3)
        return self.drop(self.proj(torch.stack([over_time, over_space], 3).reshape(b, n, c)))


class DotProductBlock(nn.Module):
    """Model 4's encoder block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: BlockConfig, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = FactorisedAttention(config)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_dim, config.activation, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Tokens of the grid, without a class token."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViViT(Model):
    """A ViViT for clips of any size that the tubelet divides; positions are resized when it is not the built one."""

    family = "vivit"
    config: ViViTConfig

    def __init__(self, config: ViViTConfig):
        super().__init__()
        self.config = c = config
        encoder = c.model == "factorised_encoder"
        temporal = c.temporal_depth if encoder else 0
        rates = drop_path_rates(c.drop_path, c.depth + temporal)
        self.embed = TubeletEmbed(c.in_channels, c.width, c.tubelet)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.prefix else None
        self.position = self._positions((1, *c.grid[1:]) if encoder else c.grid)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(self._block(rate) for rate in rates[: c.depth])
        self.norm = nn.LayerNorm(c.width, c.norm_eps)
        if temporal:
            self.temporal_class_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.prefix else None
            self.temporal_position = self._positions((c.grid[0], 1, 1))
            later = self._block_config(c.temporal_heads or c.heads, c.temporal_mlp_dim or c.mlp_dim)
            self.temporal_blocks = nn.ModuleList(Block(later, rate) for rate in rates[c.depth :])
            self.temporal_norm = nn.LayerNorm(c.width, c.norm_eps)
        self.head = ClassifierHead(c.width, c.num_classes, c.representation)
        init_encoder(self)
        nn.init.trunc_normal_(self.embed.proj.weight, std=self.embed.proj.weight[0].numel() ** -0.5)  # lecun_normal, as flax
        nn.init.zeros_(self.embed.proj.bias)  # type: ignore[arg-type]

    def _block_config(self, heads: int, mlp_dim: int) -> BlockConfig:
        c = self.config
        return BlockConfig(
            c.width, heads, mlp_dim, c.norm_eps, c.activation, c.qkv_bias,
            dropout=c.dropout, attention_dropout=c.attention_dropout,
        )  # fmt: skip

    def _block(self, drop_path: float) -> nn.Module:
        config = self._block_config(self.config.heads, self.config.mlp_dim)
        if self.config.model == "factorised_self_attention":
            return FactorisedBlock(config, drop_path, self.config.order)
        if self.config.model == "factorised_dot_product":
            return DotProductBlock(config, drop_path)
        return Block(config, drop_path)

    def _positions(self, grid: Grid) -> VideoPosition | None:
        c = self.config
        kind = "joint" if c.position == "separate" and 1 in (grid[0], grid[1] * grid[2]) else c.position
        return None if kind == "none" else VideoPosition(kind, c.width, grid, c.prefix, c.resize)

    def features(self, x: Float[Tensor, "b c t h w"]) -> Features:
        """Normalised tokens after the last block; of the factorised encoder one token per frame, grid (T, 1, 1).

        Raises ValueError for another rank, another number of channels, or frames or sides that the tubelet does not divide.
        """
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c t h w"]) -> list[Features]:
        """The features; of the factorised encoder before them those of its spatial encoder, without class tokens."""
        self.check_input(x)
        tokens, grid = self.embed(x)
        if self.config.model == "factorised_encoder":
            return self._encode_frames(tokens, grid)
        tokens = self._begin(tokens, grid, self.class_token, self.position)
        for block in self.blocks:
            tokens = self.run_block(block, tokens) if self.config.model == "joint" else self.run_block(block, tokens, grid)
        return [Features(self.norm(tokens), grid, self.config.prefix)]

    def _encode_frames(self, tokens: Float[Tensor, "b n c"], grid: Grid) -> list[Features]:
        b, t, p = tokens.shape[0], grid[0], self.config.prefix
        x = self._begin(tokens.reshape(b * t, -1, self.config.width), (1, *grid[1:]), self.class_token, self.position)
        for block in self.blocks:
            x = self.run_block(block, x)
        x = self.norm(x)
        frames = (x[:, 0] if p else x.mean(1)).view(b, t, -1)
        within = Features(x[:, p:].reshape(tokens.shape), grid, 0)
        if not self.config.temporal_depth:
            return [within, Features(frames, (t, 1, 1), 0)]
        x = self._begin(frames, (t, 1, 1), self.temporal_class_token, self.temporal_position)
        for block in self.temporal_blocks:
            x = self.run_block(block, x)
        return [within, Features(self.temporal_norm(x), (t, 1, 1), p)]

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """All to all (joint), frame by frame and then among frames (factorised encoder), or along one axis after the other."""
        c = self.config
        grid = (size[0] // c.tubelet[0], size[1] // c.tubelet[1], size[2] // c.tubelet[2])
        if c.model == "factorised_encoder":
            return self._route_of_frames(tile(grid, size, grid[0] * c.prefix), size)
        cells, steps = tile(grid, size, c.prefix), []
        for i in range(len(self.blocks)):
            if c.model == "joint":
                steps.append(whole(f"blocks.{i}.attn.site", cells))
            elif c.model == "factorised_self_attention":
                steps += [within(f"blocks.{i}.attn.{a}.site", fold_rows(grid, a), cells) for a in c.order.split("_")]
            else:
                rows = {axis: fold_rows(grid, axis) for axis in ("time", "space")}
                sites = (Site(f"blocks.{i}.attn.{axis}", r, r, cells, cells) for axis, r in rows.items())
                steps.append(Step(cells, tuple(sites), same(cells.tokens)))
        return Route(cells, tuple(steps), asked_by(cells, c.pool))

    def _route_of_frames(self, cells: Cells, size: tuple[int, ...]) -> Route:
        """`cells` have one class token a frame, if any; the temporal encoder's tokens are the frames."""
        t = cells.grid[0]
        patches = fold_rows(cells.grid, "space") + cells.prefix
        frame = torch.arange(t)
        groups = torch.cat([frame[:, None], patches], 1) if cells.prefix else patches
        steps = [within(f"blocks.{i}.attn.site", groups, cells) for i in range(len(self.blocks))]
        prefix = self.config.prefix if self.config.temporal_depth else 0
        frames = tile((t, 1, 1), size, prefix)
        read = frame[:, None] if cells.prefix else patches
        later = frame.repeat_interleave(read.shape[1]) + prefix
        links = Links(later, read.flatten(), torch.full((read.numel(),), 1 / read.shape[1]), (frames.tokens, cells.tokens))
        steps.append(Step(frames, (), links))
        steps += [whole(f"temporal_blocks.{i}.attn.site", frames) for i in range(self.config.temporal_depth)]
        readout = asked_by(frames, "cls") if prefix else {"the mean over all frames": torch.full((t,), 1 / t)}
        return Route(cells, tuple(steps), readout)

    def _begin(
        self, tokens: Float[Tensor, "b n c"], grid: Grid, token: Tensor | None, position: VideoPosition | None
    ) -> Float[Tensor, "b m c"]:
        """What an encoder starts from: class token, tokens, positions."""
        # The convolution leaves channels outermost in memory; every later layer wants them innermost.
        x = tokens.contiguous() if token is None else torch.cat([token.expand(tokens.shape[0], -1, -1), tokens], 1)
        return self.drop(x if position is None else x + position(grid))

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token of the last encoder, or the mean of the tokens where there is none."""
        return features.tokens[:, 0] if features.prefix else features.tokens.mean(1)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        return (self.config.in_channels, self.config.frames, *self.config.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The tubelet's height and width."""
        return self.config.tubelet[1:]

    @property
    def frame_multiple(self) -> int:
        """The tubelet's frames."""
        return self.config.tubelet[0]

    def reset_head(self, num_classes: int) -> None:
        """A zero-initialised linear head in place of the whole old one, representation layer included."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes, representation=None)
        self.head = ClassifierHead(self.config.width, num_classes).to(self.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, block i at i + 1, then the temporal blocks, the last norm and the head on top."""
        depth, temporal = len(self.blocks), self.config.temporal_depth if self.config.model == "factorised_encoder" else 0
        starts = {"blocks": 1, "temporal_blocks": depth + 1}
        others = {"norm": depth if temporal else depth + 1, "temporal_norm": depth + temporal + 1, "head": depth + temporal + 1}
        others |= {"temporal_class_token": depth + 1, "temporal_position": depth + 1}
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            ids[name] = starts[part[0]] + int(part[1]) if part[0] in starts else others.get(part[0], 0)
        return ids

    def no_weight_decay(self) -> set[str]:
        """Class tokens and position tables."""
        parts = ("class_token", "temporal_class_token", "position", "temporal_position")
        return {n for n, _ in self.named_parameters() if n.split(".")[0] in parts}


def _row(width: int, depth: int, heads: int, patch: int = 16, **more: Any) -> ViViTConfig:
    return ViViTConfig(width=width, depth=depth, heads=heads, mlp_dim=4 * width, tubelet=(2, patch, patch), **more)


# Section 4.1 and Tables 2 (B), 4 and 5 (L, H): 32 frames in tubelets of two. Table 5 prints H/16, but ViT-H is H/14.
_BASE, _LARGE, _HUGE = (768, 12, 12), (1024, 24, 16), (1280, 32, 16)

VARIANTS: dict[str, ViViTConfig] = {
    "vivit_base_16x2": _row(*_BASE),
    "vivit_base_16x2_factorised_encoder": _row(*_BASE, model="factorised_encoder"),
    "vivit_base_16x2_factorised_self_attention": _row(*_BASE, model="factorised_self_attention", pool="mean"),
    "vivit_base_16x2_factorised_dot_product": _row(*_BASE, model="factorised_dot_product", pool="mean"),
    "vivit_large_16x2": _row(*_LARGE),
    "vivit_large_16x2_factorised_encoder": _row(*_LARGE, model="factorised_encoder"),
    "vivit_huge_14x2": _row(*_HUGE, patch=14),
    "vivit_micro": _row(32, 3, 4, patch=4, image_size=(16, 16), frames=4, num_classes=10),
}

CONFIG = ViViTConfig
MODEL = ViViT
