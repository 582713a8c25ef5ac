"""probe.html: what frozen features of several models give, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitrail.checkpoints.io import write_text
from vitrail.evaluation.probe_report import NAMES, ProbeReport, Score
from vitrail.inspection.draw import series
from vitrail.inspection.page import render

PAGE = "probe.html"
_TITLES = {"ranking": "Ranking", "curves": "Curves", "tables": "Figures", "notes": "Notes"}


def write_probe(report: ProbeReport, folder: str | Path) -> Path:
    """Write probe.html into a folder and return its path."""
    path = Path(folder) / PAGE
    write_text(path, render("probe.html.jinja", _TITLES, _context(report)))
    return path


def _context(report: ProbeReport) -> dict[str, Any]:
    methods = list(dict.fromkeys(score.method for score in report.scores))
    shots = list(dict.fromkeys(score.shots for score in report.scores))
    per_class = max(report.sizes["train"] / len(report.classes), *shots, 1)
    places = {float(count or 2 * per_class): str(count or "all") for count in shots}
    several = f"{len(report.backbones)} models" if len(report.backbones) > 1 else report.backbones[0].label
    return {
        "title": f"{report.data} · probe",
        "subtitle": f"Frozen features of {several}, {len(report.classes)} classes, judged on {report.sizes['test']:,} "
        f"{report.judged_on} samples.",
        "ranking": {"advice": report.advice, "by": NAMES[report.ranked_by[0]], "rows": _ranking(report)},
        "curves": {
            "charts": [_chart(report, method, shots, places) for method in methods] if len(shots) > 1 else [],
            "seeds": report.seeds,
        },
        "tables": {"shots": [f"{count} a class" if count else "all" for count in shots], "groups": [
            {"name": NAMES[method], "rows": [
                {"name": b.label, "cells": [_cell(report.score(b.label, method, count)) for count in shots]}
                for b in report.backbones
            ]} for method in methods
        ]},
        "notes": list(report.notes),
    }  # fmt: skip


def _ranking(report: ProbeReport) -> list[dict[str, str]]:
    cost = {backbone.label: backbone for backbone in report.backbones}
    rows = []
    for rank in report.ranking:
        b = cost[rank.label]
        gap, low, high = (100 * value for value in rank.behind)
        rows.append({
            "name": rank.label, "accuracy": f"{rank.accuracy:.1%}", "interval": f"{rank.low:.1%} to {rank.high:.1%}",
            "behind": "" if rank is report.ranking[0] else f"{gap:.1f} ({low:.1f} to {high:.1f})",
            "parameters": f"{b.parameters / 1e6:.3g} M", "flops": f"{b.flops / 2e9:.3g}",
            "size": f"{b.image_size[0]} x {b.image_size[1]}", "seconds": f"{b.seconds:.1f}{' (kept)' if b.kept else ''}",
        })  # fmt: skip
    return rows


def _chart(report: ProbeReport, method: str, shots: list[int], places: dict[float, str]) -> Any:
    lines = {}
    for backbone in report.backbones:
        found = [report.score(backbone.label, method, count) for count in shots]
        lines[backbone.label] = (list(places), [score.mean for score in found], [score.spread for score in found])
    return series(lines, NAMES[method].partition(" (")[0], "training samples of each class", ticks=places, log=True)


def _cell(score: Score) -> dict[str, str]:
    spread = f" ± {100 * score.spread:.1f}" if len(score.accuracies) > 1 else ""
    return {"text": f"{100 * score.mean:.1f}{spread}", "setting": f"{score.setting:.3g}"}
