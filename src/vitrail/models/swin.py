"""Swin Transformer (Liu et al., arXiv 2103.14030) and Swin Transformer V2 (Liu et al., arXiv 2111.09883)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.bias import BIAS_RULES, resize_bias
from vitrail.layers.block import INITS, MLP, DropPath, init_encoder
from vitrail.layers.embed import PatchEmbed, size_problem
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead
from vitrail.layers.position import PositionConfig, PositionTable, resize_grid
from vitrail.layers.route import Route, Step, asked_by, coarser, pooled, tile, within
from vitrail.layers.window import (
    Layout,
    LayoutBuffers,
    Size,
    WindowAttention,
    make_layout,
    order_layout,
    ordered,
    reorder,
    window_mask,
    window_rows,
)

from .base import Model, drop_path_rates

FITS = ("built", "built_both", "call", "call_both", "always")


@dataclass(frozen=True)
class SwinConfig:
    """Everything that decides the function of a Swin; image_size is what the windows are planned for, others work too.

    `fit` says what happens on maps that are not larger than the window:
    built: per axis, when the model is built, the window shrinks to the map (with a smaller bias table) and is not shifted
    (timm); built_both: the same, but for both axes as soon as the smaller side of the map fits (the original code,
    transformers' v2); call: at every call, per axis, not shifted, and the map is padded up to the window (torchvision);
    call_both: for both axes as soon as the smaller side fits (transformers' v1); always: shifted and padded up all the same
    (timm's always_partition).
    """

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (4, 4)
    in_channels: int = 3
    num_classes: int = 1000
    version: int = 1  # 2: cosine attention, continuous position bias, norms after the branches and after merging
    width: int = 96  # of the first stage; doubles from stage to stage
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: tuple[int, int] = (7, 7)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    fit: str = "built"
    pad_first: bool = True  # maps are padded to whole windows before they are rolled; timm: after
    mask_value: float = -100.0  # between tokens that only rolling made neighbours; transformers adds it twice in v2
    position_table: bool = False  # learned absolute positions at the stem (the original's APE)
    pretrained_windows: tuple[tuple[int, int], ...] = ()  # v2: per stage, the unit of the offsets; (): the windows as built
    bias_resize: str = "bicubic_corners"  # v1: rule that fits bias tables to another window (layers/position.py)
    norm_eps: float = 1e-5  # everywhere
    init: str = "normal"  # of the products: normal (0.02), as published; xavier, for narrow models from scratch
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        if problem := size_problem(self.image_size, self.patch):
            raise ValueError(problem)
        if len(self.depths) != len(self.heads) or not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths {self.depths} and heads {self.heads} must name one positive number per stage each")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} is not divisible by heads {heads}; nearest valid: {width // 32 or 1}")
        if min(self.window) < 1:
            raise ValueError(f"window is {self.window}; at least (1, 1)")
        for name, value, allowed in (("fit", self.fit, FITS), ("bias_resize", self.bias_resize, BIAS_RULES),
                                     ("version", self.version, (1, 2)), ("init", self.init, INITS)):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        if self.pretrained_windows and len(self.pretrained_windows) != len(self.depths):
            raise ValueError(f"pretrained_windows names {len(self.pretrained_windows)} stages of {len(self.depths)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per stage."""
        return tuple(self.width * 2**s for s in range(len(self.depths)))

    @property
    def grid(self) -> Size:
        """Patches per column and row at the built image size."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]

    @property
    def windows(self) -> tuple[Size, ...]:
        """The window of every stage at the built image size."""
        found = []
        for h, w in grids(self.grid, len(self.depths)):
            wh, ww = self.window
            if self.fit == "built_both" and min(h, w) <= min(wh, ww):
                wh = ww = min(h, w)
            found.append((min(h, wh), min(w, ww)) if self.fit == "built" else (wh, ww))
        return tuple(found)

    def shift(self, stage: int, grid: Size) -> Size:
        """How far odd blocks of a stage move the windows over a map of `grid` tokens."""
        built, window = grids(self.grid, len(self.depths))[stage], self.windows[stage]
        map_size = built if self.fit.startswith("built") else grid
        fits = tuple(side <= step for side, step in zip(map_size, window, strict=True))
        if self.fit.endswith("both"):
            fits = (any(fits), any(fits))
        if self.fit == "always":
            fits = (False, False)
        return (0 if fits[0] else window[0] // 2), (0 if fits[1] else window[1] // 2)


def grids(grid: Size, stages: int) -> list[Size]:
    """Tokens per column and row in every stage: halved, rounded up, from stage to stage."""
    found = [grid]
    for _ in range(stages - 1):
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found


class PatchMerge(nn.Module):
    """Four neighbours, in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column), become one token of twice the width."""

    def __init__(self, width: int, version: int, norm_eps: float):
        super().__init__()
        self.norm_first = version == 1
        self.norm = nn.LayerNorm(4 * width if self.norm_first else 2 * width, norm_eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n/4 2*c"]:
        """Tokens whose neighbours follow each other."""
        b, n, c = x.shape
        x = x.view(b, n // 4, 4 * c)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


class SwinBlock(nn.Module):
    """Attention inside windows, then an MLP; norms before the branches (v1) or after them (v2, section 3.2)."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: float):
        super().__init__()
        width, window = config.widths[stage], config.windows[stage]
        self.norm_first = config.version == 1
        self.norm1 = nn.LayerNorm(width, config.norm_eps)
        self.attn = WindowAttention(
            width, config.heads[stage], window, cosine=config.version == 2, qkv_bias=config.qkv_bias,
            pretrained=config.pretrained_windows[stage] if config.pretrained_windows else window, dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )  # fmt: skip
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.mlp = MLP(width, int(width * config.mlp_ratio), "gelu", config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], layout: Layout) -> Float[Tensor, "b n c"]:
        """Tokens in the layout's order (in raster order where it has padding)."""
        if self.norm_first:
            x = x + self.drop_path(self.attn(self.norm1(x), layout))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        x = x + self.drop_path(self.norm1(self.attn(x, layout)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class StagePlan(NamedTuple):
    """The orders of tokens in a stage for one size of its map: of even blocks, of odd ones, and of merging into it."""

    plain: Layout
    shifted: Layout
    merge: Layout | None

    def to(self, device: torch.device) -> StagePlan:
        """The same on another device."""
        plain = self.plain.to(device)
        shifted = plain if self.shifted is self.plain else self.shifted.to(device)
        return StagePlan(plain, shifted, None if self.merge is None else self.merge.to(device))


class SwinStage(nn.Module):
    """Merging (but in the first stage), then blocks that attend in windows, every second one in shifted windows.

    Between blocks tokens stay in the order of the last block's windows, so that a block costs at most one reordering.
    """

    def __init__(self, config: SwinConfig, stage: int, rates: list[float]):
        super().__init__()
        self.config, self.stage, self.window = config, stage, config.windows[stage]
        sizes = grids(config.grid, stage + 1)
        self.built = (sizes[max(stage - 1, 0)], sizes[stage])  # the map before merging and after
        self.merge = PatchMerge(config.widths[stage - 1], config.version, config.norm_eps) if stage else None
        self.blocks = nn.ModuleList(SwinBlock(config, stage, rate) for rate in rates)
        plan = self.make_plan(*self.built)
        self.plain = LayoutBuffers(plan.plain)
        self.shifted = self.plain if plan.shifted is plan.plain else LayoutBuffers(plan.shifted)
        self.merging = None if plan.merge is None else LayoutBuffers(plan.merge)
        self._kept: dict[tuple[Size, Size, torch.device], StagePlan] = {}

    def plan(self, before: Size, grid: Size) -> StagePlan:
        """`make_plan` on the module's device, made once per size."""
        if (before, grid) == self.built:
            plain = self.plain()
            shifted = plain if self.shifted is self.plain else self.shifted()
            return StagePlan(plain, shifted, None if self.merging is None else self.merging())
        device = self.plain.rows.device
        if torch.compiler.is_compiling():
            return self.make_plan(before, grid).to(device)
        key = (before, grid, device)
        if key not in self._kept:
            if len(self._kept) >= 8:  # pictures of ever new sizes: forget the oldest
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False):
                self._kept[key] = self.make_plan(before, grid).to(device)
        return self._kept[key]

    def make_plan(self, before: Size, grid: Size) -> StagePlan:
        """The orders for a map of `before` tokens that merges into one of `grid` tokens (in the first stage, the same)."""
        c, shift = self.config, self.config.shift(self.stage, grid)
        plain = make_layout(grid, self.window, (0, 0), c.pad_first, c.mask_value)
        shifted = plain if shift == (0, 0) else make_layout(grid, self.window, shift, c.pad_first, c.mask_value)
        if not self.stage:
            return StagePlan(plain, shifted, None)
        quads = window_rows(before, (2, 2)).view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)
        quads = quads if ordered(plain) is None else quads[plain.rows]
        return StagePlan(plain, shifted, order_layout(quads.flatten(), before))


class Swin(Model):
    """A Swin for images of any size that the patch divides; its tokens are the cells of the last map."""

    family = "swin"
    config: SwinConfig

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = c = config
        self.embed = PatchEmbed(c.in_channels, c.width, c.patch)
        self.embed_norm = nn.LayerNorm(c.width, c.norm_eps)
        table = PositionConfig(prefix=False, resize="bicubic_plain")
        self.position = PositionTable(table, c.width, c.grid, 0) if c.position_table else None
        self.drop = nn.Dropout(c.dropout)
        rates = iter(drop_path_rates(c.drop_path, sum(c.depths)))
        self.stages = nn.ModuleList(SwinStage(c, s, [next(rates) for _ in range(d)]) for s, d in enumerate(c.depths))
        self.norm = nn.LayerNorm(c.widths[-1], c.norm_eps)
        self.head = ClassifierHead(c.widths[-1], c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Normalised tokens of the last map. Raises ValueError for a size that the patch does not divide or other channels."""
        return self._run(x, every=False)[-1]

    def pyramid(self, x: Float[Tensor, "b c h w"]) -> list[Features]:
        """The map after every stage, finest first; only the last is normalised."""
        return self._run(x, every=True)

    def _run(self, x: Tensor, every: bool) -> list[Features]:
        self.check_input(x)
        x, (_, h, w) = self.embed(x)
        x = self.embed_norm(x)
        if self.position is not None:
            x = x + self.position((h, w))[1]
        x, order, before, found = self.drop(x), None, (h, w), []
        sizes = grids((h, w), len(self.stages))
        for s, stage in enumerate(self.stages):
            grid = sizes[s]
            plan: StagePlan = stage.plan(before, grid)  # type: ignore[operator]
            if plan.merge is not None:
                if plan.merge.padded:
                    x, order = reorder(x, order, None), None
                x, order = stage.merge(reorder(x, order, plan.merge)), ordered(plan.plain)  # type: ignore[operator]
            for i, block in enumerate(stage.blocks):  # type: ignore[arg-type]
                layout = plan.shifted if i % 2 else plan.plain
                x, order = reorder(x, order, ordered(layout)), ordered(layout)
                x = self.run_block(block, x, layout)
            if every or s == len(sizes) - 1:
                found.append(Features(reorder(x, order, None), (1, *grid), 0))
            before = grid
        found[-1] = found[-1]._replace(tokens=self.norm(found[-1].tokens))
        return found

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The mean of all tokens."""
        return features.tokens.mean(1)

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Attention within the windows of every block; from stage to stage the mean of four neighbours."""
        c, steps = self.config, []
        first = cells = tile((1, size[0] // c.patch[0], size[1] // c.patch[1]), size)
        for s, depth in enumerate(c.depths):
            if s:
                before, cells = cells, coarser(cells, (2, 2), (2, 2), (0, 0), whole_last=True)
                steps.append(Step(cells, (), pooled(before, cells, (2, 2), (2, 2), (0, 0))))
            grid = cells.grid[1:]
            for i in range(depth):
                shift = c.shift(s, grid) if i % 2 else (0, 0)
                rows = window_rows(grid, c.windows[s], shift, c.pad_first)
                apart = window_mask(grid, c.windows[s], shift) if shift != (0, 0) else None
                steps.append(within(f"stages.{s}.blocks.{i}.attn.site", rows, cells, apart))
        return Route(first, tuple(steps), asked_by(cells))

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The patch."""
        return self.config.patch

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.widths[-1], num_classes).to(self.norm.weight.device)

    @classmethod
    def replan(cls, built: SwinConfig, asked: SwinConfig) -> tuple[SwinConfig, list[str]]:
        """v2 goes on measuring offsets in the unit it was trained with; the new windows are reported."""
        if asked.windows == built.windows and asked.grid == built.grid:
            return asked, []
        if asked.version == 2 and not asked.pretrained_windows:
            asked = dataclasses.replace(asked, pretrained_windows=built.windows)
        maps = grids(asked.grid, len(asked.depths))
        cut = ", ".join(f"{w[0]}x{w[1]} of {g[0]}x{g[1]}" for w, g in zip(asked.windows, maps, strict=True))
        return asked, [f"windows at {asked.image_size[0]}x{asked.image_size[1]}: {cut} tokens"]

    def refit(self, name: str, found: Tensor, built: SwinConfig) -> Tensor | None:
        """Bias tables by `bias_resize`, absolute positions bicubically."""
        if name.endswith(".attn.bias.table") and found.shape[1] == self.get_parameter(name).shape[1]:
            stage = int(name.split(".")[1])
            return resize_bias(found, built.windows[stage], self.config.windows[stage], self.config.bias_resize)
        if name == "position.table":
            return resize_grid(found[0], built.grid, self.config.grid, "bicubic_plain")[None]
        return None

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then every block counts; merging belongs to the block before it, final norm and head come last."""
        starts = [sum(self.config.depths[:s]) for s in range(len(self.config.depths))]
        last, ids = sum(self.config.depths) + 1, {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            if part[0] == "stages":
                ids[name] = starts[int(part[1])] + (int(part[3]) + 1 if part[2] == "blocks" else 0)
            else:
                ids[name] = last if part[0] in ("norm", "head") else 0
        return ids

    def no_weight_decay(self) -> set[str]:
        """Position tables, v2's position network and logit scales (the original code's list)."""
        names = {n for n, _ in self.named_parameters()}
        return {n for n in names if ".attn.bias." in n or n.endswith("logit_scale") or n.startswith("position.")}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Products as the config says; in v2 the norms that end a branch start at zero, as in the original code."""
        init_encoder(self, self.config.init)
        for module in self.modules():
            if isinstance(module, SwinBlock) and not module.norm_first:
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)


def _v1(width: int, depth: int, heads: int, window: int, side: int) -> SwinConfig:
    """A row: `depth` blocks in the third stage and two in the others, `heads` in the first stage."""
    return SwinConfig(
        (side, side), width=width, depths=(2, 2, depth, 2), heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        window=(window, window),
    )  # fmt: skip


def _v2(width: int, depth: int, heads: int, window: int) -> SwinConfig:
    return dataclasses.replace(_v1(width, depth, heads, window, 256), version=2)


# Swin paper, section 3.3 (Swin-T, S, B, L) and Table 1 (sizes); Swin v2 paper, section 3.5 (SwinV2-T, S, B).
_SIZES = {"tiny": (96, 6, 3), "small": (96, 18, 3), "base": (128, 18, 4), "large": (192, 18, 6)}

VARIANTS: dict[str, SwinConfig] = {f"swin_{size}_patch4_window7_224": _v1(*row, 7, 224) for size, row in _SIZES.items()}
VARIANTS |= {f"swin_{size}_patch4_window12_384": _v1(*_SIZES[size], 12, 384) for size in ("base", "large")}
VARIANTS |= {f"swinv2_{s}_window{w}_256": _v2(*_SIZES[s], w) for s in ("tiny", "small", "base") for w in (8, 16)}
_MICRO = SwinConfig((16, 16), (2, 2), 3, 10, 1, 16, (2, 2), (2, 4), (4, 4))
VARIANTS |= {"swin_micro": _MICRO, "swinv2_micro": dataclasses.replace(_MICRO, version=2)}

CONFIG = SwinConfig
MODEL = Swin
