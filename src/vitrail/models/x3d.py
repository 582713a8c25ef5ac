"""X3D (Feichtenhofer, arXiv 2004.04730): a small convolutional network for clips, expanded along one axis at a time."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.block import DropPath
from vitrail.layers.conv import ConvNorm, ReLU
from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead, window_means

from .base import Model, drop_path_rates

Swish = partial(nn.SiLU, inplace=True)


@dataclass(frozen=True)
class X3DConfig:
    """Everything that decides the function of an X3D; frames and image_size are what it is meant for, any clip works."""

    image_size: tuple[int, int] = (160, 160)
    frames: int = 13
    in_channels: int = 3
    num_classes: int = 400
    depths: tuple[int, ...] = (3, 5, 11, 7)
    widths: tuple[int, ...] = (24, 48, 96, 192)  # of the stages; the stem has the first one's
    bottleneck: float = 2.25  # width inside a block over the stage's width
    head_width: int = 2048
    plain_shortcut: bool = False  # pytorchvideo: a projection shortcut between equal widths has no normalisation
    drop_path: float = 0.0
    dropout: float = 0.0  # before the classifier; published: 0.5

    def __post_init__(self) -> None:
        """Raise ValueError on empty or unequal stages."""
        if len(self.depths) != len(self.widths) or not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths {self.depths} and widths {self.widths} must name as many stages of at least one block")

    @property
    def inner(self) -> tuple[int, ...]:
        """Widths inside the blocks."""
        return tuple(int(width * self.bottleneck) for width in self.widths)


def squeeze_width(width: int) -> int:
    """Width of squeeze-and-excitation's middle: a sixteenth, rounded to a multiple of 8 that is not much smaller."""
    wanted = width / 16
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class SqueezeExcite(nn.Module):
    """Gates every channel by a function of all channels' means (arXiv 1709.01507)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, squeeze_width(width))
        self.fc2 = nn.Linear(squeeze_width(width), width)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        """Scaled channels."""
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3, 4))))))
        return x * gate[:, :, None, None, None]


class Bottleneck(nn.Module):
    """1x1x1, depthwise 3x3x3 (with the stride; gated in every other block) and 1x1x1 convolutions, and a shortcut."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int, gated: bool, plain_shortcut: bool, drop_path: float):
        super().__init__()
        self.conv1 = ConvNorm(cin, inner, (1, 1, 1))
        self.conv2 = ConvNorm(inner, inner, (3, 3, 3), (1, stride, stride), act=None, groups=inner)
        self.gate = SqueezeExcite(inner) if gated else nn.Identity()
        self.act2 = Swish()
        self.conv3 = ConvNorm(inner, cout, (1, 1, 1), act=None)
        bare = plain_shortcut and cin == cout
        self.shortcut = (
            ConvNorm(cin, cout, (1, 1, 1), (1, stride, stride), act=None, norm=not bare)
            if stride > 1 or cin != cout
            else nn.Identity()
        )
        self.drop_path = DropPath(drop_path)
        self.act = ReLU()

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t i j"]:
        """Post-activation residual."""
        y = self.conv3(self.act2(self.gate(self.conv2(self.conv1(x)))))
        y = self.drop_path(y)
        y += self.shortcut(x)  # in place: one map less to allocate
        return self.act(y)


class X3D(Model):
    """An X3D for clips of any length and size; its tokens are the cells of the map before the pooling, time unpooled."""

    family = "x3d"
    config: X3DConfig

    def __init__(self, config: X3DConfig):
        super().__init__()
        self.config = c = config
        self.stem_space = ConvNorm(c.in_channels, c.widths[0], (1, 3, 3), (1, 2, 2), act=None, norm=False)
        self.stem_time = ConvNorm(c.widths[0], c.widths[0], (5, 1, 1), groups=c.widths[0])
        rates = iter(drop_path_rates(c.drop_path, sum(c.depths)))
        channels, stages = c.widths[0], []
        for depth, width, inner in zip(c.depths, c.widths, c.inner, strict=True):
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(channels, inner, width, 2 if i == 0 else 1, i % 2 == 0, c.plain_shortcut, next(rates)))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.expand = ConvNorm(channels, c.inner[-1], (1, 1, 1))
        self.squeeze = nn.Linear(c.inner[-1], c.head_width, bias=False)  # after the pooling: no cost per position
        self.drop = nn.Dropout(c.dropout)
        self.head = ClassifierHead(c.head_width, c.num_classes)
        self._init_weights()

    def features(self, x: Float[Tensor, "b c t h w"]) -> Features:
        """Cells of the last map, after the head's first convolution. Raises ValueError for another rank or channels."""
        return self.pyramid(x)[-1]

    def pyramid(self, x: Float[Tensor, "b c t h w"]) -> list[Features]:
        """The map after every stage, finest first; the last stage's behind the head's first convolution."""
        self.check_input(x)
        # Depthwise convolutions over three axes run ten times faster on CPUs with channels innermost (measured).
        x = self.stem_time(self.stem_space(x.contiguous(memory_format=torch.channels_last_3d)))
        found = []
        for i, stage in enumerate(self.stages):
            for block in stage:  # type: ignore[attr-defined]
                x = self.run_block(block, x)
            if i + 1 == len(self.stages):
                x = self.expand(x)
            found.append(Features(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3], x.shape[4]), 0))
        return found

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The mean over the whole map, through the head's hidden layer."""
        return self.drop(F.relu(self.squeeze(features.tokens.mean(1))))

    def position_logits(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b p k"]:
        """Logits at every position of a window of the built size, for clips of that size or larger ones."""
        c, shrunk = self.config, 2 ** (len(self.config.depths) + 1)
        window = (c.frames, math.ceil(c.image_size[0] / shrunk), math.ceil(c.image_size[1] / shrunk))
        means = window_means(self.features(x), window)
        return self.head(F.relu(self.squeeze(means.flatten(0, 1)))).unflatten(0, means.shape[:2])

    def probabilities(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b k"]:
        """The published answer: softmax of the logits at every position, then their mean.

        At the built size there is one position and this is the softmax of `forward`'s logits; on larger clips `forward`
        averages the map before the classifier instead.
        """
        return self.position_logits(x).softmax(-1).mean(1)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        return (self.config.in_channels, self.config.frames, *self.config.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """Any size works."""
        return (1, 1)

    def reset_head(self, num_classes: int) -> None:
        """A new zero-initialised classifier."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = ClassifierHead(self.config.head_width, num_classes).to(self.squeeze.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Stem 0, then every block counts, the head last."""
        starts = [sum(self.config.depths[:s]) for s in range(len(self.config.depths))]
        last = sum(self.config.depths) + 1
        ids = {}
        for name, _ in self.named_parameters():
            part = name.split(".")
            tail = last if part[0] in ("expand", "squeeze", "head") else 0
            ids[name] = starts[int(part[1])] + int(part[2]) + 1 if part[0] == "stages" else tail
        return ids

    @torch.no_grad()
    def _init_weights(self) -> None:
        """He initialisation; the last normalisation of a branch starts at zero, so that blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.norm.weight)  # type: ignore[arg-type]
        nn.init.normal_(self.squeeze.weight, std=0.01)


# X3D paper, Table 3 and section 4.1: frames and size, widths times gamma_w, depths times gamma_d
VARIANTS: dict[str, X3DConfig] = {
    "x3d_xs": X3DConfig((160, 160), 4),
    "x3d_s": X3DConfig((160, 160), 13),
    "x3d_m": X3DConfig((224, 224), 16),
    "x3d_l": X3DConfig((312, 312), 16, depths=(5, 10, 25, 15)),
    "x3d_xl": X3DConfig((312, 312), 16, depths=(5, 10, 25, 15), widths=(32, 72, 136, 280)),
    "x3d_micro": X3DConfig((16, 16), 4, num_classes=10, depths=(1, 2), widths=(8, 16), head_width=64),
}

CONFIG = X3DConfig
MODEL = X3D
