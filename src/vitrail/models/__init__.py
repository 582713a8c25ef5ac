"""The model families and their registry."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from . import bit, cvt, deit, hybrid, mvit, resnet, slowfast, swin, timesformer, vit, vivit, x3d
from .backbone import Segmenter, as_backbone
from .base import Model
from .ranges import check_numbers
from .shapes import ShapesOnly

FAMILIES: dict[str, ModuleType] = {
    "vit": vit, "deit": deit, "resnet": resnet, "bit": bit, "hybrid": hybrid, "cvt": cvt, "swin": swin, "mvit": mvit,
    "x3d": x3d, "slowfast": slowfast, "vivit": vivit, "timesformer": timesformer,
}  # fmt: skip
MODELS: dict[str, Any] = {name: config for family in FAMILIES.values() for name, config in family.VARIANTS.items()}

__all__ = [
    "FAMILIES", "MODELS", "Model", "Segmenter", "ShapesOnly", "as_backbone", "build", "create_model", "family_of",
    "list_models",
]  # fmt: skip


def list_models(pattern: str = "*") -> list[str]:
    """Registry ids that match a shell pattern, family by family."""
    return [name for name in MODELS if fnmatch.fnmatch(name, pattern) or pattern in name]


def family_of(config: Any) -> str:
    """The family that a config dataclass belongs to."""
    return next(name for name, module in FAMILIES.items() if isinstance(config, module.CONFIG))


def build(config: Any, name: str = "") -> Model:
    """A model with random weights from a family's config dataclass.

    Raises ValueError for a number that such a setting cannot be.
    """
    check_numbers(type(config), vars(config))
    model: Model = FAMILIES[family_of(config)].MODEL(config)
    model.name = name
    return model


def create_model(
    name: str, num_classes: int | None = None, image_size: int | tuple[int, int] | None = None, **overrides: Any
) -> Model:
    """A registered model with random weights.

    `overrides` are fields of the family's config (`depth=6`, `drop_path=0.1`, `position=PositionConfig(kind="2d")`, or
    dotted in a dictionary: `**{"position.kind": "2d"}`). Raises ValueError for an unknown model or
    field, naming the nearest ones, and for a number that a field cannot be.
    """
    if name not in MODELS:
        raise ValueError(_unknown("model", name, MODELS))
    changes = dict(overrides)
    if num_classes is not None:
        changes["num_classes"] = num_classes
    if image_size is not None:
        changes["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    return build(override(MODELS[name], changes), name)


def override(config: Any, changes: dict[str, Any]) -> Any:
    """A copy of a config with fields replaced, dotted names reaching into nested configs; checked once, when complete."""
    names = [f.name for f in dataclasses.fields(config)]
    plain: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in names:
            raise ValueError(_unknown(f"setting of {type(config).__name__}", key, names))
        plain[head] = override(plain.get(head, getattr(config, head)), {rest: value}) if rest else value
    check_numbers(type(config), plain)
    return dataclasses.replace(config, **plain)


def _unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    names = list(allowed)
    begun = [name for name in names if given and name.startswith(given)]
    close = begun[:3] or difflib.get_close_matches(given, names, 3, 0.3) or names[:3]
    return f"unknown {what} {given!r}: did you mean {' or '.join(map(repr, close))}?"
