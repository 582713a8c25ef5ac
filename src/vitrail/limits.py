"""The numbers that settings may take: one table, checked wherever settings are put to use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrail.fields import ConfigError


@dataclass(frozen=True)
class Limits:
    """An interval, and how it is called in an error."""

    low: float
    high: float = math.inf
    above: bool = False  # the low end itself is not allowed
    below: bool = False  # the high end itself is not allowed

    def hold(self, value: float) -> bool:
        """Whether the value is a finite number of the interval."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and over and under

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low if math.isinf(self.high) else f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


_COUNT, _ONE_OR_MORE, _POSITIVE = Limits(0), Limits(1), Limits(0, above=True)
_SHARE, _PART, _DECAY = Limits(0, 1), Limits(0, 1, below=True), Limits(0, 1, above=True)

# By the setting's own name, which no two sections share. Augmentation checks its own (`data.augment`).
LIMITS: dict[str, Limits] = {
    # data
    "val_fraction": _PART, "frame_rate": _POSITIVE, "max_pixels": _ONE_OR_MORE, "max_samples": _COUNT, "workers": Limits(-1),
    # input
    "channels": _ONE_OR_MORE, "crop_fraction": _DECAY, "frames": _ONE_OR_MORE, "stride": _ONE_OR_MORE, "fps": _COUNT,
    "clips": _ONE_OR_MORE, "crops": _ONE_OR_MORE,
    # objective, teacher, transfer
    "label_smoothing": _SHARE, "balance_power": _COUNT, "distill_weight": _SHARE, "distill_temperature": _POSITIVE,
    "lora_rank": _COUNT, "lora_alpha": _COUNT,
    # optimiser
    "lr": _COUNT, "lr_batch": _COUNT, "weight_decay": _COUNT, "beta1": _PART, "beta2": _PART, "momentum": _PART,
    "clip_norm": _COUNT, "layer_decay": _DECAY, "ema": _PART,
    # schedule
    "epochs": _POSITIVE, "steps": _COUNT, "time_budget": _COUNT, "warmup_epochs": _COUNT, "warmup_steps": _COUNT,
    "min_lr": _SHARE, "step_factor": _DECAY, "progressive_share": _SHARE, "patience": _COUNT,
    # the run
    "batch_size": _ONE_OR_MORE, "accumulate": _ONE_OR_MORE, "eval_every": _POSITIVE, "probe_every": _POSITIVE,
    "save_every_steps": _COUNT, "save_every_minutes": _COUNT, "keep_last": _COUNT, "max_nonfinite": _COUNT,
}  # fmt: skip


def check_limits(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for the first number that a setting of that name may not be. None stands for "not set"."""
    for name, value in settings.items():
        limits = LIMITS.get(name)
        if limits is not None and value is not None and not limits.hold(value):
            raise ConfigError(f"{name} is {value:g}; it must be {limits}" + ("" if math.isfinite(value) else ", and finite"))
