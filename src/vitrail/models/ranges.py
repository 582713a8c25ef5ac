"""The numbers that settings of a model may take, whatever the family; what contradicts what, a family says itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

# Whole numbers that may be less than 1, and their least.
_LEAST = {
    "num_classes": 0, "registers": 0, "temporal_depth": 0, "temporal_blocks": 0, "nonlocals": 0, "paddings": 0,
    "pretrained_windows": 0,
}  # fmt: skip
_RATES = ("dropout", "attention_dropout", "drop_path")  # probabilities; what is kept is divided by 1 - rate
_SIZES = ("norm_eps", "pool_norm_eps", "std_eps", "mlp_ratio")  # above 0


def check_numbers(kind: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first number that a setting of the config dataclass `kind` cannot be."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_numbers(type(value), vars(value))
        elif isinstance(value, (int, float, tuple, list)) and (problem := _problem(name, value, _kinds(hints[name]))):
            raise ValueError(f"{name} is {value}; {problem}")


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint is made of: {int, NoneType} of tuple[int, ...] | None."""
    inner = get_args(hint)
    return set().union(*map(_kinds, inner)) if inner else {hint}


def _problem(name: str, value: Any, kinds: set[Any]) -> str:
    whole, real = int in kinds, float in kinds
    for number in _numbers(value):
        if isinstance(number, bool):
            if (whole or real) and bool not in kinds:
                return f"it must be {'a whole number' if whole else 'a number'}"
        elif isinstance(number, float) and not real and bool not in kinds:
            return "it must be a whole number" if whole else ""
        elif not math.isfinite(number):
            return "it must be finite"
        elif name in _RATES and not 0 <= number < 1:
            return "it must be at least 0 and below 1"
        elif name in _SIZES and not number > 0:
            return "it must be above 0"
        elif whole and number < (least := _LEAST.get(name, 1)):
            return f"it must be at least {least}"
    return ""


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value
