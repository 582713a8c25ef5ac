"""Progressive resolution: the first part of a run sees smaller pictures, which cost less (arXiv 2104.00298, section 4).

The size is a pure function of the step, so that a resumed run goes on exactly. Pictures are loaded and augmented at the input
size and made smaller on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.config import ConfigError, ScheduleConfig
from vitrail.cost import count_flops
from vitrail.models import Model

Size = tuple[int, int]


@dataclass(frozen=True)
class Progressive:
    """Sizes of the run's equal first parts, which take `share` of its steps; costs: theirs relative to the input size's."""

    sizes: tuple[Size, ...] = ()
    costs: tuple[float, ...] = ()
    share: float = 0.0

    def part(self, step: int, total: int) -> int:
        """Which part a step belongs to, len(sizes) once the input size is reached."""
        if not self.sizes or step >= self.share * total:
            return len(self.sizes)
        return int(step * len(self.sizes) / (self.share * total))

    def size(self, step: int, total: int) -> Size | None:
        """Height and width that a step trains at, None for the input size."""
        part = self.part(step, total)
        return self.sizes[part] if part < len(self.sizes) else None

    def cost(self, step: int, total: int) -> float:
        """FLOPs of a step relative to one at the input size."""
        part = self.part(step, total)
        return self.costs[part] if part < len(self.costs) else 1.0

    @property
    def mean_cost(self) -> float:
        """FLOPs of the whole run relative to one at the input size throughout."""
        return 1 - self.share + self.share * sum(self.costs) / len(self.costs) if self.costs else 1.0

    def __str__(self) -> str:
        parts = ", then ".join(f"{h} x {w}" for h, w in self.sizes)
        return f"{parts} for {self.share:.0%} of the steps in all; the run costs {self.mean_cost:.0%} of one at the input size"


def plan_sizes(model: Model, config: ScheduleConfig) -> Progressive:
    """The sizes of the settings, whose sides are the shorter ones; raises ConfigError for sizes that this model cannot take."""
    if not config.progressive:
        return Progressive()
    height, width = model.config.image_size
    short, multiple = min(height, width), model.input_multiple
    if list(config.progressive) != sorted(set(config.progressive)) or config.progressive[-1] >= short:
        raise ConfigError(f"progressive {config.progressive}: sides must rise and stay below the input's, {short}")
    if not 0 < config.progressive_share < 1:
        raise ConfigError(f"progressive_share is {config.progressive_share:g}; allowed: above 0 and below 1")
    sizes, costs, full = [], [], count_flops(model)
    for side in config.progressive:
        sides = (side * height / short, side * width / short)
        size = tuple(max(round(s / m), 1) * m for s, m in zip(sides, multiple, strict=True))
        if min(size) != side:
            raise ConfigError(f"progressive {side}: the model's sides are multiples of {max(multiple)}; nearest: {min(size)}")
        try:
            costs.append(count_flops(model, (*model.input_shape[:-2], *size)) / full)
        except (ValueError, RuntimeError) as problem:
            raise ConfigError(f"progressive {side}: {model.name or model.family} cannot be trained at it ({problem})") from None
        sizes.append((size[0], size[1]))
    return Progressive(tuple(sizes), tuple(costs), config.progressive_share)


def shrink(images: Float[Tensor, "b c *t h w"], size: Size) -> Float[Tensor, "b c *t H W"]:
    """Pictures or clips at a smaller size, antialiased."""
    if images.ndim == 4:
        return F.interpolate(images, size, mode="bilinear", antialias=True)
    frames = images.movedim(2, 1)
    small = F.interpolate(frames.flatten(0, 1), size, mode="bilinear", antialias=True)
    return small.unflatten(0, frames.shape[:2]).movedim(1, 2)
