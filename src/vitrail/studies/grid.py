"""A grid of runs: every model on every data set with every seed and variant, in directories of their own, one table at the end.

A grid that was stopped or killed goes on when it is called again: finished cells are read, a begun one is resumed exactly.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vitrail.checkpoints.io import read_json, write_text
from vitrail.config import ConfigError, RunConfig, replace_dotted, replace_flat, to_dict, unknown
from vitrail.cost import count_flops, count_parameters
from vitrail.data import open_data
from vitrail.evaluation.classify import evaluate
from vitrail.models import MODELS, ShapesOnly, build
from vitrail.training.loop import train
from vitrail.training.teacher import find

RESULT, TABLE = "cell.json", "cells.csv"
TRAINING = 3  # a training step costs about three forward passes: one forward, two backward


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `variant` names a set of changed settings, "" the plain ones."""

    data: str
    model: str
    variant: str = ""
    seed: int = 0

    @property
    def folder(self) -> str:
        """The name of its run directory."""
        data = Path(self.data).name.split(".")[0]
        name = "-".join(part for part in (data, self.model, self.variant, f"seed{self.seed}") if part)
        return re.sub(r"[^\w.,+=-]+", "_", name)


@dataclass(frozen=True)
class Grid:
    """What a grid found: one row per cell with its settings, steps, FLOPs, seconds and metrics."""

    path: Path
    rows: list[dict[str, Any]] = field(repr=False)
    metric: str = "top1"

    def summary(self) -> list[dict[str, Any]]:
        """Mean, spread (sample standard deviation) and number of seeds per data set, model and variant."""
        found = []
        key = ("data", "model", "variant")
        for group in dict.fromkeys(tuple(row[name] for name in key) for row in self.rows):
            values = [row[self.metric] for row in self.rows if tuple(row[name] for name in key) == group]
            flops = [row["flops"] for row in self.rows if tuple(row[name] for name in key) == group]
            spread = stdev(values) if len(values) > 1 else float("nan")
            found.append({
                **dict(zip(key, group, strict=True)), "seeds": len(values), "mean": fmean(values), "spread": spread,
                "flops": fmean(flops),
            })  # fmt: skip
        return found

    def __str__(self) -> str:
        rows = [{**row, "data": Path(row["data"]).name} for row in self.summary()]
        width = {name: max(map(len, (name, *(row[name] for row in rows)))) + 2 for name in ("data", "model", "variant")}
        head = "".join(f"{name:<{width[name]}}" for name in width)
        lines = [f"{head}{self.metric + ': mean':>14}{'spread':>9}{'seeds':>7}{'FLOPs':>10}"]
        for row in rows:
            names = "".join(f"{row[name]:<{width[name]}}" for name in width)
            lines.append(f"{names}{row['mean']:>14.4f}{row['spread']:>9.4f}{row['seeds']:>7}{row['flops']:>10.2e}")
        return "\n".join(lines)


def run_grid(
    out: str | Path,
    *,
    data: Sequence[str] | Mapping[str, Any],
    models: Sequence[str] | Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int] = (0, 1, 2),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    base: RunConfig | None = None,
    budget_flops: float = 0,
    warmup: float = 0,
    subsets: bool = False,
    tests: Mapping[str, Any] | None = None,
    metric: str = "top1",
    **settings: Any,
) -> Grid:
    """Train and evaluate every combination of data, model, variant and seed; returns all results, also in out/cells.csv.

    data: paths and names of embedded sets, or {name: anything that a run takes}. variants: {name: settings by their own name},
    such as {"plain": {}, "mixup": {"mixup": 0.8}}. models: names, or in the same way {name: settings}, "model" among them;
    their `overrides` are added to those of a variant, which win. `settings` change `base` for all cells. budget_flops: training
    FLOPs of every cell (3 forward passes a step, and one of a teacher), so that models are compared at equal cost; steps follow
    from it, and `warmup` is a fraction of them. subsets: `subset_seed` is the seed too. tests: {name: data} on which every
    finished model is evaluated too, in columns "metric@name". Called again with the same settings it goes on where it was
    stopped. Raises ConfigError for unknown models and for cells that were run with other settings.
    """
    sources = dict(data) if isinstance(data, Mapping) else {str(name): name for name in data}
    variants = variants or {"": {}}
    kinds = dict(models) if isinstance(models, Mapping) else {model: {"model": model} for model in models}
    for kind in kinds.values():
        if str(kind["model"]).partition(".")[0] not in MODELS:
            raise unknown("model", str(kind["model"]), MODELS)
    common = replace_flat(base or RunConfig(), {"report": False, "tensorboard": False, **settings})
    path, rows = Path(out), []
    cells = [Cell(*parts) for parts in itertools.product(sources, kinds, variants, seeds)]
    if len({cell.folder for cell in cells}) < len(cells):
        raise ConfigError("two data sets of this grid have the same name; give them as {name: data}")
    clock = _Clock(len(cells))
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell.folder}{clock.left()}", flush=True)
        changes = _changes(kinds[cell.model], variants[cell.variant], cell.seed, subsets)
        asked = Asked(replace_flat(common, changes), budget_flops, warmup, tests or {}, metric)
        rows.append(_run_cell(path / cell.folder, cell, asked, sources[cell.data], clock))
        write_rows(path / TABLE, rows)
    grid = Grid(path, rows, metric)
    print(grid, flush=True)
    return grid


@dataclass(frozen=True)
class Asked:
    """What a cell is asked to be."""

    config: RunConfig
    budget_flops: float
    warmup: float
    tests: Mapping[str, Any]
    metric: str

    def plain(self) -> dict[str, Any]:
        """As it is written down, to be compared when the grid is called again."""
        asked = {"config": to_dict(self.config), "budget_flops": self.budget_flops, "warmup": self.warmup}
        return dict(json.loads(json.dumps({**asked, "tests": sorted(self.tests)})))


@dataclass
class _Clock:
    """How long the rest will take, judged by the cells of this call."""

    cells: int
    passed: int = 0
    seconds: list[float] = field(default_factory=list)

    def left(self) -> str:
        if not self.seconds:
            return ""
        return f" (about {fmean(self.seconds) * (self.cells - self.passed) / 60:.1f} min left)"


def _changes(kind: Mapping[str, Any], variant: Mapping[str, Any], seed: int, subsets: bool) -> dict[str, Any]:
    overrides = {**kind.get("overrides", {}), **variant.get("overrides", {})}
    seeds = {"seed": seed, **({"subset_seed": seed} if subsets else {})}
    return {**kind, **variant, **({"overrides": overrides} if overrides else {}), **seeds}


def steps_within(budget_flops: float, config: RunConfig, data: Any) -> tuple[int, float]:
    """(optimiser steps that a budget of training FLOPs pays for, FLOPs of one step). Raises ConfigError for less than one."""
    return _steps_within(budget_flops, config, len(open_data(data, config.data_config).classes))


def _steps_within(budget_flops: float, config: RunConfig, classes: int) -> tuple[int, float]:
    changes: dict[str, Any] = {**config.overrides, "num_classes": classes}
    if config.input.image_size is not None:
        changes["image_size"] = config.input.image_size
    if config.input.channels is not None:
        changes["in_channels"] = config.input.channels
    if config.input.frames is not None:
        changes["frames"] = config.input.frames
    with ShapesOnly():
        model = build(replace_dotted(MODELS[config.model.partition(".")[0]], changes))
    step = (TRAINING * count_flops(model) + _teacher_flops(config)) * config.batch_size
    if budget_flops and budget_flops < step:
        raise ConfigError(f"a budget of {budget_flops:.1e} FLOPs pays for no step of {config.model}; one costs {step:.1e}")
    return int(budget_flops // step), float(step)


def _teacher_flops(config: RunConfig) -> int:
    """FLOPs of a teacher's answer to one picture; 0 without one, or where its answers are stored."""
    if not config.distillation.teacher or config.distillation.teacher_cache:
        return 0
    found = find(config.distillation.teacher)
    return count_flops(found.model, (found.preprocess.channels, *found.preprocess.image_size))  # type: ignore[arg-type]


def _run_cell(folder: Path, cell: Cell, asked: Asked, source: Any, clock: _Clock) -> dict[str, Any]:
    """The row of one cell: read if it was finished, else trained (on) and evaluated."""
    clock.passed += 1
    done = read_json(folder / RESULT)
    if done:
        before = _completed(done["asked"], json.loads(json.dumps({"config": to_dict(RunConfig())})))
        if before != asked.plain():
            change = _first_change(before, asked.plain())
            raise ConfigError(f"{folder} was run with other settings ({change}); name another out")
        return dict(done["row"])
    start = time.perf_counter()
    config = asked.config
    data = open_data(source, config.data_config)
    steps, flops = _steps_within(asked.budget_flops, config, len(data.classes))
    if asked.budget_flops:
        warmup = config.schedule.warmup_steps or (max(round(asked.warmup * steps), 1) if asked.warmup else 0)
        config = replace_flat(config, {"steps": steps, "warmup_steps": warmup})
    named = {} if isinstance(source, (str, Path)) else {"data": source}
    config = replace_flat(config, {"out": str(folder), **({} if named else {"data": str(source)})})
    run = train(config, resume=(folder / "config.yaml").exists(), **named)
    if asked.metric not in run.metrics:
        raise unknown("metric", asked.metric, run.metrics)
    seconds = time.perf_counter() - start
    row = {
        **dataclasses.asdict(cell), "folder": cell.folder, "pictures": len(data.train or ()),
        "parameters": count_parameters(run.model), "steps": run.config.schedule.steps,
        "flops": flops * run.config.schedule.steps, "seconds": round(seconds, 1), **run.metrics,
    }  # fmt: skip
    for name, other in asked.tests.items():
        row[f"{asked.metric}@{name}"] = evaluate(run.model, other, progress=False).metrics[asked.metric]
    write_text(folder / RESULT, json.dumps({"asked": asked.plain(), "row": row}, indent=1) + "\n")
    clock.seconds.append(seconds)
    return row


def _completed(before: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, with the defaults of settings that did not exist yet."""
    found = dict(before)
    for key, value in defaults.items():
        if key not in before:
            found[key] = value
        elif isinstance(value, dict) and isinstance(before[key], dict):
            found[key] = _completed(before[key], value)
    return found


def _first_change(before: Any, now: Any, where: str = "") -> str:
    """The first setting that differs, as "name: before there, now asked for"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key):
                return _first_change(before.get(key), now.get(key), key)
    return f"{where}: {before} there, {now} asked for"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of rows; a column that only some rows have is empty in the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
