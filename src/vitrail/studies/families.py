"""Every image family at equal size and training cost: does an inductive bias close the gap to the convolutional net?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from vitrail.config import ConfigError, RunConfig, flat, unknown
from vitrail.recipes import RECIPES
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, directory, train_runs

EXAMPLES = """\
vitrail study families photos/ --budget 2e12
vitrail study families photos/ --contenders resnet vit swin bit --image-size 64"""

PLAIN, CONVOLUTIONAL = "vit", "resnet"
BIASES = {
    "hybrid": "a convolutional stem",
    "swin": "windows and stages",
    "cvt": "convolutions in every stage",
    "deit_hard": "a teacher's answers",
    "deit_soft": "a teacher's probabilities",
}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare families, each with its own recipe (`vitrail train --recipe NAME`), and see what closes the gap to the ResNet.

    The ResNet of the same seed teaches the distilled ones: the budget pays for its answers, not for its training.
    """

    image_size: tuple[int, int] = (48, 48)  # height,width in pixels that models see; one number for a square
    contenders: tuple[str, ...] = (CONVOLUTIONAL, PLAIN, *BIASES)  # names of recipes; vit and resnet always take part


def contenders(config: Config) -> dict[str, RunConfig]:
    """The recipes that take part. Raises ConfigError for an unknown one."""
    for name in config.contenders:
        if name not in RECIPES:
            raise unknown("recipe", name, RECIPES)
        if RECIPES[name]().data:
            raise ConfigError(f"the recipe {name} is one for {RECIPES[name]().data} alone; nearest: {PLAIN}")
    return {name: RECIPES[name]() for name in dict.fromkeys((CONVOLUTIONAL, PLAIN, *config.contenders))}


def changes(recipe: RunConfig, config: Config) -> dict[str, Any]:
    """What a recipe sets, but for what the study sets and what was asked for by name."""
    defaults, kept = flat(RunConfig()), {"image_size", "batch_size", "precision", *config.settings}
    changed = {name: value for name, value in flat(recipe).items() if name not in kept and value != defaults[name]}
    return {"model": recipe.model, **changed}


def is_taught(recipe: RunConfig) -> bool:
    """Whether a recipe's model has a distillation token, and so wants a teacher."""
    return "_distilled_" in recipe.model


def measure(config: Config) -> list[Row]:
    """Train those that learn alone, then those that the ResNet of the same seed teaches; or go on."""
    alone: dict[str, dict[str, Any]] = {}
    taught: dict[str, dict[str, Any]] = {}
    for name, recipe in contenders(config).items():
        (taught if is_taught(recipe) else alone)[name] = changes(recipe, config)
    rows = train_runs("families", config, [Runs(models=alone, folder="alone")])
    teachers = {row["seed"]: row["folder"] for row in rows if row["model"] == CONVOLUTIONAL}
    for seed in config.seeds if taught else ():
        teacher = {"teacher": str(directory("families", config) / teachers[seed])}
        runs = Runs(models=taught, settings=teacher, folder=f"taught-seed{seed}")
        rows += train_runs("families", dataclasses.replace(config, seeds=(seed,)), [runs])
    return rows


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """How far every family is from the plain ViT and from the ResNet."""
    groups = by(rows, "model")
    best = sorted(groups, key=lambda name: -mean(row["top1"] for row in groups[name]).value)
    tops = {name: mean(row["top1"] for row in groups[name]) for name in best}
    gap = difference(groups[CONVOLUTIONAL], groups[PLAIN])
    others = [name for name in best if name not in (PLAIN, CONVOLUTIONAL)]
    closed = {name: difference(groups[name], groups[PLAIN]).value / gap.value for name in others} if gap.value > 0 else {}
    answer = f"Between the plain ViT and the ResNet: {verdict(gap, 'the ResNet', 'the ViT')}."
    if closed:
        answer += f" Of that gap close {', '.join(f'{name} {share:.0%}' for name, share in closed.items())}."
    sentences = []
    for name in others:
        before, after = (difference(groups[name], groups[other]) for other in (PLAIN, CONVOLUTIONAL))
        about = f"{name} ({BIASES[name]})" if name in BIASES else name
        sentences.append(f"{about}: {verdict(before, 'it', 'the plain ViT')}; {verdict(after, 'it', 'the ResNet')}.")
    table = Table(
        "Top-1 accuracy in percent",
        ["family", "parameters", "MFLOPs a picture", "steps", "epochs", "mean and 95 % interval", "spread", "seeds"],
        [_row(name, groups[name], config.batch_size) for name in best],
        note="MFLOPs of training on one picture, a teacher's answer included; spread: sample standard deviation over seeds",
    )
    places = list(range(len(best)))
    points = [(place, row["top1"]) for place, name in zip(places, best, strict=True) for row in groups[name]]
    series = [Series.of_means("mean", places, (tops[name] for name in best), line=False)]
    if len(config.seeds) > 1:
        series.append(Series("one seed", [x for x, _ in points], [y for _, y in points], line=False))
    chart = Chart("families", f"Accuracy after {config.budget:.1e} training FLOPs", "", "top-1", series, best, percent=True)
    numbers = {
        "top1": {name: tops[name]._asdict() for name in best},
        "spread": {name: _spread(groups[name]) for name in best},
        "gap_closed": closed,
    }
    return Findings(answer=answer, sentences=sentences, tables=[table], charts=[chart], numbers=numbers)


def _spread(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return stdev(row["top1"] for row in rows) if len(rows) > 1 else None


def _row(name: str, rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[Any]:
    first, spread = rows[0], _spread(rows)
    seen = first["steps"] * batch_size
    return [
        name, f"{first['parameters'] / 1e3:.0f} k", f"{first['flops'] / seen / 1e6:.0f}", f"{first['steps']:,}",
        f"{seen / first['pictures']:.0f}", mean(row["top1"] for row in rows).percent(),
        "" if spread is None else f"{100 * spread:.1f}", ", ".join(f"{100 * row['top1']:.1f}" for row in rows),
    ]  # fmt: skip
