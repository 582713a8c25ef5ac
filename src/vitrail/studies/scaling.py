"""Data size and model size: learning curves, error by compute, and where each family saturates (ViT, figures 3, 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrail.config import ConfigError
from vitrail.studies.curves import LEAST_SHOWN, Curve, error_series, fit
from vitrail.studies.small import family
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, train_runs, training_counts
from vitrail.studies.subsets import size_of, subset_variants

EXAMPLES = """\
vitrail study scaling photos/ --budget 2e12
vitrail study scaling photos/ --families resnet hybrid vit --scales 0.5,1,2 --fractions 0.05,0.1,0.25,0.5,1"""

POOR_FIT = 0.01
SATURATED = 0.02  # a family gains less than this share of its error from twice the data


@dataclass(frozen=True)
class Config(StudyConfig):
    """Train model sizes on nested subsets at one budget and on all data at smaller ones; fit error by data and by compute."""

    families: tuple[str, ...] = ("resnet", "vit")  # of small models
    scales: tuple[float, ...] = (0.5, 1.0)  # of all widths; cost and parameters grow with the square
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)  # of the training pictures, at the full budget; seeds nest their own
    budgets: tuple[float, ...] = ()  # smaller FLOP budgets for runs on all data; by default an eighth, a quarter, a half


def budgets(config: Config) -> list[float]:
    """The smaller budgets, ascending. Raises ConfigError for one that is not smaller than the full one."""
    found = sorted(config.budgets) or [config.budget * share for share in (0.125, 0.25, 0.5)]
    if found[-1] >= config.budget:
        raise ConfigError(f"budgets: {found[-1]:g} is not below --budget {config.budget:g}, which is trained with anyway")
    return found


def models(config: Config) -> dict[str, dict[str, Any]]:
    """{family and scale: settings}."""
    return {f"{name} x{scale:g}": family(name, config.image_size, scale) for name in config.families for scale in config.scales}


def measure(config: Config) -> list[Row]:
    """Train, or go on."""
    variants = subset_variants(training_counts(config), config.fractions)
    if max(config.fractions) < 1:
        raise ConfigError(
            f"fractions: the largest is {max(config.fractions):g}; 1, all training pictures, is needed for compute"
        )
    data = Runs(models=models(config), variants=variants, subsets=True, folder="data")
    whole = {name: variants[name] for name in [list(variants)[-1]]}
    compute = [
        Runs(models=models(config), variants=whole, subsets=True, budget=budget, folder=f"budget-{budget:g}")
        for budget in budgets(config)
    ]
    rows = train_runs("scaling", config, [data, *compute])
    return [{**row, "budget": float(row["folder"].split("/")[0].partition("budget-")[2] or config.budget)} for row in rows]


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """Curves over data and over compute, the best size at each, and who still gains from data."""
    full = max(row["budget"] for row in rows)
    by_data = by([row for row in rows if row["budget"] == full], "model")
    largest = max(size_of(row) for row in rows)
    by_compute = by([row for row in rows if size_of(row) == largest], "model")
    data_curves, compute_curves = _fits(by_data, size_of), _fits(by_compute, lambda row: row["budget"])
    sentences = [_bigger(config, by_data, name, by_data) for name in config.families if len(config.scales) > 1]
    saturation = {name: _saturation(data_curves.get(name), largest) for name in by_data}
    best = max(by_data, key=lambda name: mean(row["top1"] for row in by_data[name] if size_of(row) == largest).value)
    top = mean(row["top1"] for row in by_data[best] if size_of(row) == largest)
    saturated = [name for name, share in saturation.items() if share and share[2] < SATURATED]
    gaining = [name for name, share in saturation.items() if share and share[1] > SATURATED]
    answer = f"At {full:.1e} FLOPs and {largest:,} pictures {best} is best ({top.percent()} %)."
    answer += f" Still gaining from data: {', '.join(gaining)}." if gaining else " None is sure to gain from more data."
    answer += f" Saturated: {', '.join(saturated)}." if saturated else ""
    return Findings(
        answer=answer,
        sentences=[sentence for sentence in sentences if sentence],
        tables=[
            _accuracies("By number of pictures, at the full budget: top-1 in percent", by_data, size_of, "{:,} pictures"),
            _accuracies("By budget, on all pictures: top-1 in percent", by_compute, lambda row: row["budget"], "{:.1e} FLOPs"),
            _curve_table(data_curves, compute_curves, saturation, largest, full),
        ],
        charts=[
            _chart("data", "Error by number of pictures", "training pictures", by_data, data_curves, size_of),
            _chart(
                "compute", "Error by training compute", "training FLOPs", by_compute, compute_curves, lambda row: row["budget"]
            ),
            _iso(by([row for row in rows if size_of(row) == largest], "budget")),
        ],
        numbers={
            "best": best,
            "data": {name: _numbers(curve) for name, curve in data_curves.items()},
            "compute": {name: _numbers(curve) for name, curve in compute_curves.items()},
            "gain_of_doubling": {name: list(share) for name, share in saturation.items() if share},
        },
    )


def _fits(groups: Mapping[str, Sequence[Mapping[str, Any]]], key: Any) -> dict[str, Curve]:
    """Curves of the models that have enough sizes and seeds and follow a power law."""
    curves = {}
    for name, group in groups.items():
        try:
            curve = fit({float(size): [1 - row["top1"] for row in cell] for size, cell in by(group, key).items()})
        except ValueError:  # too few sizes or seeds: shown without a curve
            continue
        if curve.misfit >= POOR_FIT:
            curves[name] = curve
    return curves


def _bigger(config: Config, groups: Mapping[str, Any], name: str, by_data: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether a family's larger model gains more on much data than on little (figure 3)."""
    small, large = (f"{name} x{scale:g}" for scale in (min(config.scales), max(config.scales)))
    if small not in groups or large not in groups:
        return ""
    sizes = sorted({size_of(row) for row in by_data[large]})
    ends = []
    for n in dict.fromkeys((sizes[0], sizes[-1])):
        pair = [[row for row in by_data[which] if size_of(row) == n] for which in (large, small)]
        ends.append(f"on {n:,} pictures {verdict(difference(pair[0], pair[1]), large, small)}")
    return f"{'; '.join(ends)}."[0].upper() + f"{'; '.join(ends)}."[1:]


def _saturation(curve: Curve | None, largest: int) -> tuple[float, float, float] | None:
    """The share of the error that twice the data would remove, with the ends of its 95 % interval."""
    if curve is None:
        return None
    ends = np.array([largest, 2.0 * largest])
    draws = curve.draws[:, 0, None] * ends ** -curve.draws[:, 1, None] + curve.draws[:, 2, None]
    low, high = np.quantile(1 - draws[:, 1] / draws[:, 0], [0.025, 0.975])
    here, twice = curve.at(ends)
    return float(1 - twice / here), float(low), float(high)


def _accuracies(title: str, groups: Mapping[str, Sequence[Mapping[str, Any]]], key: Any, form: str) -> Table:
    sizes = sorted({key(row) for group in groups.values() for row in group})
    rows = []
    for name, group in groups.items():
        cells = by(group, key)
        told = [mean(row["top1"] for row in cells[size]).percent() if size in cells else "" for size in sizes]
        rows.append([name, f"{group[0]['parameters'] / 1e6:.2f} M", *told])
    return Table(title, ["model", "parameters", *(form.format(size) for size in sizes)], rows)


def _curve_table(
    data: Mapping[str, Curve], compute: Mapping[str, Curve], saturation: Mapping[str, Any], largest: int, full: float
) -> Table:
    def offset(curve: Curve | None) -> str:
        return "no fit" if curve is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in curve.offset))

    rows = []
    for name, share in saturation.items():
        gain = "" if share is None else "{:.0f} ({:.0f} to {:.0f})".format(*(100 * x for x in share))
        exponents = [f"{curves[name].best[1]:.2f}" if name in curves else "" for curves in (data, compute)]
        rows.append([name, exponents[0], offset(data.get(name)), gain, exponents[1], offset(compute.get(name))])
    return Table(
        "Fits of error = a n^-b + c, 95 % bootstrap intervals",
        ["model", "b, data", "error that stays, %", "error removed by twice the data, %", "b, compute", "error that stays, %"],
        rows,
        note=f"Over data at {full:.1e} FLOPs, over compute on {largest:,} pictures; no fit: too few sizes, or no power law.",
    )


def _chart(
    name: str, title: str, xlabel: str, groups: Mapping[str, Sequence[Mapping[str, Any]]], curves: Mapping[str, Curve], key: Any
) -> Chart:
    series = error_series(groups, key, curves, lambda sizes: np.geomspace(min(sizes), 4 * max(sizes), 50))
    return Chart(
        name, title, xlabel, "test error", series, logx=True, logy=True, percent=True,
        note="Dots: means over seeds. Dashed: fitted curves with 95 % bands, extrapolated to four times the largest.",
    )  # fmt: skip


def _iso(groups: Mapping[float, Sequence[Mapping[str, Any]]]) -> Chart:
    """Error by parameters, one line for each family and budget: which size a budget is best spent on."""
    series = []
    for budget, rows in sorted(groups.items()):
        for name, group in by(rows, lambda row: row["model"].split(" x")[0]).items():
            cells = {size: mean(1 - row["top1"] for row in cell) for size, cell in sorted(by(group, "parameters").items())}
            series.append(Series.of_means(f"{name}, {budget:.1e}", list(cells), cells.values(), floor=LEAST_SHOWN))
    return Chart(
        "iso-compute", "Error by model size at equal compute", "parameters", "test error", series, logx=True, percent=True
    )


def _numbers(curve: Curve) -> dict[str, Any]:
    a, b, c = (float(x) for x in curve.best)
    return {"a": a, "b": b, "c": c, "c_interval": list(curve.offset[1:]), "misfit": curve.misfit}
