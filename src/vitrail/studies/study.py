"""What every study has: settings, runs to train, findings, and the way from settings to a page."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from vitrail.config import ConfigError, RunConfig, replace_flat, unknown
from vitrail.studies import STUDIES
from vitrail.studies.statistics import Mean

Row = dict[str, Any]
WARMUP = 0.05  # of every run's steps; runs are as long as their budget, so a number of epochs would mean something else in each


@dataclass(frozen=True)
class StudyConfig:
    """Settings that every study has."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = ""
    """What a run takes: a folder of class folders, a table, tar shards, an Arrow data set, or an embedded set."""
    out: str = ""  # directory of the runs and of study.html; by default studies/<data>-<study>
    seeds: tuple[int, ...] = (0, 1, 2)  # of the weights, the order and, where sizes are compared, the subset
    budget: float = 1e12  # training FLOPs of every run (three forward passes a step); all are compared at this cost
    image_size: tuple[int, int] = (64, 64)  # height,width in pixels that models see; one number for a square
    batch_size: int = 32  # pictures per step
    settings: Annotated[Mapping[str, Any], tyro.conf.arg(name="train")] = field(default_factory=dict)
    """Settings of every run, by the names that `vitrail train --help` shows, such as hflip=0 lr=0.001."""


@dataclass(frozen=True)
class JudgeConfig(StudyConfig):
    """Settings of a study that judges trained models and trains none."""

    batch_size: int = 64  # pictures at once
    seeds: Annotated[tuple[int, ...], tyro.conf.Suppress] = (0,)
    budget: Annotated[float, tyro.conf.Suppress] = 0.0
    image_size: Annotated[tuple[int, int], tyro.conf.Suppress] = (0, 0)
    settings: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)


@dataclass(frozen=True)
class Runs:
    """Runs to train: every model with every variant (a name for changed settings) and every seed.

    budget: FLOPs of each, by default the study's; 0 for runs whose settings say how long they are.

    models: names, or {name to show: settings with "model" among them}. folder: below the study's own, if it has several grids.
    """

    models: Sequence[str] | Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    folder: str = ""
    subsets: bool = False  # every seed trains on a subset of its own (`subset_seed`), nested from size to size


@dataclass(frozen=True)
class Series:
    """A line or points of a chart. low, high: ends of the intervals, drawn as a band (line) or bars (points)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    line: bool = True
    dashed: bool = False  # such as where a fit goes beyond what was measured
    colour: int | None = None  # number in the palette; by default the next one

    @classmethod
    def of_means(cls, name: str, x: Sequence[float], means: Iterable[Mean], floor: float | None = None, **style: Any) -> Series:
        """Means and their intervals over `x`; floor: where low ends stop, for an axis that cannot show what is below."""
        means = list(means)
        low = [m.low if floor is None else max(m.low, floor) for m in means]
        return cls(name, x, [m.value for m in means], low, [m.high for m in means], **style)


@dataclass(frozen=True)
class Chart:
    """A figure: series over numbers, or over `categories` that stand at x = 0, 1, 2 and so on."""

    name: str  # of its files
    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    categories: Sequence[str] = ()
    logx: bool = False
    logy: bool = False
    percent: bool = False  # y is a fraction, shown in percent
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under column names; numbers are shown with four digits, text as it is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What a study found: the answer in a sentence or two, more sentences, tables, charts, and the numbers for a program."""

    answer: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Mapping[str, str]] = ()  # {"uri": data URI, "name": caption}
    pictures_about: str = ""


def study(name: str) -> ModuleType:
    """The module of a study. Raises ConfigError for an unknown one, naming the nearest."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return importlib.import_module(f"vitrail.studies.{STUDIES[name].module}")


def run_study(name: str, config: StudyConfig | None = None, *, command: str = "", **settings: Any) -> tuple[Findings, Path]:
    """Run a study, or go on with it, and write its page; returns what it found and its directory.

    Give its Config or its fields by name: `run_study("pooling", data="photos/", budget=1e12)`. The directory then holds
    study.html, runs.csv (one row per run), findings.json, and every chart as PNG and SVG. Raises ConfigError for an unknown
    study or setting, data that cannot be used, and a directory whose runs had other settings.
    """
    module = study(name)
    config = replace_flat(config or module.Config(), settings)
    if not config.data:
        raise ConfigError("no data was named: give a folder, a table, tar shards, or digits, emoji or motion (embedded)")
    if not config.seeds:
        raise ConfigError("seeds is empty; give at least one, three or more for an interval")
    from vitrail.studies.page import write_study

    out = directory(name, config)
    rows = module.measure(config)
    findings = module.conclude(config, rows)
    write_study(out, name, config, findings, rows, command)
    return findings, out


def directory(name: str, config: StudyConfig) -> Path:
    """Where a study lives."""
    return Path(config.out or Path("studies") / f"{Path(config.data).name.split('.')[0]}-{name}")


def base_config(config: StudyConfig) -> RunConfig:
    """The settings that all runs of a study share."""
    from vitrail.data import open_data  # imports torch

    base = replace_flat(
        RunConfig(),
        {
            "image_size": config.image_size, "batch_size": config.batch_size, "eval_every": 1e6, "precision": "fp32",
            "workers": 0, **config.settings,
        },
    )  # fmt: skip
    if "val_fraction" not in config.settings and open_data(config.data, base.data_config).test is not None:
        base = replace_flat(base, {"val_fraction": 0.0})  # nothing is chosen while training; the test split is the judge
    return base


def training_counts(config: StudyConfig) -> list[int]:
    """How many training pictures each class has. Raises ConfigError for data without any, or with several labels a picture."""
    from vitrail.data import open_data

    data = open_data(config.data, base_config(config).data_config)
    if data.train is None or data.multi_label:
        raise ConfigError(f"{data.name}: this study needs training pictures with one label each")
    return [int(count) for count in data.train.class_counts()]


def train_runs(name: str, config: StudyConfig, plan: Sequence[Runs]) -> list[Row]:
    """Train what a study plans, or go on with it; one row per run, with its `folder` below the study's. Prints progress."""
    from vitrail.studies.grid import run_grid

    base = base_config(config)
    rows = []
    for runs in plan:
        budget = config.budget if runs.budget is None else runs.budget
        grid = run_grid(
            directory(name, config) / runs.folder, data=[config.data], models=runs.models, seeds=config.seeds,
            variants=runs.variants or None, base=base, budget_flops=budget, warmup=WARMUP,
            subsets=runs.subsets, **runs.settings,
        )  # fmt: skip
        rows += [{**row, "folder": str(Path(runs.folder) / row["folder"])} for row in grid.rows]
    return rows
