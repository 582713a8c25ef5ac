"""TimeSformer (Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", arXiv 2102.05095)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.block import INITS, MLP, Attention, BlockConfig, DropPath, heads_problem, init_encoder
from vitrail.layers.embed import PatchEmbed, frames_problem, size_problem
from vitrail.layers.features import Features
from vitrail.layers.fold import Grid, fold, fold_rows, unfold
from vitrail.layers.head import ClassifierHead
from vitrail.layers.position import POSITION_STD, VIDEO_KINDS, VideoPosition
from vitrail.layers.route import Route, asked_by, tile, whole, within

from .base import Model, drop_path_rates

# What the tokens of a clip attend to, one step after the other in every block (section 3, figure 2 and Table 1).
SCHEMES: dict[str, tuple[str, ...]] = {
    "space": ("space",),
    "joint": ("joint",),
    "divided": ("time", "space"),
    "local_global": ("local", "sparse"),
    "axial": ("time", "width", "height"),
}


@dataclass(frozen=True)
class TimeSformerConfig:
    """Everything that decides the function of a TimeSformer; sizes are (height, width) in pixels.

    local_global: every patch attends to the T x H/2 x W/2 patches of its quarter of the picture, then to every second patch
    along time, height and width. axial: along time, then width, then height.
    """

    image_size: tuple[int, int] = (224, 224)
    frames: int = 8
    patch: tuple[int, int] = (16, 16)
    in_channels: int = 3
    num_classes: int = 400
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    attention: str = "divided"  # space, joint, divided, local_global, axial
    position: str = "separate"  # separate (space + time), joint, none; Table 4 compares them
    resize: str = "nearest"  # the published rule for positions of another grid
    norm_eps: float = 1e-6
    activation: str = "gelu"
    init: str = "normal"  # 0.02, times and new steps zero, as published; xavier (positions 0.5): for narrow models from scratch
    qkv_bias: bool = True
    drop_path: float = 0.0  # 0.1 in the published training
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        for name, allowed in (("attention", tuple(SCHEMES)), ("position", VIDEO_KINDS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for problem in (
            size_problem(self.image_size, self.input_multiple),
            frames_problem(self.frames, self.frame_multiple),
            heads_problem(self.width, self.heads),
        ):
            if problem:
                raise ValueError(problem)

    @property
    def pool(self) -> str:
        """What a clip's answer is read from."""
        return "cls"

    @property
    def input_multiple(self) -> tuple[int, int]:
        """(height, width) that image sizes must be multiples of: the patch, two of them where the picture is quartered."""
        halves = 2 if self.attention == "local_global" else 1
        return self.patch[0] * halves, self.patch[1] * halves

    @property
    def frame_multiple(self) -> int:
        """What the number of frames must be a multiple of."""
        return 2 if self.attention == "local_global" else 1

    @property
    def grid(self) -> Grid:
        """Frames, and patches per column and row, at the built size."""
        return self.frames, self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]


class Step(nn.Module):
    """Attention of a block's earlier steps: among the patches of each group, through a linear layer of its own.

    Under the published initialisation the last layer starts at zero, so that a new step changes nothing (in every block).
    """

    def __init__(self, config: BlockConfig, axis: str):
        super().__init__()
        self.axis = axis
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.fc = nn.Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """The branch of the patches (b, T*H*W, c)."""
        return unfold(self.fc(self.attn(self.norm(fold(x, grid, self.axis)))), grid, self.axis)


class TimeSformerBlock(nn.Module):
    """Earlier steps on the patches alone, a last step with the class token in every group, then the MLP.

    In the last step each group sees a copy of the class token, and the copies' answers are averaged. The sites carry the
    names of what they attend over: `steps.time.attn.site`, `attn.space.site`.
    """

    def __init__(self, config: BlockConfig, axes: tuple[str, ...], drop_path: float):
        super().__init__()
        self.axes = axes
        self.steps = nn.ModuleDict({axis: Step(config, axis) for axis in axes[:-1]})
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = nn.ModuleDict({axes[-1]: Attention(config)})
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.mlp_dim, config.activation, config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Class token and patches (b, 1 + T*H*W, c)."""
        token, patches = x[:, :1], x[:, 1:]
        for axis in self.axes[:-1]:
            patches = patches + self.drop_path(self.steps[axis](patches, grid))
        if len(self.axes) > 1:
            x = torch.cat([token, patches], 1)
        x = x + self.drop_path(self._last(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _last(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        axis = self.axes[-1]
        attn = self.attn[axis]
        if len(self.axes) == 1:  # all tokens that came in; for `space` those of one frame
            return attn(x)
        b, _, c = x.shape
        groups = fold(x[:, 1:], grid, axis)
        copies = x[:, :1].expand(-1, groups.shape[0] // b, -1).reshape(-1, 1, c)
        y = attn(torch.cat([copies, groups], 1))
        token = y[:, 0].unflatten(0, (b, -1)).mean(1, keepdim=True)
        return torch.cat([token, unfold(y[:, 1:], grid, axis)], 1)


class TimeSformer(Model):
    """A TimeSformer for clips of any size that the patch divides; positions are resized when it is not the built one.

    Tokens lie in (T, H, W) order; the published code has time fastest, which changes no function.
    """

    family = "timesformer"
    config: TimeSformerConfig

    def __init__(self, config: TimeSformerConfig):
        super().__init__()
        self.config = c = config
        self.embed = PatchEmbed(c.in_channels, c.width, c.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, c.width))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        self.framewise = c.attention == "space"  # every frame is a picture of its own, up to the last norm
        grid, kind = (c.grid, c.position) if not self.framewise else ((1, *c.grid[1:]), "joint")
        std = None if c.init == "normal" else POSITION_STD[c.init]
        self.position = None if c.position == "none" else VideoPosition(kind, c.width, grid, 1, c.resize, std)
        self.drop = nn.Dropout(c.dropout)
        shared = BlockConfig(
            c.width, c.heads, c.mlp_dim, c.norm_eps, c.activation, c.qkv_bias,
            dropout=c.dropout, attention_dropout=c.attention_dropout,
        )  # fmt: skip
        rates = drop_path_rates(c.drop_path, c.depth)
        self.blocks = nn.ModuleList(TimeSformerBlock(shared, SCHEMES[c.attention], rate) for rate in rates)
        self.norm = nn.LayerNorm(c.width, c.norm_eps)
        self.head = ClassifierHead(c.width, c.num_classes)
        init_encoder(self, c.init)
        for module in self.modules():
            if isinstance(module, Step) and c.init == "normal":
                nn.init.zeros_(module.fc.weight)

    def features(self, x: Float[Tensor, "b c t h w"]) -> Features:
        """Normalised tokens after the last block, behind one class token (of `space`, the mean of the frames' class tokens).

        Raises ValueError for another rank, another number of channels, or frames or sides that do not divide.
        """
        self.check_input(x)
        b, t, c = x.shape[0], x.shape[2], self.config.width
        tokens, (_, h, w) = self.embed(x.transpose(1, 2).flatten(0, 1))
        grid = (t, h, w)
        tokens = tokens if self.framewise else tokens.reshape(b, t * h * w, c)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        if self.position is not None:
            tokens = tokens + self.position((1, h, w) if self.framewise else grid)
        tokens = self.drop(tokens)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, grid)
        if self.framewise:
            token = tokens[:, 0].view(b, t, c).mean(1, keepdim=True)
            tokens = torch.cat([token, tokens[:, 1:].reshape(b, t * h * w, c)], 1)
        return Features(self.norm(tokens), grid, 1)

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Along one axis after the other, or all to all; `space` has one class token a frame up to the end."""
        grid = (size[0], size[1] // self.config.patch[0], size[2] // self.config.patch[1])
        cells, steps = tile(grid, size, grid[0] if self.framewise else 1), []
        for i in range(len(self.blocks)):
            for axis in SCHEMES[self.config.attention][:-1]:
                steps.append(within(f"blocks.{i}.steps.{axis}.attn.site", fold_rows(grid, axis) + 1, cells))
            axis = SCHEMES[self.config.attention][-1]
            name = f"blocks.{i}.attn.{axis}.site"
            if axis == "joint":
                steps.append(whole(name, cells))
                continue
            patches = fold_rows(grid, axis) + cells.prefix
            token = torch.arange(grid[0]) if self.framewise else torch.zeros(len(patches), dtype=torch.long)
            steps.append(within(name, torch.cat([token[:, None], patches], 1), cells))
        if not self.framewise:
            return Route(cells, tuple(steps), asked_by(cells, "cls"))
        tokens = torch.zeros(cells.tokens)
        tokens[: cells.prefix] = 1 / cells.prefix
        return Route(cells, tuple(steps), {"the class tokens of all frames": tokens})

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token."""
        return features.tokens[:, 0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        return (self.config.in_channels, self.config.frames, *self.config.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The patch, twice of it for the local-global scheme."""
        return self.config.input_multiple

    @property
    def frame_multiple(self) -> int:
        """1, or 2 for the local-global scheme."""
        return self.config.frame_multiple

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.width, num_classes).to(self.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, block i at i + 1, final norm and head at depth + 1."""
        last, ids = self.config.depth + 1, {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            ids[name] = int(part[1]) + 1 if part[0] == "blocks" else (last if part[0] in ("norm", "head") else 0)
        return ids

    def no_weight_decay(self) -> set[str]:
        """The class token and the position tables."""
        return {n for n, _ in self.named_parameters() if n.split(".")[0] in ("class_token", "position")}


# Section 4.1 (default, HR and L) and Table 1 (attention schemes); 400 classes as published for Kinetics.
VARIANTS: dict[str, TimeSformerConfig] = {
    "timesformer_base_divided_8x224": TimeSformerConfig(),
    "timesformer_base_divided_hr_16x448": TimeSformerConfig(frames=16, image_size=(448, 448)),
    "timesformer_base_divided_l_96x224": TimeSformerConfig(frames=96),
    "timesformer_base_space_8x224": TimeSformerConfig(attention="space"),
    "timesformer_base_joint_8x224": TimeSformerConfig(attention="joint"),
    "timesformer_base_local_global_8x224": TimeSformerConfig(attention="local_global"),
    "timesformer_base_axial_8x224": TimeSformerConfig(attention="axial"),
    "timesformer_micro": TimeSformerConfig(
        image_size=(16, 16), frames=4, patch=(4, 4), num_classes=10, width=32, depth=3, heads=4, mlp_dim=128
    ),
}

CONFIG = TimeSformerConfig
MODEL = TimeSformer
