"""Vision Transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitrail.layers.block import ACTIVATIONS, INITS, MLPS, Block, BlockConfig, heads_problem, init_encoder
from vitrail.layers.embed import PatchEmbed, size_problem
from vitrail.layers.features import Features
from vitrail.layers.head import AttentionPool, ClassifierHead
from vitrail.layers.position import PositionConfig, PositionTable, RelativePosition
from vitrail.layers.route import Cells, Route, Site, Step, asked_by, tile, whole

from .base import Model, drop_path_rates

POOLS = ("cls", "mean", "cls_mean", "attention")


@dataclass(frozen=True)
class ViTConfig:
    """Everything that decides the function of a ViT; sizes are (height, width) in pixels."""

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    pool: str = "cls"  # cls, mean (of the patch tokens), cls_mean (both side by side: DINOv2's classifiers), attention
    class_token: bool = True
    registers: int = 0  # register tokens (arXiv 2309.16588), after the class token
    position: PositionConfig = field(default_factory=PositionConfig)
    norm_eps: float = 1e-6  # flax, timm, torchvision; transformers: 1e-12
    activation: str = "gelu"  # gelu_tanh in the original JAX code
    mlp: str = "plain"  # swiglu: DINOv2's giant
    qkv_bias: bool = True
    qk_norm: bool = False
    patch_bias: bool = True
    stem_norm: bool = False  # LayerNorm after the position embedding (CLIP)
    norm_after_pool: bool = False  # the final norm acts on the pooled embedding (timm's mean pooling)
    representation: int | None = None  # width of the tanh layer before the classifier (pre-training head)
    head_bias: float = 0.0  # initial bias of the classifier (big_vision: -10 for sigmoid losses)
    init: str = "xavier"  # of the encoder's products: xavier (uniform; original code), normal (0.02, tokens too; DeiT)
    layer_scale: float | None = None
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask_token: bool = False  # a learned token that replaces masked patches

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        if problem := size_problem(self.image_size, self.patch):
            raise ValueError(problem)
        if problem := heads_problem(self.width, self.heads):
            raise ValueError(problem)
        for name, allowed in (("pool", POOLS), ("activation", tuple(ACTIVATIONS)), ("mlp", MLPS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.pool.startswith("cls") and not self.class_token:
            raise ValueError(f"pool is {self.pool!r} but class_token is off; allowed without a class token: mean, attention")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row at the built image size."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers

    @property
    def embedding(self) -> int:
        """Width of the pooled embedding."""
        return 2 * self.width if self.pool == "cls_mean" else self.width


class ViT(Model):
    """A ViT for images of any size that the patch divides; positions are resized when it is not the built one."""

    family = "vit"
    config: ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = c = config
        self.embed = PatchEmbed(c.in_channels, c.width, c.patch, c.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.class_token else None
        self.registers = nn.Parameter(torch.zeros(1, c.registers, c.width)) if c.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.width)) if c.mask_token else None
        kind, tables = c.position.kind, {"stem": 1, "shared": 1, "layers": c.depth}[c.position.place]
        placed = c.prefix if c.position.registers else int(c.class_token)  # tokens of the prefix that may have a position
        self.positions = nn.ModuleList()
        if kind == "relative":
            count = c.depth if c.position.place != "shared" else 1
            grid = (1, *c.grid)
            self.positions.extend(RelativePosition(c.width // c.heads, grid, grid, c.prefix) for _ in range(count))
        elif kind != "none":
            self.positions.extend(PositionTable(c.position, c.width, c.grid, placed) for _ in range(tables))
        self.drop = nn.Dropout(c.dropout)
        self.stem_norm = nn.LayerNorm(c.width, c.norm_eps) if c.stem_norm else nn.Identity()
        shared = {f.name: getattr(c, f.name) for f in dataclasses.fields(BlockConfig)}
        self.blocks = nn.ModuleList(Block(BlockConfig(**shared), rate) for rate in drop_path_rates(c.drop_path, c.depth))
        self.norm = nn.LayerNorm(c.width, c.norm_eps)
        self.attention_pool = (
            AttentionPool(c.width, c.heads, c.mlp_dim, c.norm_eps, c.activation) if c.pool == "attention" else None
        )
        self.head = ClassifierHead(c.embedding, c.num_classes, c.representation, c.head_bias)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"] | None = None) -> Features:
        """Tokens after the last block (normalised, unless the norm acts after pooling).

        Where `mask` is true a patch is replaced by the mask token before positions are added. Raises ValueError for a size
        that the patch does not divide, another number of channels, or a mask without a mask token.
        """
        self._check_input(x, mask)
        tokens, grid = self.embed(x)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)  # type: ignore[union-attr]
        tokens = self.encode(tokens, grid)
        if not self.config.norm_after_pool:
            tokens = self.norm(tokens)
        return Features(tokens, grid, self.config.prefix)

    def encode(
        self, tokens: Float[Tensor, "b n c"], grid: tuple[int, int, int], keep: Int[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b p c"]:
        """Embedded patches through positions and blocks, behind the prefix tokens, before the final norm.

        `keep` holds the numbers of the patches that go in, each with its own position: the others are never seen. Raises
        ValueError for `keep` with relative positions, whose biases are made for whole grids.
        """
        place, relative = self.config.position.place, self.config.position.kind == "relative"
        if relative and keep is not None:
            raise ValueError("patches cannot be left out where positions are relative; allowed: none, 1d, 2d, sincos")
        rows = None if keep is None else self._rows(keep)
        tokens = self._add_prefix(tokens, grid)
        if rows is not None:
            tokens = tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[2]))
        for i, block in enumerate(self.blocks):
            if relative:
                position = self.positions[i if len(self.positions) > 1 else 0]
                tokens = self.run_block(block, tokens, partial(position, queries=grid))
                continue
            if place != "stem" and self.positions:
                tokens = self._add_table(tokens, self.positions[i if place == "layers" else 0], grid, rows)
            tokens = self.run_block(block, tokens)
        return tokens

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token, the mean of the patch tokens, both side by side, or the attention pool's answer over all tokens."""
        if self.attention_pool is not None:
            x = self.attention_pool(features.tokens)
        elif self.config.pool == "mean":
            x = features.patches.mean(1)
        elif self.config.pool == "cls_mean":
            x = torch.cat([features.tokens[:, 0], features.patches.mean(1)], 1)
        else:
            x = features.tokens[:, 0]
        return self.norm(x) if self.config.norm_after_pool else x

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Every block attends globally, an attention pool asks the last tokens."""
        grid = (1, size[0] // self.config.patch[0], size[1] // self.config.patch[1])
        return self.route_over(tile(grid, size, self.config.prefix))

    def route_over(self, cells: Cells) -> Route:
        """The route where the patches are `cells`."""
        steps = [whole(f"blocks.{i}.attn.site", cells) for i in range(len(self.blocks))]
        if self.attention_pool is None:
            return Route(cells, tuple(steps), asked_by(cells, self.config.pool))
        probe = cells._replace(grid=(0, 0, 0), prefix=1)
        site = Site("attention_pool.site", torch.zeros(1, 1).long(), torch.arange(cells.tokens)[None], probe, cells)
        return Route(cells, (*steps, Step(probe, (site,), None)), {"the pooling query": torch.ones(1)})

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        self.check_input(x)
        if mask is not None and self.mask_token is None:
            raise ValueError("a mask was given, but the model has no mask token; build it with mask_token=True")

    def _add_prefix(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        b, c = tokens.shape[0], self.config.position
        prefix = [t.expand(b, -1, -1) for t in (self.class_token, self.registers) if t is not None]
        # The convolution leaves channels outermost in memory; every later layer wants them innermost.
        tokens = torch.cat([*prefix, tokens], 1) if prefix else tokens.contiguous()
        if c.kind not in ("none", "relative") and c.place == "stem":
            tokens = self._add_table(tokens, self.positions[0], grid)
        return self.stem_norm(self.drop(tokens))

    def _rows(self, keep: Tensor) -> Tensor:
        """Numbers of the tokens to keep: all of the prefix, and of the patches those in `keep`."""
        prefix = torch.arange(self.config.prefix, device=keep.device).expand(len(keep), -1)
        return torch.cat([prefix, keep + self.config.prefix], 1)

    def _add_table(self, tokens: Tensor, position: nn.Module, grid: tuple[int, int, int], rows: Tensor | None = None) -> Tensor:
        first, patches = position(grid[1:])
        missing = self.config.prefix - (0 if first is None else first.shape[1])
        zeros = patches.new_zeros(1, missing, patches.shape[-1]) if missing else None
        table = torch.cat([t for t in (first, zeros, patches) if t is not None], 1)
        return tokens + (table if rows is None else table[0][rows])

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The patch."""
        return self.config.patch

    def reset_head(self, num_classes: int) -> None:
        """A zero-initialised linear head in place of the whole old one, representation layer included (section 3.2)."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes, representation=None)
        self.head = ClassifierHead(self.config.embedding, num_classes).to(self.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, block i at i + 1, final norm and head at depth + 1."""
        last = self.config.depth + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            if part[0] == "blocks" or (part[0] == "positions" and len(self.positions) > 1):
                ids[name] = int(part[1]) + 1
            else:
                ids[name] = last if part[0] in ("norm", "head", "attention_pool") else 0
        return ids

    def no_weight_decay(self) -> set[str]:
        """Tokens, the pooling query and position tables."""
        tokens = {"class_token", "registers", "mask_token", "attention_pool.probe"}
        return {n for n, _ in self.named_parameters() if n in tokens or n.startswith("positions.")}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As in the original code, or DeiT's; see `init_encoder`."""
        init_encoder(self, self.config.init)
        fan_in = self.embed.proj.weight[0].numel()
        nn.init.trunc_normal_(self.embed.proj.weight, std=fan_in**-0.5)  # lecun_normal, flax's default
        if self.embed.proj.bias is not None:
            nn.init.zeros_(self.embed.proj.bias)
        for token in (self.class_token if self.config.init == "normal" else None, self.registers, self.mask_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


def _row(width: int, depth: int, heads: int, patch: int, **more: Any) -> ViTConfig:
    return ViTConfig(width=width, depth=depth, heads=heads, mlp_dim=4 * width, patch=(patch, patch), **more)


# ViT paper, Table 1 (B, L, H); DeiT, arXiv 2012.12877, Table 1, and AugReg, arXiv 2106.10270, Table 2 (Ti, S).
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
_PATCHES = {"tiny": (8, 16), "small": (8, 16, 32), "base": (8, 14, 16, 32), "large": (14, 16, 32), "huge": (14, 16)}

VARIANTS: dict[str, ViTConfig] = {
    f"vit_{size}_patch{patch}_224": _row(*_SIZES[size], patch) for size in _SIZES for patch in _PATCHES[size]
}
VARIANTS |= {
    f"vit_{size}_patch{patch}_{side}": _row(*_SIZES[size], patch, image_size=(side, side))
    for size, patch, side in (  # fine-tuning resolutions of the paper's Table 2 and of AugReg
        ("tiny", 16, 384), ("small", 16, 384), ("small", 32, 384), ("base", 16, 384), ("base", 32, 384),
        ("large", 16, 384), ("large", 32, 384), ("large", 16, 512), ("huge", 14, 518),
    )
}  # fmt: skip
VARIANTS["vit_micro_patch4_16"] = _row(32, 3, 4, 4, image_size=(16, 16), num_classes=10)

CONFIG = ViTConfig
MODEL = ViT
