"""`vitrail train`: the settings of `RunConfig` as flags, over a recipe or a settings file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from vitrail.cli.parse import parse
from vitrail.config import (
    AugmentConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
)

EXAMPLES = """\
vitrail train digits --recipe digits                                  the embedded set and its own settings
vitrail train photos/ --preset auto --time-budget 10                  settings chosen from the data, ten minutes
vitrail train photos/ --model resnet18 --image-size 128 --epochs 30
vitrail train table.csv --image-column file --label-column species --multi-label
vitrail train photos/ --set depth=6 position.kind=sincos              the model family's own settings
vitrail train photos/ --config settings.yaml --lr 3e-4                a file, one value changed
vitrail train --resume runs/photos-resnet18                           go on exactly where a run stopped"""


@dataclass(frozen=True)
class Arguments(RunConfig):
    """Train a model, evaluate it and write a report. `vitrail models` lists the models."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """A folder of class folders, a table, tar shards, an Arrow data set, or an embedded set: digits, emoji."""
    recipe: str = ""  # start from the settings of a recipe
    config: str = ""  # start from the settings in a YAML or JSON file, such as a run's config.yaml
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
    """Train."""
    arguments = parse(Arguments, words, prog="vitrail train", examples=EXAMPLES)
    print(arguments)
