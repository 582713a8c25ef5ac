"""`vitrail models`: what can be built, how large it is, and which settings it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail models                          all of them
vitrail models 'vit_*_patch16_*'        those that match a pattern, or contain a word
vitrail models vit_small_patch16_224    one, with the settings that --set accepts
vitrail models resnet50 --image-size 384"""


@dataclass(frozen=True)
class Arguments:
    """List models with their size and cost; for a full name, the settings that `--set` accepts."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATTERN")] = "*"
    """A name, a pattern such as 'vit_*', or part of a name."""
    image_size: tuple[int, int] | None = None  # height,width in pixels to count for; by default each model's own
    json: bool = False  # print JSON


def run(words: Sequence[str]) -> None:
    """Print the table, or one model's settings."""
    arguments = parse(Arguments, words, prog="vitrail models", examples=EXAMPLES)
    from vitrail.cli import show
    from vitrail.config import unknown
    from vitrail.models import MODELS, list_models

    names = [arguments.pattern] if arguments.pattern in MODELS else list_models(arguments.pattern)
    if not names:
        raise unknown("model", arguments.pattern, MODELS)
    rows = [measured(name, arguments.image_size) for name in names]
    settings = [] if arguments.pattern not in MODELS else list(fields(MODELS[arguments.pattern]))
    if arguments.json:
        show.as_json({**rows[0], "settings": {name: value for name, value, _ in settings}} if settings else rows)
    elif settings:
        show.pairs(rows[0])
        show.table(("setting", "value", "type"), settings)
        print(f"vitrail train DATA --model {names[0]} --set {settings[0][0]}={show.number(settings[0][1])}")
    else:
        numbers = ("parameters (M)", "GMACs")
        show.table(("model", "input", *numbers), [tuple(row.values()) for row in rows], right=numbers)


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, value, type) of every setting that `--set` accepts; the input size and classes come from the data."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        elif prefix or field.name not in ("image_size", "in_channels", "num_classes"):
            kind = hints[field.name]
            yield f"{prefix}{field.name}", value, kind.__name__ if kind in (int, float, bool, str) else str(kind)


def measured(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Input size, parameters and multiply-adds of a registered model, counted without allocating it."""
    import torch

    from vitrail import cost
    from vitrail.models import create_model

    with torch.device("meta"):
        model = create_model(name, image_size=image_size)
    return {
        "model": name,
        "input": " x ".join(map(str, model.input_shape)),
        "parameters (M)": round(cost.count_parameters(model) / 1e6, 2),
        "GMACs": round(cost.count_flops(model) / 2e9, 3),
    }
