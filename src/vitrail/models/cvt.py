"""Convolutional vision Transformer (Wu et al., "CvT: Introducing Convolutions to Vision Transformers", arXiv 2103.15808)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.attention import AttentionSite, attend
from vitrail.layers.block import ACTIVATIONS, INITS, MLP, DropPath, init_encoder
from vitrail.layers.conv import ConvNorm
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead
from vitrail.layers.route import Cells, Route, Site, Step, asked_by, coarser, pooled, same, tile

from .base import Model, drop_path_rates

SCALES = ("width", "head")
Grid = tuple[int, int]


@dataclass(frozen=True)
class CvTConfig:
    """Everything that decides the function of a CvT; image_size is what it is meant for, any size works.

    Plural fields have one entry per stage.
    """

    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    num_classes: int = 1000
    widths: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (1, 3, 6)
    mlp_ratio: float = 4.0
    kernels: tuple[int, ...] = (7, 3, 3)  # of the token embeddings
    strides: tuple[int, ...] = (4, 2, 2)
    paddings: tuple[int, ...] = (2, 1, 1)
    kv_stride: int = 2  # of the convolutions of keys and values; that of the queries is 1, for the shortcut
    class_token: bool = True  # in the last stage; without it the mean of its tokens is pooled
    qkv_bias: bool = True
    attention_scale: str = "width"  # width: whole width ** -0.5 (the authors' code and weights); head: head dim ** -0.5
    norm_eps: float = 1e-5  # the authors' code; transformers too, whatever its layer_norm_eps says
    activation: str = "quick_gelu"  # the authors' code and weights; transformers computes gelu
    init: str = "normal"  # of products and convolutions: normal (0.02), as published; xavier (products), for narrow models
    drop_path: float = 0.0  # of the last stage, growing inside it (DROP_PATH_RATE of the authors' settings)
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        plural = {n: getattr(self, n) for n in ("widths", "depths", "heads", "kernels", "strides", "paddings")}
        if len({len(entries) for entries in plural.values()}) != 1 or not self.widths:
            counted = ", ".join(f"{name} {len(entries)}" for name, entries in plural.items())
            raise ValueError(f"every stage needs an entry in each of these settings; given: {counted}")
        if min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}; every stage needs at least one block")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                near = sorted((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(h - heads))[:2]
                raise ValueError(
                    f"width {width} is not divisible by heads {heads}; nearest valid: {' or '.join(map(str, near))}"
                )
        allowed = {"activation": tuple(ACTIVATIONS), "attention_scale": SCALES, "init": INITS}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(words)}")


class ConvEmbed(nn.Module):
    """Overlapping convolution to a coarser map whose cells, normalised, are the tokens of a stage (section 3.1)."""

    def __init__(self, config: CvTConfig, stage: int):
        super().__init__()
        c = config
        cin = c.widths[stage - 1] if stage else c.in_channels
        self.proj = nn.Conv2d(cin, c.widths[stage], c.kernels[stage], c.strides[stage], c.paddings[stage])
        self.norm = nn.LayerNorm(c.widths[stage], c.norm_eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        """Tokens in row-major order and their grid (rows, columns)."""
        x = self.proj(x.contiguous(memory_format=torch.channels_last))  # a copy of the pictures only
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class ConvAttention(nn.Module):
    """Self-attention whose q, k and v are depth-wise 3x3 convolutions of the map, then linear (section 3.2, equation 2).

    Keys and values are `kv_stride` times coarser than queries. The class token skips the convolutions.
    """

    def __init__(self, config: CvTConfig, stage: int):
        super().__init__()
        c, width, self.heads = config, config.widths[stage], config.heads[stage]
        self.conv_q = ConvNorm(width, width, 3, 1, act=None, groups=width)
        self.conv_k = ConvNorm(width, width, 3, c.kv_stride, act=None, groups=width)
        self.conv_v = ConvNorm(width, width, 3, c.kv_stride, act=None, groups=width)
        self.q = nn.Linear(width, width, bias=c.qkv_bias)
        self.k = nn.Linear(width, width, bias=c.qkv_bias)
        self.v = nn.Linear(width, width, bias=c.qkv_bias)
        self.scale = (width if c.attention_scale == "width" else width // self.heads) ** -0.5
        self.site = AttentionSite(c.attention_dropout)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """`grid` (rows, columns) is that of the last rows * columns tokens; what stands before is the class token."""
        b, n, c = x.shape
        prefix = n - grid[0] * grid[1]
        token = x[:, :prefix] if prefix else None
        # Channels stay innermost in memory: the convolutions read and write tokens without moving them.
        cells = x[:, prefix:].contiguous().transpose(1, 2).unflatten(2, grid)
        q = self._split(self.q(_tokens(self.conv_q(cells), token)))
        k = self._split(self.k(_tokens(self.conv_k(cells), token)))
        v = self._split(self.v(_tokens(self.conv_v(cells), token)))
        y = attend(q, k, v, site=self.site, scale=self.scale)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # b k n d


def _tokens(cells: Tensor, token: Tensor | None) -> Tensor:
    tokens = cells.flatten(2).transpose(1, 2)
    return tokens if token is None else torch.cat([token.to(tokens.dtype), tokens], 1)


class ConvBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: CvTConfig, stage: int, drop_path: float):
        super().__init__()
        c, width = config, config.widths[stage]
        self.norm1 = nn.LayerNorm(width, c.norm_eps)
        self.attn = ConvAttention(c, stage)
        self.norm2 = nn.LayerNorm(width, c.norm_eps)
        self.mlp = MLP(width, int(width * c.mlp_ratio), c.activation, c.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """`grid` as in `ConvAttention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A token embedding and the blocks behind it."""

    def __init__(self, config: CvTConfig, stage: int, drop_path: float):
        super().__init__()
        self.embed = ConvEmbed(config, stage)
        rates = drop_path_rates(drop_path, config.depths[stage])
        self.blocks = nn.ModuleList(ConvBlock(config, stage, rate) for rate in rates)


class CvT(Model):
    """A CvT for images of any size and shape: it has no position embedding."""

    family = "cvt"
    config: CvTConfig

    def __init__(self, config: CvTConfig):
        super().__init__()
        self.config = c = config
        last = len(c.widths) - 1
        self.stages = nn.ModuleList(Stage(c, s, c.drop_path if s == last else 0.0) for s in range(last + 1))
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.widths[-1])) if c.class_token else None
        self.norm = nn.LayerNorm(c.widths[-1], c.norm_eps)
        self.head = ClassifierHead(c.widths[-1], c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Normalised tokens of the last stage. Raises ValueError for another number of channels or a picture too small."""
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c h w"]) -> list[Features]:
        """The tokens after every stage, finest first; only those of the last are normalised and follow a class token."""
        self.check_input(x)
        found: list[Features] = []
        for s, stage in enumerate(self.stages):
            tokens, grid = stage.embed(x if s == 0 else found[-1].maps()[:, :, 0])  # type: ignore[operator,union-attr]
            prefix = int(self.class_token is not None and s == len(self.stages) - 1)
            if prefix:
                token = self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)  # type: ignore[union-attr]
                tokens = torch.cat([token, tokens], 1)
            for block in stage.blocks:  # type: ignore[union-attr]
                tokens = self.run_block(block, tokens, grid)
            found.append(Features(tokens, (1, *grid), prefix))
        return [*found[:-1], found[-1]._replace(tokens=self.norm(found[-1].tokens))]

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token, or without one the mean over the last stage."""
        return features.tokens[:, 0] if features.prefix else features.tokens.mean(1)

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Keys and embeddings are taken to be the even mean of what their convolutions see."""
        c, steps, first = self.config, [], None
        cells = tile((1, size[0], size[1]), size)
        for s, depth in enumerate(c.depths):
            kernel, stride, padding = ((side[s], side[s]) for side in (c.kernels, c.strides, c.paddings))
            prefix = int(self.class_token is not None and s == len(c.depths) - 1)
            before, cells = cells, coarser(cells, kernel, stride, padding)._replace(prefix=prefix)
            if first is None:
                first = cells
            else:
                steps.append(Step(cells, (), pooled(before, cells, kernel, stride, padding)))
            steps += [self._attended(f"stages.{s}.blocks.{i}.attn.site", cells) for i in range(depth)]
        assert first is not None
        return Route(first, tuple(steps), asked_by(cells, "cls" if cells.prefix else "mean"))

    def _attended(self, name: str, cells: Cells) -> Step:
        stride = self.config.kv_stride
        window = ((3, 3), (stride, stride), (1, 1))
        keys = coarser(cells, *window)
        everyone, held = torch.arange(cells.tokens)[None], torch.arange(keys.tokens)[None]
        site = Site(name, everyone, held, cells, keys, pooled(cells, keys, *window))
        return Step(cells, (site,), same(cells.tokens))

    def check_input(self, x: Tensor) -> None:
        """As for every model; a picture must also be as large as the part of the first kernel that lies inside it."""
        super().check_input(x)
        least = self.config.kernels[0] - 2 * self.config.paddings[0]
        if min(x.shape[2], x.shape[3]) < least:
            raise ValueError(f"image size {x.shape[2]}x{x.shape[3]} is too small; both sides need at least {least} pixels")

    @property
    def input_multiple(self) -> tuple[int, int]:
        """Any size works."""
        return (1, 1)

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.widths[-1], num_classes).to(self.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then every block counts, an embedding (and the class token) with the block behind it; the head last."""
        starts = [sum(self.config.depths[:s]) for s in range(len(self.config.depths))]
        last = sum(self.config.depths) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            if part[0] == "stages":
                stage = int(part[1])
                within = int(part[3]) if part[2] == "blocks" else 0
                ids[name] = 0 if part[2] == "embed" and stage == 0 else starts[stage] + within + 1
            else:
                ids[name] = starts[-1] + 1 if part[0] == "class_token" else last
        return ids

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return {"class_token"} if self.class_token is not None else set()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Truncated normals of 0.02 and zero biases, as in the authors' code; xavier leaves convolutions as torch makes them:
        a norm follows each.
        """
        if self.config.init == "xavier":
            init_encoder(self)
        else:
            for name, module in self.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("head"):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)


_W24 = CvTConfig((384, 384), widths=(192, 768, 1024), depths=(2, 2, 20), heads=(3, 12, 16))

# CvT paper, Table 1; fine-tuned at 384 in Table 3
VARIANTS: dict[str, CvTConfig] = {
    "cvt_13": CvTConfig(),
    "cvt_21": CvTConfig(depths=(1, 4, 16)),
    "cvt_13_384": CvTConfig((384, 384)),
    "cvt_21_384": CvTConfig((384, 384), depths=(1, 4, 16)),
    "cvt_w24_384": _W24,
    "cvt_micro": CvTConfig(
        (16, 16), 3, 10, widths=(8, 16, 32), depths=(1, 1, 2), heads=(1, 2, 4), kernels=(3, 3, 3), strides=(2, 2, 2),
        paddings=(1, 1, 1),
    ),
}  # fmt: skip

CONFIG = CvTConfig
MODEL = CvT
