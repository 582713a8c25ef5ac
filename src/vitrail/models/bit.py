"""BiT (Kolesnikov et al., "Big Transfer", arXiv 1912.11370): ResNet-v2 with group norm and weight standardisation.

The same trunk with normalisation after the convolutions (ResNet v1.5) is the stem of the hybrid ViTs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.block import DropPath
from vitrail.layers.conv import ReLU, StdConv2d, max_pool_same
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead

from .base import Model, drop_path_rates

STD_RULES, PADDINGS, STEM_POOLS = ("variance", "deviation"), ("symmetric", "same"), ("zeros", "zeros_early", "same", "valid")


@dataclass(frozen=True)
class TrunkConfig:
    """The convolutional trunk: its size, and what its sources do differently.

    `padding` of the convolutions: symmetric (BiT) or same (TensorFlow's, the hybrids). `stem_pool`, how the stem's max pooling
    meets the border: zeros (BiT: zeros take part in the maximum), zeros_early (so too, but already in the statistics of the
    stem's norm: transformers' bottleneck layers), same (they never win: the hybrids), valid (transformers with SAME).
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)  # of the stages' outputs; inside a block a quarter
    stem_width: int = 64
    groups: int = 32
    norm_eps: float = 1e-5  # flax, so the hybrids of vision_transformer: 1e-6
    preactivation: bool = True  # norm and activation before each convolution (v2), or after it (v1.5: the hybrids)
    std_rule: str = "variance"  # where std_eps is added: variance, or deviation (the hybrids of vision_transformer)
    std_eps: float = 1e-8  # timm, transformers; BiT's own code 1e-10; the hybrids of vision_transformer 1e-5
    padding: str = "symmetric"
    stem_pool: str = "zeros"

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        if len(self.depths) != len(self.widths) or any(depth < 1 for depth in self.depths):
            raise ValueError(f"depths {self.depths} and widths {self.widths} must be one each per stage, depths at least 1")
        for name, width in (("stem_width", self.stem_width), *(("widths", w // 4) for w in self.widths)):
            if width % self.groups or width < 1:
                nearest = max(self.groups, round(width / self.groups) * self.groups)
                raise ValueError(
                    f"{width} channels ({name}) do not divide into {self.groups} groups of the norm; nearest: {nearest}"
                )
        allowed = {"std_rule": STD_RULES, "padding": PADDINGS, "stem_pool": STEM_POOLS}
        for name, words in allowed.items():
            if getattr(self, name) not in words:
                raise ValueError(f"trunk.{name} is {getattr(self, name)!r}; allowed: {', '.join(words)}")

    @property
    def stride(self) -> int:
        """Pixels per cell of the last map."""
        return 4 * 2 ** max(len(self.depths) - 1, 0)

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.widths[-1] if self.widths else self.stem_width

    def map_side(self, side: int) -> int:
        """Cells along a side of so many pixels in the last map."""
        side = -(-side // 2)
        side = (side - 3) // 2 + 1 if self.stem_pool == "valid" else -(-side // 2)
        return -(-side // (self.stride // 4))

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1) -> StdConv2d:
        """A convolution by the rules of this trunk."""
        return StdConv2d(cin, cout, kernel, stride, eps=self.std_eps, rule=self.std_rule, padding=self.padding)

    def norm(self, channels: int) -> nn.GroupNorm:
        """A group norm of this trunk."""
        return nn.GroupNorm(self.groups, channels, self.norm_eps)


@dataclass(frozen=True)
class BiTConfig:
    """Everything that decides the function of a BiT; image_size is what it is meant for, any size works."""

    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    num_classes: int = 1000
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    drop_path: float = 0.0
    dropout: float = 0.0  # before the classifier

    def __post_init__(self) -> None:
        """Raise ValueError without stages."""
        if not self.trunk.depths:
            raise ValueError("trunk.depths is empty; a BiT has at least one stage")


class Stem(nn.Module):
    """7x7 convolution and max pooling, each of stride 2; norm and activation between them unless the blocks begin with them."""

    def __init__(self, in_channels: int, c: TrunkConfig):
        super().__init__()
        self.conv = c.conv(in_channels, c.stem_width, 7, 2)
        self.norm = nn.Identity() if c.preactivation else c.norm(c.stem_width)
        self.act = nn.Identity() if c.preactivation else ReLU()
        self.pool = c.stem_pool

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """A map of a quarter of the input's sides."""
        x = self.conv(x)
        if self.pool == "zeros_early":
            x = F.pad(x, (1, 1, 1, 1))
        x = self.act(self.norm(x))
        if self.pool == "same":
            return max_pool_same(x)
        if self.pool == "zeros":
            x = F.pad(x, (1, 1, 1, 1))
        return F.max_pool2d(x, 3, 2)


class PreActivationBlock(nn.Module):
    """Three times norm, ReLU, convolution (1x1, 3x3 with the stride, 1x1); a projection shortcut reads the activated input."""

    def __init__(self, cin: int, cout: int, stride: int, first: bool, c: TrunkConfig, drop_path: float):
        super().__init__()
        inner = cout // 4
        self.norm1, self.conv1 = c.norm(cin), c.conv(cin, inner, 1)
        self.norm2, self.conv2 = c.norm(inner), c.conv(inner, inner, 3, stride)
        self.norm3, self.conv3 = c.norm(inner), c.conv(inner, cout, 1)
        self.shortcut = c.conv(cin, cout, 1, stride) if first else None
        self.act, self.drop_path = ReLU(), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Residual of the raw sum."""
        active = self.act(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        y = self.conv2(self.act(self.norm2(self.conv1(active))))
        y = self.drop_path(self.conv3(self.act(self.norm3(y))))
        y += shortcut  # in place: one map less to allocate
        return y


class PostActivationBlock(nn.Module):
    """Convolution and norm three times (1x1, 3x3 with the stride, 1x1), ReLU between them and after the sum (ResNet v1.5)."""

    def __init__(self, cin: int, cout: int, stride: int, first: bool, c: TrunkConfig, drop_path: float):
        super().__init__()
        inner = cout // 4
        self.conv1, self.norm1 = c.conv(cin, inner, 1), c.norm(inner)
        self.conv2, self.norm2 = c.conv(inner, inner, 3, stride), c.norm(inner)
        self.conv3, self.norm3 = c.conv(inner, cout, 1), c.norm(cout)
        self.shortcut = c.conv(cin, cout, 1, stride) if first else None
        self.shortcut_norm = c.norm(cout) if first else None
        self.act, self.drop_path = ReLU(), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Post-activation residual."""
        y = self.act(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))
        y = self.drop_path(self.norm3(self.conv3(y)))
        y += x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))  # type: ignore[misc]
        return self.act(y)


def build_stages(c: TrunkConfig, drop_path: float) -> nn.ModuleList:
    """The stages behind the stem; each but the first halves the sides, its first block has a projection shortcut."""
    kind = PreActivationBlock if c.preactivation else PostActivationBlock
    rates, channels, stages = iter(drop_path_rates(drop_path, sum(c.depths))), c.stem_width, nn.ModuleList()
    for s, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True)):
        blocks = nn.Sequential()
        for i in range(depth):
            blocks.append(kind(channels, width, 2 if s > 0 and i == 0 else 1, i == 0, c, next(rates)))
            channels = width
        stages.append(blocks)
    return stages


@torch.no_grad()
def init_trunk(trunk: nn.Module) -> None:
    """He initialisation; where a norm ends a branch, it starts at zero, so that blocks start as identities."""
    for module in trunk.modules():
        if isinstance(module, StdConv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, PostActivationBlock):
            nn.init.zeros_(module.norm3.weight)


class BiT(Model):
    """A BiT for images of any size; its tokens are the cells of the last feature map, normalised and activated."""

    family = "bit"
    config: BiTConfig

    def __init__(self, config: BiTConfig):
        super().__init__()
        self.config, c = config, config.trunk
        self.stem = Stem(config.in_channels, c)
        self.stages = build_stages(c, config.drop_path)
        self.norm = c.norm(c.width) if c.preactivation else nn.Identity()
        self.act = ReLU() if c.preactivation else nn.Identity()
        self.drop = nn.Dropout(config.dropout)
        self.head = ClassifierHead(c.width, config.num_classes)
        init_trunk(self)

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Cells of the last feature map as tokens, row by row. Raises ValueError for another number of channels."""
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c h w"]) -> list[Features]:
        """The feature map after every stage, finest first; the last one normalised and activated."""
        self.check_input(x)
        x, maps = self.stem(x), []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = self.run_block(block, x)
            maps.append(x)
        maps[-1] = self.act(self.norm(x))
        return [Features(m.flatten(2).transpose(1, 2), (1, m.shape[2], m.shape[3]), 0) for m in maps]

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The mean over the feature map."""
        return self.drop(features.tokens.mean(1))

    @property
    def input_multiple(self) -> tuple[int, int]:
        """Any size works."""
        return (1, 1)

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.trunk.width, num_classes).to(self.stem.conv.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then every block counts, final norm and head last."""
        depths = self.config.trunk.depths
        starts, last = [sum(depths[:s]) for s in range(len(depths))], sum(depths) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            ids[name] = starts[int(part[1])] + int(part[2]) + 1 if part[0] == "stages" else (0 if part[0] == "stem" else last)
        return ids


def _row(depths: tuple[int, ...], factor: int) -> BiTConfig:
    return BiTConfig(trunk=TrunkConfig(depths, tuple(256 * factor * 2**s for s in range(4)), 64 * factor))


# BiT paper, section 3.1 (R50x1, R50x3, R101x1, R101x3, R152x4) and the published R152x2
VARIANTS: dict[str, BiTConfig] = {
    "resnetv2_50x1_bit": _row((3, 4, 6, 3), 1),
    "resnetv2_50x3_bit": _row((3, 4, 6, 3), 3),
    "resnetv2_101x1_bit": _row((3, 4, 23, 3), 1),
    "resnetv2_101x3_bit": _row((3, 4, 23, 3), 3),
    "resnetv2_152x2_bit": _row((3, 8, 36, 3), 2),
    "resnetv2_152x4_bit": _row((3, 8, 36, 3), 4),
    "resnetv2_micro": BiTConfig((16, 16), 3, 10, TrunkConfig((1, 1), (32, 64), 16, groups=8)),
}

CONFIG = BiTConfig
MODEL = BiT
