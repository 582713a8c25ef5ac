"""`vitrail models show`: one model on a page: its parts, what they cost, its published weights and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail models show vit_small_patch16_224
vitrail models show resnet50 --image-size 384"""


@dataclass(frozen=True)
class Arguments:
    """Show the parts of a model with their parameters and multiply-adds, its published weights and its settings."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A name that `vitrail models` lists."""
    image_size: tuple[int, int] | None = None  # height,width in pixels to count for; by default the model's own
    json: bool = False  # print JSON


def run(words: Sequence[str]) -> None:
    """Print the page."""
    arguments = parse(Arguments, words, prog="vitrail models show", examples=EXAMPLES)
    from torch import nn

    from vitrail import cost
    from vitrail.cli import show
    from vitrail.cli.models import Catalogue, digits, fields
    from vitrail.models import ShapesOnly, create_model

    with ShapesOnly():
        model = create_model(arguments.name, image_size=arguments.image_size)
    parameters, flops = cost.count_parameters(model), cost.flops_by_part(model)
    total = sum(flops.values())
    parts = [
        (name, type(part).__name__ if len(part_list) == 1 else f"{len(part_list)} x {type(part_list[0]).__name__}",
         digits(cost.count_parameters(part) / 1e6, 3), digits(flops.get(name, 0) / 2e9, 3))
        for name, part in model.named_children()
        for part_list in [list(part) if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) else [part]]
    ]  # fmt: skip
    summary = {
        "model": arguments.name,
        "family": model.family,
        "input": " x ".join(map(str, model.input_shape)),
        "parameters (M)": digits(parameters / 1e6, 2),
        "GMACs": digits(total / 2e9, 3),
        "training step, one picture (GFLOPs)": digits(3 * total / 1e9, 2),
        "weights in float32 (MB)": round(4 * parameters / 1e6, 1),
        "sizes must be multiples of": model.input_multiple,
    }
    weights, settings = Catalogue().weights(arguments.name), list(fields(model.config))
    if arguments.json:
        columns = ("part", "kind", "parameters (M)", "GMACs")
        listed = [dict(zip(columns, row, strict=True)) for row in parts]
        named = {name: value for name, value, _ in settings}
        show.as_json({**summary, "parts": listed, "weights": weights, "settings": named})
        return
    show.pairs(summary, title=arguments.name)
    numbers = ("parameters (M)", "GMACs")
    show.table(("part", "kind", *numbers), parts, right=numbers)
    if weights:
        columns = ("tag", "licence", "trained on", "input")
        rows = [tuple(row[name] for name in columns) for row in weights]
        show.table(columns, rows, title="published weights, the default first")
    show.table(("setting", "value", "type"), settings, title="settings")
