"""Models by name, with published weights where they are asked for."""

from __future__ import annotations

from typing import Any

from vitrail import models
from vitrail.config import ConfigError, unknown
from vitrail.models import MODELS, Model

from .store import load_model
from .weights import WEIGHTS, Weights, of_model


def create_model(
    name: str,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    quiet: bool = False,
    **overrides: Any,
) -> Model:
    """A registered model with random weights, or with published ones.

    pretrained: True for the model's default weights, or the tag of others; a tag may also follow the name
    ("vit_base_patch16_224.augreg_in21k"). They are fetched once and kept. `overrides` are fields of the family's config
    (`depth=6`, `drop_path=0.1`, dotted in a dictionary: `**{"position.kind": "2d"}`); with published weights another
    num_classes gives a new head of zeros and another image_size resized positions. Raises ValueError for an unknown model,
    tag or field, naming the nearest ones, and CheckpointError for weights that cannot be fetched.
    """
    model, _, tag = name.partition(".")
    if pretrained is False:
        return models.create_model(model, num_classes, image_size, **overrides)
    row = choose(model, tag or (pretrained if isinstance(pretrained, str) else ""))
    changes = dict(overrides)
    if num_classes is not None:
        changes["num_classes"] = num_classes
    if image_size is not None:
        changes["image_size"] = image_size
    return load_model(row.source, quiet=quiet, **changes)


def choose(model: str, tag: str = "") -> Weights:
    """The published weights of a model: those of a tag, or the default ones. Raises ConfigError naming the nearest."""
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    rows = of_model(model)
    if not rows:
        others = {row.model: None for row in WEIGHTS if row.model in MODELS}
        raise ConfigError(f"no published weights of {model} are known; there are some of: {', '.join(others)}")
    if not tag:
        return rows[0]
    found = next((row for row in rows if row.tag == tag), None)
    if found is None:
        raise unknown(f"weights of {model}", tag, [row.tag for row in rows])
    return found
