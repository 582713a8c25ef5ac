"""Class token or mean of the patches (ViT, appendix D.3): the same accuracy, if each gets its own learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from vitrail.studies.small import vit
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, train_runs

EXAMPLES = """\
vitrail study pooling photos/ --budget 1e12
vitrail study pooling photos/ --lrs 3e-4,1e-3,3e-3 --seeds 0,1,2,3,4 --train hflip=0"""

POOLS: dict[str, dict[str, Any]] = {
    "class token": {"pool": "cls", "class_token": True},
    "mean": {"pool": "mean", "class_token": False},
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare the class token with the mean of the patches over learning rates (the ViT paper found no difference)."""

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # peak learning rates that both are trained with
    model: str = "vit_tiny_patch16_224"  # a plain ViT
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings of the model, over those of the small one that studies use (width 96, depth 6, patch 8)."""


def plan(config: Config) -> list[Runs]:
    """Both pools at every learning rate."""
    variants = {
        f"{pool} lr {lr:g}": {"lr": lr, "overrides": {**vit(config.image_size), **config.overrides, **change}}
        for pool, change in POOLS.items()
        for lr in config.lrs
    }
    return [Runs(models=[config.model], variants=variants)]


def measure(config: Config) -> list[Row]:
    """Train, or go on."""
    return train_runs("pooling", config, plan(config))


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """Each pool at its best learning rate, and what the other's rate would have cost it."""
    cells = by(rows, "variant")
    means = {name: mean(row["top1"] for row in group) for name, group in cells.items()}
    best = {pool: max(config.lrs, key=lambda lr: means[f"{pool} lr {lr:g}"].value) for pool in POOLS}
    first, second = POOLS
    gap = difference(cells[f"{first} lr {best[first]:g}"], cells[f"{second} lr {best[second]:g}"])
    sentences = [
        f"Best learning rate: {best[pool]:g} for the {pool}, top-1 {means[f'{pool} lr {best[pool]:g}'].percent()} %."
        for pool in POOLS
    ]
    if best[first] != best[second]:
        borrowed = difference(cells[f"{second} lr {best[first]:g}"], cells[f"{second} lr {best[second]:g}"])
        sentences.append(f"With the class token's learning rate the mean changes by {100 * borrowed.value:+.1f} points.")
    sentences.append(
        "The learning rates are compared on the pictures that also judge: the best values flatter both pools alike."
    )
    series = [Series.of_means(pool, config.lrs, (means[f"{pool} lr {lr:g}"] for lr in config.lrs)) for pool in POOLS]
    table = Table(
        "Top-1 accuracy in percent, mean and 95 % interval over seeds",
        ["learning rate", *POOLS],
        [[f"{lr:g}", *(means[f"{pool} lr {lr:g}"].percent() for pool in POOLS)] for lr in config.lrs],
    )
    return Findings(
        answer=f"At each one's best learning rate {verdict(gap, 'the ' + first, 'the ' + second)}.",
        sentences=sentences,
        tables=[table],
        charts=[Chart("pooling", "Accuracy by learning rate", "learning rate", "top-1", series, logx=True, percent=True)],
        numbers={"best_lr": best, "difference": gap._asdict(), "top1": {name: m._asdict() for name, m in means.items()}},
    )
