"""ResNet v1.5 (He et al., arXiv 1512.03385; stride on the 3x3 convolution): the convolutional baseline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.block import DropPath
from vitrail.layers.conv import ConvNorm, ReLU
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead

from .base import Model, drop_path_rates


@dataclass(frozen=True)
class ResNetConfig:
    """Everything that decides the function of a ResNet; image_size is what it is meant for, any size works."""

    image_size: tuple[int, int] = (224, 224)
    in_channels: int = 3
    num_classes: int = 1000
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64  # channels of the stem and of the first stage's inner convolutions
    bottleneck: bool = True
    small_input: bool = False  # 3x3 stem of stride 1 without pooling, for pictures of about 32 pixels (the paper's section 4.2)
    drop_path: float = 0.0
    dropout: float = 0.0  # before the classifier

    def __post_init__(self) -> None:
        """Raise ValueError on empty stages."""
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths is {self.depths}; every stage needs at least one block")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, cin: int, inner: int, stride: int, drop_path: float):
        super().__init__()
        self.conv1 = ConvNorm(cin, inner, 3, stride)
        self.conv2 = ConvNorm(inner, inner, 3, act=None)
        self.shortcut = ConvNorm(cin, inner, 1, stride, act=None) if stride > 1 or cin != inner else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.act = ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Post-activation residual."""
        y = self.drop_path(self.conv2(self.conv1(x)))
        y += self.shortcut(x)  # in place: one map less to allocate
        return self.act(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride: v1.5) and 1x1 convolutions and a shortcut; the output is four times as wide as the inside."""

    expansion = 4

    def __init__(self, cin: int, inner: int, stride: int, drop_path: float):
        super().__init__()
        cout = inner * self.expansion
        self.conv1 = ConvNorm(cin, inner, 1)
        self.conv2 = ConvNorm(inner, inner, 3, stride)
        self.conv3 = ConvNorm(inner, cout, 1, act=None)
        self.shortcut = ConvNorm(cin, cout, 1, stride, act=None) if stride > 1 or cin != cout else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.act = ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Post-activation residual."""
        y = self.drop_path(self.conv3(self.conv2(self.conv1(x))))
        y += self.shortcut(x)  # in place: one map less to allocate
        return self.act(y)


class ResNet(Model):
    """A ResNet for images of any size; its tokens are the cells of the last feature map."""

    family = "resnet"
    normalised_stages = True
    config: ResNetConfig

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.config = c = config
        if c.small_input:
            self.stem = ConvNorm(c.in_channels, c.width, 3)
            self.stem_pool: nn.Module = nn.Identity()
        else:
            self.stem = ConvNorm(c.in_channels, c.width, 7, 2)
            self.stem_pool = nn.MaxPool2d(3, 2, 1)
        kind = Bottleneck if c.bottleneck else BasicBlock
        rates = iter(drop_path_rates(c.drop_path, sum(c.depths)))
        channels, stages = c.width, []
        for s, depth in enumerate(c.depths):
            inner, blocks = c.width * 2**s, []
            for i in range(depth):
                blocks.append(kind(channels, inner, 2 if s > 0 and i == 0 else 1, next(rates)))
                channels = inner * kind.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.dim = channels
        self.drop = nn.Dropout(c.dropout)
        self.head = ClassifierHead(channels, c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Cells of the last feature map as tokens, row by row. Raises ValueError for another number of channels."""
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c h w"]) -> list[Features]:
        """The feature map after every stage, finest first."""
        self.check_input(x)
        x = self.stem_pool(self.stem(x))
        found = []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = self.run_block(block, x)
            found.append(Features(x.flatten(2).transpose(1, 2), (1, x.shape[2], x.shape[3]), 0))
        return found

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
        self.head = ClassifierHead(self.dim, num_classes).to(self.stem.conv.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then every block counts, the head last."""
        starts = [sum(self.config.depths[:s]) for s in range(len(self.config.depths))]
        last = sum(self.config.depths) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            ids[name] = starts[int(part[1])] + int(part[2]) + 1 if part[0] == "stages" else (last if part[0] == "head" else 0)
        return ids

    @torch.no_grad()
    def _init_weights(self) -> None:
        """He initialisation; the last normalisation of a branch starts at zero, so that blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.norm.weight)  # type: ignore[arg-type]
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.conv2.norm.weight)  # type: ignore[arg-type]


# ResNet paper, Table 1
VARIANTS: dict[str, ResNetConfig] = {
    "resnet18": ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetConfig(depths=(3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3)),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
    "resnet152": ResNetConfig(depths=(3, 8, 36, 3)),
    "resnet_micro": ResNetConfig((16, 16), 3, 10, depths=(1, 1), width=16, bottleneck=False, small_input=True),
}

CONFIG = ResNetConfig
MODEL = ResNet
