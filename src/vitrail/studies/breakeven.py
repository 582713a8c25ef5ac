"""ViT or CNN for my data: learning curves of the families on nested subsets, and where the plain ViT would overtake.

The ViT paper (section 4.3, figures 3 and 4) found that ResNets win on small data and ViTs on large; where the two meet depends
on the data, so it is measured on the data at hand and extrapolated with an interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrail.studies.curves import LEAST_SIZES, Crossing, Curve, crossing, error_series, fit
from vitrail.studies.small import FAMILIES, family
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, StudyConfig, Table, train_runs, training_counts
from vitrail.studies.subsets import size_of, subset_variants

EXAMPLES = """\
vitrail study breakeven photos/ --budget 1e12
vitrail study breakeven photos/ --families resnet swin vit --fractions 0.05,0.1,0.2,0.5,1 --train hflip=0"""

CHALLENGER = "vit"
POOR_FIT = 0.01  # chance of the measured means under the fitted form, below which nothing is extrapolated


@dataclass(frozen=True)
class Config(StudyConfig):
    """Which family to use at the size of this data set, and from how many pictures on a plain ViT would be better."""

    families: tuple[str, ...] = FAMILIES  # compared at equal training cost; vit is the one that may overtake
    fractions: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)  # of the training pictures; every seed nests its own subsets
    scale: float = 1.0  # of all widths of the small models, which have about half a million parameters at 1
    horizon: float = 100.0  # how many times the data set's size curves are extrapolated at most


def plan(config: Config, counts: Sequence[int]) -> list[Runs]:
    """Every family on every subset."""
    models = {name: family(name, config.image_size, config.scale) for name in config.families}
    return [Runs(models=models, variants=subset_variants(counts, config.fractions), subsets=True)]


def measure(config: Config) -> list[Row]:
    """Train, or go on."""
    return train_runs("breakeven", config, plan(config, training_counts(config)))


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """The best family at the largest size, and for each other one the size at which the ViT overtakes it."""
    families = by(rows, "model")
    errors = {name: _errors(group) for name, group in families.items()}
    sizes = sorted({size_of(row) for row in rows})
    largest = sizes[-1]
    horizon = config.horizon * largest
    problems, curves = {}, {}
    for name, points in errors.items():
        try:
            curves[name] = fit(points)
        except ValueError as problem:
            problems[name] = str(problem)
    met = {name: _meeting(curves, name, largest, horizon) for name in families if name != CHALLENGER and CHALLENGER in families}
    here = _best_here(families, largest)
    best = here["best"]
    answer = f"With {largest:,} pictures use {here['told']}."
    if best == CHALLENGER:
        answer += " The plain ViT is already ahead."
    elif CHALLENGER in families:
        answer += f" {_when(met[best], best, largest, horizon, problems or _poor(curves, best))}"
    return Findings(
        answer=answer,
        sentences=[*here["sentences"], *_cautions(curves, problems, sizes)],
        tables=[_accuracies(families, sizes), *([_fits(curves, met, largest)] if curves else [])],
        charts=[_chart(families, curves, sizes, horizon)],
        numbers={
            "best_here": best,
            "not_told_apart": here["alike"],
            "overtakes": {name: dataclasses.asdict(found) for name, found in met.items() if found},
            "curves": {name: _numbers(curve) for name, curve in curves.items()},
            "horizon": horizon,
        },
    )


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[float, list[float]]:
    return {float(size): [1 - row["top1"] for row in group] for size, group in by(rows, size_of).items()}


def _meeting(curves: Mapping[str, Curve], name: str, largest: int, horizon: float) -> Crossing | None:
    """None where a curve is missing or does not fit."""
    if not {name, CHALLENGER} <= set(curves) or _poor(curves, name):
        return None
    return crossing(curves[CHALLENGER], curves[name], largest, horizon)


def _poor(curves: Mapping[str, Curve], name: str) -> list[str]:
    return [which for which in (name, CHALLENGER) if which in curves and curves[which].misfit < POOR_FIT]


def _best_here(families: Mapping[str, Sequence[Mapping[str, Any]]], largest: int) -> dict[str, Any]:
    """The family with the highest mean at the largest size, and those that cannot be told from it."""
    there = {name: [row for row in rows if size_of(row) == largest] for name, rows in families.items()}
    means = {name: mean(row["top1"] for row in rows) for name, rows in there.items()}
    ranked = sorted(means, key=lambda name: -means[name].value)
    best, others = ranked[0], ranked[1:]
    gaps = {name: difference(there[best], there[name]) for name in others}
    alike = [name for name in others if not gaps[name].low > 0]
    told = f"a {best}" if not alike else f"a {best} or, as it cannot be told apart with these seeds, {' or '.join(alike)}"
    sentences = [f"{verdict(gaps[name], best, name).capitalize()} at {largest:,} pictures." for name in others]
    return {"best": best, "alike": alike, "told": f"{told} ({means[best].percent()} %)", "sentences": sentences}


def _when(found: Crossing | None, best: str, largest: int, horizon: float, problems: object) -> str:
    """The answer to "at how many pictures would a plain ViT overtake"."""
    if found is None:
        why = "its curve or the ViT's does not follow a power law" if isinstance(problems, list) else "there is no curve"
        return f"From how many pictures on a plain ViT would be better cannot be told: {why}."
    if found.kind == "known":
        return (
            f"A plain ViT would overtake {best} at about {_round(found.size)} pictures "
            f"(95 % interval {_round(found.low)} to {_round(found.high)}), {found.size / largest:.1f} times what there is."
        )
    if found.kind == "ahead":
        return f"The curves say that a plain ViT is ahead of {best} already."
    if found.kind == "never":
        return (
            f"A plain ViT would not overtake {best} up to {_round(horizon)} pictures, as far as these curves are extrapolated."
        )
    return (
        f"From how many pictures on a plain ViT would overtake {best} cannot be told from these curves: it does within "
        f"{_round(horizon)} pictures in {100 * found.share:.0f} % of the draws, not before {_round(found.low)} in 97.5 %."
    )


def _round(n: float) -> str:
    """A number of pictures with two digits."""
    if not math.isfinite(n):
        return "infinitely many"
    digits = max(math.floor(math.log10(max(n, 1))) - 1, 0)
    return f"{round(n / 10**digits) * 10**digits:,.0f}"


def _cautions(curves: Mapping[str, Curve], problems: Mapping[str, str], sizes: Sequence[int]) -> list[str]:
    said = [f"{name}: no curve was fitted ({problem})." for name, problem in problems.items()]
    said += [
        f"{name}: a power law with an offset does not fit (p = {curve.misfit:.3f}), so nothing is said beyond the data."
        for name, curve in curves.items()
        if curve.misfit < POOR_FIT
    ]
    if len(sizes) < LEAST_SIZES:
        said.append(f"With {len(sizes)} sizes no curve can be fitted; --fractions takes {LEAST_SIZES} or more.")
    return [
        *said,
        "Every run has the same training cost, whatever its size and family; with more compute the curves would move.",
    ]


def _accuracies(families: Mapping[str, Sequence[Mapping[str, Any]]], sizes: Sequence[int]) -> Table:
    rows = []
    for name, group in families.items():
        cells = by(group, size_of)
        parameters = f"{group[0]['parameters'] / 1e6:.2f} M"
        rows.append([name, parameters, *(mean(row["top1"] for row in cells[n]).percent() if n in cells else "" for n in sizes)])
    columns = ["family", "parameters", *(f"{n:,} pictures" for n in sizes)]
    return Table("Top-1 accuracy in percent, mean and 95 % interval over seeds", columns, rows)


def _fits(curves: Mapping[str, Curve], met: Mapping[str, Crossing | None], largest: int) -> Table:
    rows = []
    for name, curve in curves.items():
        offset, low, high = curve.offset
        beyond = 100 * float(curve.at(10.0 * largest)[0])
        ten_low, ten_high = (100 * float(end[0]) for end in curve.band(10.0 * largest))
        found = met.get(name)
        overtaken = "" if name == CHALLENGER else "cannot be told" if found is None else _cell(found)
        rows.append([
            name, f"{curve.best[1]:.2f}", f"{100 * offset:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{beyond:.1f} ({ten_low:.1f} to {ten_high:.1f})", f"{curve.misfit:.2f}", overtaken,
        ])  # fmt: skip
    columns = ["family", "exponent", "error that stays, %", f"error at {10 * largest:,}, %", "fit, p", "ViT overtakes at"]
    return Table("Learning curves: error = a n^-b + c, 95 % bootstrap intervals", columns, rows)


def _cell(found: Crossing) -> str:
    if found.kind == "known":
        return f"{_round(found.size)} ({_round(found.low)} to {_round(found.high)})"
    return {"ahead": "ahead already", "never": "not up to the horizon", "unknown": "cannot be told"}[found.kind]


def _chart(
    families: Mapping[str, Sequence[Mapping[str, Any]]], curves: Mapping[str, Curve], sizes: Sequence[int], horizon: float
) -> Chart:
    reach = np.geomspace(sizes[0], min(horizon, 30 * sizes[-1]), 60)
    fitting = {name: curve for name, curve in curves.items() if curve.misfit >= POOR_FIT}
    series = error_series(families, size_of, fitting, lambda _: reach)
    note = "Dots: means over seeds. Dashed: fitted curves with 95 % bands, beyond the largest size extrapolated."
    return Chart(
        "learning-curves",
        "Error by number of pictures",
        "training pictures",
        "test error",
        series,
        logx=True,
        logy=True,
        percent=True,
        note=note,
    )


def _numbers(curve: Curve) -> dict[str, Any]:
    a, b, c = (float(x) for x in curve.best)
    return {"a": a, "b": b, "c": c, "c_interval": list(curve.offset[1:]), "misfit": curve.misfit}
