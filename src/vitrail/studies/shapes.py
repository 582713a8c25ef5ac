"""Which dimension of a ViT to scale: depth, width or patch size (ViT, appendix D.2, figure 8), for the same number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from vitrail.config import ConfigError, replace_flat
from vitrail.studies.small import vit
from vitrail.studies.statistics import Mean, by, difference, mean
from vitrail.studies.study import WARMUP, Chart, Findings, Row, Runs, Series, StudyConfig, Table, base_config, train_runs

EXAMPLES = """\
vitrail study shapes photos/ --budget 5e11
vitrail study shapes photos/ --depths 0.5,2,4 --widths 0.5,2 --patches 0.5,2 --train hflip=0"""

BASE = "base"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Scale one dimension of a plain ViT at a time; all are trained for as many steps as the budget pays for the base model."""

    depths: tuple[float, ...] = (0.5, 2.0)  # factors of the base depth
    widths: tuple[float, ...] = (0.5, 2.0)  # factors of the base width (and of the MLP's)
    patches: tuple[float, ...] = (2.0, 0.5)  # factors of the base patch; a smaller patch makes more tokens
    model: str = "vit_tiny_patch16_224"  # a plain ViT
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings of the base model, over those of the small one that studies use (width 96, depth 6, patch 8)."""


def variants(config: Config) -> dict[str, dict[str, Any]]:
    """{name: the model's settings}. Raises ConfigError for a factor that gives no whole depth, width or patch."""
    base = {**vit(config.image_size), **config.overrides}
    patch = base["patch"] if isinstance(base["patch"], (list, tuple)) else [base["patch"]] * 2
    found = {BASE: base}
    for factor in config.depths:
        found[f"depth x{factor:g}"] = {**base, "depth": _whole("depths", base["depth"], factor)}
    for factor in config.widths:
        width = _whole("widths", base["width"], factor)
        found[f"width x{factor:g}"] = {**base, "width": width, "mlp_dim": _whole("widths", base["mlp_dim"], factor)}
    for factor in config.patches:
        found[f"patch x{factor:g}"] = {**base, "patch": [_whole("patches", side, factor) for side in patch]}
    return found


def measure(config: Config) -> list[Row]:
    """Train, or go on."""
    from vitrail.studies.grid import steps_within  # imports torch

    shapes = variants(config)
    base = replace_flat(base_config(config), {"model": config.model, "overrides": shapes[BASE]})
    steps, _ = steps_within(config.budget, base, config.data)
    length = {"steps": steps, "warmup_steps": max(round(WARMUP * steps), 1)}
    named = {name: {"overrides": overrides} for name, overrides in shapes.items()}
    return train_runs("shapes", config, [Runs(models=[config.model], variants=named, settings=length, budget=0)])


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """What each dimension gains, and what it gains for each doubling of the cost."""
    cells = by(rows, "variant")
    tops = {name: mean(row["top1"] for row in group) for name, group in cells.items()}
    cost = {name: group[0]["flops"] / cells[BASE][0]["flops"] for name, group in cells.items()}
    slopes = {}
    for dimension in ("depth", "width", "patch"):
        per_seed = [_slope(cells, cost, dimension, seed) for seed in config.seeds]
        if all(math.isfinite(value) for value in per_seed):
            slopes[dimension] = mean(per_seed)
    ranked = sorted(slopes, key=lambda name: -slopes[name].value)
    if ranked:
        best = ranked[0]
        clear = all(slopes[best].low > slopes[other].value for other in ranked[1:])
        sure = "" if clear else "; the intervals overlap, so that order is not sure"
        told = ", ".join(f"{name} {_points(slopes[name])}" for name in ranked)
        answer = f"For each doubling of the cost {best} gains most ({told} points){sure}."
    else:
        answer = "One shape alone: nothing to compare."
    table = Table(
        "Shapes after the same number of steps",
        ["shape", "parameters", "cost", "top-1, %", "against base"],
        [
            [
                name, f"{cells[name][0]['parameters'] / 1e6:.2f} M", f"x{cost[name]:.2f}", tops[name].percent(),
                "" if name == BASE else _points(difference(cells[name], cells[BASE])),
            ]
            for name in cells
        ],
        note="Cost: training FLOPs relative to the base model.",
    )  # fmt: skip
    return Findings(
        answer=answer,
        sentences=[
            "All shapes see the same pictures for the same number of steps, so larger ones cost more (the horizontal axis)."
        ],
        tables=[table],
        charts=[_chart(cells, tops, cost)],
        numbers={
            "top1": {name: m._asdict() for name, m in tops.items()},
            "cost": cost,
            "points_per_doubling": {name: slope._asdict() for name, slope in slopes.items()},
        },
    )


def _whole(setting: str, value: float, factor: float) -> int:
    scaled = value * factor
    if scaled < 1 or scaled != int(scaled):
        near = max(round(scaled), 1) / value
        raise ConfigError(f"{setting}: {value} times {factor:g} is {scaled:g}, no whole number; nearest factor: {near:g}")
    return int(scaled)


def _slope(cells: Mapping[str, Sequence[Mapping[str, Any]]], cost: Mapping[str, float], dimension: str, seed: int) -> float:
    """Accuracy gained per doubling of the cost along one dimension: a line through the shapes of one seed."""
    names = [name for name in cells if name == BASE or name.startswith(dimension)]
    x = [math.log2(cost[name]) for name in names]
    y = [next(row["top1"] for row in cells[name] if row["seed"] == seed) for name in names]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - mx) ** 2 for value in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def _points(gain: Mean) -> str:
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _chart(cells: Mapping[str, Any], tops: Mapping[str, Mean], cost: Mapping[str, float]) -> Chart:
    series = []
    for dimension in ("depth", "width", "patch"):
        names = sorted((name for name in cells if name == BASE or name.startswith(dimension)), key=lambda name: cost[name])
        if len(names) > 1:
            series.append(Series.of_means(dimension, [cost[n] for n in names], (tops[n] for n in names)))
    return Chart("shapes", "Accuracy by cost", "training FLOPs relative to the base", "top-1", series, logx=True, percent=True)
