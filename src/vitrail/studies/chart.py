"""A `Chart` drawn twice: as SVG in the page's colours and as a PNG for anywhere else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from vitrail.inspection.charts import publish
from vitrail.studies.study import Chart, Series

# The tones of a stained-glass window that can be told apart on light and on dark paper.
PALETTE = ("#3b73c8", "#c8503c", "#d39a2d", "#3f9468", "#8a63b8", "#5f7388", "#b8578f", "#7a8f2e")
MARKS = "osD^vPX*"


def draw(chart: Chart, out: Path) -> Markup:
    """Write the chart into `out` as NAME.png and NAME.svg; returns it as inline SVG for a page."""
    return publish(lambda: _figure(chart), chart.title, out / chart.name)


def _figure(chart: Chart) -> Figure:
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(chart.series):
        place = number if series.colour is None else series.colour
        shift = 0.12 * (number - (len(chart.series) - 1) / 2) if chart.categories else 0.0
        _add(axes, series, place, shift)
    axes.set_title(chart.title)
    axes.set(xlabel=chart.xlabel, ylabel=chart.ylabel)
    if chart.logx:
        axes.set_xscale("log")
        _plain_log(axes, chart)
    if chart.logy:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))  # every digit would crowd the upper end of a decade
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        if not chart.logy:  # an interval of few seeds may reach where no share can be
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.03), min(high, 1.03))
    if chart.categories:
        long = max(map(len, chart.categories)) * len(chart.categories) > 60
        axes.set_xticks(
            range(len(chart.categories)), chart.categories, rotation=30 if long else 0, ha="right" if long else "center"
        )
        axes.set_xlim(-0.5, len(chart.categories) - 0.5)
    named = sum(bool(series.name) for series in chart.series)
    if 1 < named <= 5:
        axes.legend(loc="best", fontsize=9)
    elif named > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _add(axes: Axes, series: Series, place: int, shift: float) -> None:
    colour, mark = PALETTE[place % len(PALETTE)], MARKS[place % len(MARKS)]
    x, y = np.asarray(series.x, float) + shift, np.asarray(series.y, float)
    style = ("--" if series.dashed else "-") if series.line else "none"
    axes.plot(
        x, y, linestyle=style, color=colour, marker="" if series.dashed else mark, markersize=5, label=series.name or None
    )
    if not len(series.low):
        return
    low, high = np.asarray(series.low, float), np.asarray(series.high, float)
    if series.dashed:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.8)


def _plain_log(axes: Axes, chart: Chart) -> None:
    """Ticks at what was measured, where that is few values, and at powers of ten beyond it; else at 1, 2 and 5 of a decade."""
    values = sorted({float(x) for series in chart.series if not series.dashed for x in series.x})
    reach = max(float(x) for series in chart.series for x in series.x)
    apart = all(after / before >= 1.3 for before, after in pairwise(values))  # labels nearer to each other would meet
    if 2 <= len(values) <= 8 and apart:
        beyond = [10.0**power for power in range(20) if 1.5 * values[-1] < 10.0**power <= reach]
        axes.set_xticks([*values, *beyond])
    else:
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _short(x: float) -> str:
    if 1e-3 <= abs(x) < 1e6:
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    return f"{x:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
