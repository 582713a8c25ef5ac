"""`vitrail train`: the settings of `RunConfig` as flags, over a recipe or a settings file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.parse import flags_in, parse, registry
from vitrail.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    OptimConfig,
    RunConfig,
    flat,
    load,
    unknown,
)
from vitrail.recipes import RECIPES

EXAMPLES = """\
vitrail train digits --recipe digits                                  the embedded set and its own settings
vitrail train photos/ --preset auto --time-budget 10                  settings chosen from the data, ten minutes
vitrail train photos/ --model resnet18 --image-size 128 --epochs 30
vitrail train photos/ --model vit_tiny_patch16_224 --pretrained       from published weights
vitrail train photos/ --from runs/other --image-size 384 --layer-decay 0.75    larger pictures, positions resized
vitrail train table.csv --image-column file --label-column species --multi-label
vitrail train photos/ --set depth=6 position.kind=sincos              the model family's own settings
vitrail train photos/ --config settings.yaml --lr 3e-4                a file, one value changed
vitrail train photos/ --model deit_tiny_distilled_patch16_224 --teacher runs/photos-resnet18    learn from a trained model
vitrail train photos/ --objective mae --model vit_tiny_patch16_224     learn from pictures alone, without labels
vitrail train --resume runs/photos-resnet18                           go on exactly where a run stopped"""


@dataclass(frozen=True)
class Arguments(RunConfig):
    """Train a model, evaluate it and write a report. `vitrail models` lists the models."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """A folder of class folders, a table, tar shards, an Arrow data set, or an embedded set: digits, emoji, motion."""
    recipe: str = ""  # start from the settings of a measured recipe, such as digits
    config: str = ""  # start from the settings in a YAML or JSON file, such as a run's config.yaml
    init_from: Annotated[str, tyro.conf.arg(aliases=["--from"])] = ""
    """Run folder, checkpoint, hub id or URL to start from; by default random weights."""
    resume: str = ""  # go on with the run in this directory; its own settings hold
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings of the model family, shown by `vitrail models NAME`."""
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)
    augment: Annotated[AugmentConfig, tyro.conf.arg(name="augmentation")] = field(default_factory=AugmentConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="optimiser")] = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class Start:
    """Where the defaults come from; read before the other flags."""

    recipe: str = ""
    config: str = ""


def run(words: Sequence[str]) -> None:
    """Train, evaluate, report."""
    base = starting_point(words)
    defaults = Arguments(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    arguments = parse(Arguments, words, prog="vitrail train", examples=EXAMPLES, default=defaults)
    from vitrail.runs import train

    if arguments.resume and "out" in flags_in(words) and Path(arguments.out).absolute() != Path(arguments.resume).absolute():
        raise ConfigError(f"a run goes on where it is: --out {arguments.out} is not --resume {arguments.resume}")
    run = train(base, resume=arguments.resume or False, **explicit(words, arguments, base))
    if run.config.report and run.is_main:
        print(f"report    {run.path / 'report.html'}  (open it in a browser)")


def starting_point(words: Sequence[str]) -> RunConfig:
    """The settings that flags change: those of --recipe, of --config, or the defaults."""
    start, _ = tyro.cli(Start, args=list(words), return_unknown_args=True, add_help=False, registry=registry)
    if start.recipe and start.config:
        raise ConfigError("--recipe and --config both name settings to start from; give one of them")
    if start.config:
        return load(RunConfig, start.config)
    if not start.recipe:
        return RunConfig()
    if start.recipe not in RECIPES:
        raise unknown("recipe", start.recipe, RECIPES)
    return RECIPES[start.recipe]()


def explicit(words: Sequence[str], arguments: Arguments, base: RunConfig) -> dict[str, Any]:
    """The settings that were given as flags, also those given their default: a preset leaves them alone."""
    values = flat(arguments)
    flags = flags_in(words)
    flags |= {"init_from"} if "from" in flags else set()
    given = {name: value for name, value in values.items() if name in flags and name in flat(base)}
    if arguments.data != base.data:
        given["data"] = arguments.data
    if arguments.overrides != base.overrides:
        given["overrides"] = {**base.overrides, **arguments.overrides}
    return given
