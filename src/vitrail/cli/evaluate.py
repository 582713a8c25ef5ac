"""`vitrail eval`: how good a trained model is on a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from vitrail.cli.parse import flags_in, parse
from vitrail.config import DataConfig

EXAMPLES = """\
vitrail eval runs/photos-vit_tiny_patch16_224 photos/                the test split, or what the run held out
vitrail eval runs/photos-vit_tiny_patch16_224 photos/ --split val --per-class
vitrail eval runs/photos-deit_tiny_distilled_patch16_224 photos/ --prediction distillation
vitrail eval model.safetensors table.csv --image-column file --json > result.json"""


@dataclass(frozen=True)
class Arguments:
    """Measure a model: accuracy with 95 % intervals, balanced accuracy, F1, likelihood and calibration."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a checkpoint, or a folder with one."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set or embedded set with the classes of the model."""
    split: Literal["auto", "test", "val", "train"] = "auto"  # auto: test where there is one, then val; all of other data
    prediction: Literal["auto", "joint", "class", "distillation"] = "auto"  # which heads of a distilled DeiT answer
    per_class: bool = False  # print precision, recall and F1 of each class too
    json: bool = False  # print everything as JSON
    out: str = ""  # write the JSON to this file as well
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of products under autocast
    batch_size: int = 64  # pictures or clips at once
    clips: int | None = None  # of a video, spread over it, that are averaged; unset: what the model's card says
    crops: int | None = None  # of each clip, along its longer side, that are averaged
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> None:
    """Evaluate and print."""
    arguments = parse(Arguments, words, prog="vitrail eval", examples=EXAMPLES)
    from vitrail.cli import show
    from vitrail.evaluation.classify import evaluate

    # Only what was set: the rest (one label or several) comes with the model.
    given = flags_in(words)
    settings = {f.name: getattr(arguments.data_config, f.name) for f in dataclasses.fields(DataConfig) if f.name in given}
    report = evaluate(
        arguments.model,
        arguments.data,
        split="" if arguments.split == "auto" else arguments.split,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        clips=arguments.clips,
        crops=arguments.crops,
        prediction="" if arguments.prediction == "auto" else arguments.prediction,
        **settings,
    )
    if arguments.out:
        report.save(arguments.out)
    if arguments.json:
        show.as_json(report.to_dict())
        return
    print(f"{'split':<20}{report.split}")
    print(report)
    if arguments.per_class:
        columns = list(report.per_class[0])
        show.table(columns, [tuple(row.values()) for row in report.per_class], right=columns[1:])
