"""The smallest model that takes clips: what the tests of the data path need, and nothing of a family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from vitrail.layers.features import Features
from vitrail.models import Model


@dataclass(frozen=True)
class ClipConfig:
    image_size: tuple[int, int] = (32, 32)
    frames: int = 4
    in_channels: int = 3
    num_classes: int = 8
    width: int = 8


class ClipNet(Model):
    """One convolution over time and space, averaged."""

    family: ClassVar[str] = "clip"

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv3d(config.in_channels, config.width, (2, 4, 4), (2, 4, 4))
        self.head = nn.Linear(config.width, config.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.config.in_channels, self.config.frames, *self.config.image_size)

    @property
    def input_multiple(self) -> tuple[int, int]:
        return (4, 4)

    def features(self, x: Tensor) -> Features:
        self.check_input(x)
        x = self.stem(x).relu()
        return Features(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3], x.shape[4]), 0)

    def pool(self, features: Features) -> Tensor:
        return features.tokens.mean(1)

    def reset_head(self, num_classes: int) -> None:
        self.config = replace(self.config, num_classes=num_classes)
        self.head = nn.Linear(self.config.width, num_classes)

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.startswith("head")) for name, _ in self.named_parameters()}
