"""The views of an inspection: what they are called, and which a model has."""

from __future__ import annotations

from collections.abc import Sequence

from vitrail.config import ConfigError, unknown
from vitrail.inspection.weights import bias_tables, filter_components, position_similarity
from vitrail.models import Model

VIEWS: dict[str, str] = {
    "attention": "Attention, patch by patch",
    "rollout": "Attention rollout",
    "relevance": "What the answer rests on",
    "distance": "How far the heads look",
    "filters": "Patch filters",
    "positions": "Positions",
    "biases": "Position biases",
    "tokens": "Class and distillation token",
    "lens": "The answer through depth",
    "cka": "Layers alike",
}
OF_WEIGHTS = ("filters", "positions", "biases")  # need no pictures
LEAST_FOR_CKA = 4


def missing(model: Model, count: int) -> dict[str, str]:
    """{view: why this model has it not, when `count` pictures or clips are given}."""
    found: dict[str, str] = {}
    route = model.attention_route(model.input_shape[1:])
    noun = "clips" if model.takes_clips else "pictures"
    if count == 0:
        found |= {view: f"it needs {noun}, and none were given" for view in VIEWS if view not in OF_WEIGHTS}
    if not route.sites:
        found |= dict.fromkeys(("attention", "rollout", "distance"), "the model has no attention")
    elif not route.readout:
        found["rollout"] = "convolutions lie between its attention layers, so that they do not join to one map"
    if "the distillation token" not in route.readout:
        found["tokens"] = "the model has no distillation token"
    if not model.config.num_classes:
        found |= dict.fromkeys(("relevance", "lens"), "the model has no classifier")
    if 0 < count < LEAST_FOR_CKA:
        found["cka"] = f"it needs at least {LEAST_FOR_CKA} {noun}, and {count} {'was' if count == 1 else 'were'} given"
    try:
        filter_components(model, 1)
    except ValueError as reason:
        found["filters"] = str(reason)
    if not position_similarity(model):
        found["positions"] = "the model adds no learned or fixed positions to its tokens"
    if not bias_tables(model):
        found["biases"] = "the model has no relative positions"
    return found


def choose(model: Model, name: str, asked: Sequence[str], count: int) -> tuple[list[str], dict[str, str]]:
    """The views to draw and those that the model has not, with the reason; all of them where none is asked for.

    Raises ConfigError for a view that does not exist, or that was asked for and that this model has not.
    """
    reasons = missing(model, count)
    have = [view for view in VIEWS if view not in reasons]
    for view in asked:
        if view not in VIEWS:
            raise unknown("view", view, VIEWS)
        if view in reasons:
            raise ConfigError(f"{name} has no view {view!r}: {reasons[view]}; its views here: {', '.join(have) or 'none'}")
    return [view for view in have if not asked or view in asked], {} if asked else reasons
