"""A grid of runs: every model on every data set with every seed and variant, in directories of their own, one table at the end.

A grid that was stopped or killed goes on when it is called again: finished cells are read, a begun one is resumed exactly.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from vitrail.checkpoints.io import read_json, write_text
from vitrail.config import ConfigError, RunConfig, replace_dotted, replace_flat, to_dict, unknown
from vitrail.cost import count_flops
from vitrail.data import open_data
from vitrail.evaluation.classify import evaluate
from vitrail.models import MODELS, build
from vitrail.training.loop import train

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
        return "-".join(part for part in (data, self.model, self.variant, f"seed{self.seed}") if part)


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
        head = f"{'data':<16}{'model':<34}{'variant':<14}{self.metric + ': mean':>14}{'spread':>9}{'seeds':>7}{'FLOPs':>10}"
        lines = [
            f"{Path(r['data']).name:<16}{r['model']:<34}{r['variant']:<14}{r['mean']:>14.4f}{r['spread']:>9.4f}{r['seeds']:>7}"
            f"{r['flops']:>10.2e}"
            for r in self.summary()
        ]
        return "\n".join([head, *lines])


def run_grid(
    out: str | Path,
    *,
    data: Sequence[str] | Mapping[str, Any],
    models: Sequence[str],
    seeds: Iterable[int] = (0, 1, 2),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    base: RunConfig | None = None,
    budget_flops: float = 0,
    tests: Mapping[str, Any] | None = None,
    metric: str = "top1",
    **settings: Any,
) -> Grid:
    """Train and evaluate every combination of data, model, variant and seed; returns all results, also in out/cells.csv.

    data: paths and names of embedded sets, or {name: anything that a run takes}. variants: {name: settings by their own name},
    such as {"plain": {}, "mixup": {"mixup": 0.8}}. `settings` change `base` for all cells. budget_flops: training FLOPs of
    every cell (3 forward passes a step), so that models are compared at equal cost; steps follow from it. tests: {name: data}
    on which every finished model is evaluated too, in columns "metric@name". Called again with the same settings it goes on
    where it was stopped. Raises ConfigError for unknown models and for cells that were run with other settings.
    """
    sources = dict(data) if isinstance(data, Mapping) else {str(name): name for name in data}
    variants = variants or {"": {}}
    for model in models:
        if model.partition(".")[0] not in MODELS:
            raise unknown("model", model, MODELS)
    common = replace_flat(base or RunConfig(), {"report": False, "tensorboard": False, **settings})
    path, rows = Path(out), []
    cells = [Cell(*parts) for parts in itertools.product(sources, models, variants, seeds)]
    if len({cell.folder for cell in cells}) < len(cells):
        raise ConfigError("two data sets of this grid have the same name; give them as {name: data}")
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell.folder}", flush=True)
        config = replace_flat(common, {**variants[cell.variant], "model": cell.model, "seed": cell.seed})
        rows.append(_run_cell(path / cell.folder, cell, config, sources[cell.data], budget_flops, tests or {}, metric))
        _write_table(path / TABLE, rows)
    grid = Grid(path, rows, metric)
    print(grid, flush=True)
    return grid


def steps_within(budget_flops: float, config: RunConfig, data: Any) -> tuple[int, float]:
    """(optimiser steps that a budget of training FLOPs pays for, FLOPs of one step). Raises ConfigError for less than one."""
    changes: dict[str, Any] = {**config.overrides, "num_classes": len(open_data(data, config.data_config).classes)}
    if config.input.image_size is not None:
        changes["image_size"] = config.input.image_size
    if config.input.channels is not None:
        changes["in_channels"] = config.input.channels
    if config.input.frames is not None:
        changes["frames"] = config.input.frames
    with torch.device("meta"):
        model = build(replace_dotted(MODELS[config.model.partition(".")[0]], changes))
    step = TRAINING * count_flops(model) * config.batch_size
    if budget_flops and budget_flops < step:
        raise ConfigError(f"a budget of {budget_flops:.1e} FLOPs pays for no step of {config.model}; one costs {step:.1e}")
    return int(budget_flops // step), float(step)


def _run_cell(
    folder: Path, cell: Cell, config: RunConfig, data: Any, budget: float, tests: Mapping[str, Any], metric: str
) -> dict[str, Any]:
    """The row of one cell: read if it was finished, else trained (on) and evaluated."""
    asked = json.loads(json.dumps({"config": to_dict(config), "budget_flops": budget, "tests": sorted(tests)}))
    done = read_json(folder / RESULT)
    if done:
        if done["asked"] != asked:
            raise ConfigError(f"{folder} was run with other settings ({_first_change(done['asked'], asked)}); name another out")
        return dict(done["row"])
    steps, flops = steps_within(budget, config, data)
    if budget:
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, steps=steps))
    start = time.perf_counter()
    named = {} if isinstance(data, (str, Path)) else {"data": data}
    config = replace_flat(config, {"out": str(folder), **({} if named else {"data": str(data)})})
    run = train(config, resume=(folder / "config.yaml").exists(), **named)
    if metric not in run.metrics:
        raise unknown("metric", metric, run.metrics)
    row = {
        **dataclasses.asdict(cell), "steps": run.config.schedule.steps, "flops": flops * run.config.schedule.steps,
        "seconds": round(time.perf_counter() - start, 1), **run.metrics,
    }  # fmt: skip
    for name, source in tests.items():
        row[f"{metric}@{name}"] = evaluate(run.model, source, progress=False).metrics[metric]
    write_text(folder / RESULT, json.dumps({"asked": asked, "row": row}, indent=1) + "\n")
    return row


def _first_change(before: Any, now: Any, where: str = "") -> str:
    """The first setting that differs, as "name: before there, now asked for"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key):
                return _first_change(before.get(key), now.get(key), key)
    return f"{where}: {before} there, {now} asked for"


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
