"""What the report says, section by section: numbers as words and tables, ready for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitrail.evaluation.metrics import Report
from vitrail.inspection import draw

MATRIX_CLASSES = 24  # up to here the confusion matrix is a table of counts, beyond it a figure
TABLE_CLASSES = 30  # rows of the class table shown at once
_SPLITS = {"val": "validation", "train": "training"}
Context = dict[str, Any]


def percent(value: float, n: float | int, digits: int | None = None) -> str:
    """A fraction in percent without the sign, with the digits that n samples can carry; a dash where it is undefined."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.{(1 if n < 10_000 else 2) if digits is None else digits}f}"


def result(report: Report, parameters: int, minutes: float | None, weights: str, caution: str, noun: str) -> Context:
    """The headline number with its interval, and the other numbers around it.

    weights: which weights were measured, the beginning of a sentence; caution: how the samples were used before;
    noun: what a sample is, "picture" or "video".
    """
    metrics, n = report.metrics, report.metrics["n"]
    name = report.headline
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    told = {"top1": f"of the {noun}s named rightly (top-1 accuracy)", "map": "mean average precision over the labels"}[name]
    facts = [_rate(report, "top5", "top-5 accuracy")] if not report.multi_label and len(report.classes) > 5 else []
    if report.multi_label:
        facts += [_rate(report, "micro_f1", "micro F1"), _rate(report, "macro_f1", "macro F1")]
        even = "per label; always saying 50 % gives 0.693"
    else:
        facts += [_rate(report, "balanced_accuracy", "balanced accuracy"), _rate(report, "macro_f1", "macro F1")]
        even = f"guessing evenly gives ln {len(report.classes)} = {math.log(len(report.classes)):.3f}"
    facts += [
        {"name": "negative log-likelihood", "value": f"{metrics['nll']:.3f}", "note": f"nats; {even}"},
        {"name": "calibration error", "value": f"{percent(metrics['ece'], n)} %", "note": "expected, over 15 bins"},
        {"name": "parameters", "value": as_count(parameters), "note": ""},
    ]
    if minutes is not None:
        facts.append({"name": "training time", "value": as_time(minutes), "note": ""})
    support = np.array([row["support"] for row in report.per_class])
    chance = None if report.multi_label else float(support.max() / support.sum())
    return {
        "about": f"{weights} on the {_SPLITS.get(report.split, report.split or 'given')} {noun}s. {caution}",
        "interval": f"The interval is a bootstrap over these {noun}s: it shows how far the number would move with another "
        "sample of this size, not with another training run.",
        "value": percent(metrics[name], n),
        "name": told,
        "low": percent(low, n),
        "high": percent(high, n),
        "width": f"{100 * (high - low):.3f}",
        "n": f"{int(n):,}",
        "chance": None if chance is None else f"{100 * chance:.2f}",
        "chance_name": "" if chance is None else f"always the largest class: {percent(chance, n)} %",
        "chance_right": chance is not None and chance > 0.5,
        "chance_edge": None if chance is None else f"{100 * (1 - chance if chance > 0.5 else chance):.2f}",
        "facts": facts,
        "notes": report.notes,
    }


def _rate(report: Report, name: str, title: str) -> dict[str, str]:
    n = report.metrics["n"]
    low, high = (percent(report.metrics[f"{name}_{end}"], n) for end in ("low", "high"))
    return {"name": title, "value": f"{percent(report.metrics[name], n)} %", "note": f"95 % interval {low} to {high}"}


def training(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], loss: str, noun: str
) -> Context | None:
    """Charts of loss, accuracy and learning rate from the run's records; None if there are none."""
    trained = {name: line(steps, name) for name in ("loss", "accuracy", "lr")}
    judged = {name: line(evaluations, name) for name in ("nll", "top1", "map", "macro_f1")}
    together = {"training": trained["loss"], "validation": judged["nll"]}
    charts = {"Loss": together} if loss == "ce" else {"Loss in training": {"training": trained["loss"]}}
    if loss != "ce":  # sums over classes: another scale than the likelihood of the validation pictures
        charts["Loss in validation"] = {"validation": judged["nll"]}
    if judged["map"][0]:
        charts["Mean average precision"] = {"validation": judged["map"]}
    else:
        charts["Accuracy"] = {"training": trained["accuracy"], "validation": judged["top1"]}
    charts["Learning rate"] = {"learning rate": trained["lr"]}
    drawn = []
    for title, lines in charts.items():
        there = {name: line for name, line in lines.items() if line[0]}
        if there:
            drawn.append(draw.curves(there, title, percent=title in ("Accuracy", "Mean average precision")))
    about = (
        f"Training values are means over the augmented {noun}s of the steps before each point, so they are usually worse than "
        f"those of the same weights on unchanged {noun}s. Validation values are of the whole validation set."
    )
    return {"charts": drawn, "about": about} if drawn else None


def line(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of a name in the records that have it; nan where a value was not finite."""
    there = [record for record in records if name in record and record.get("epoch") is not None]
    return [float(r["epoch"]) for r in there], [math.nan if r[name] is None else float(r[name]) for r in there]


def confusion(report: Report, noun: str) -> Context:
    """A table of counts for few classes, a chart in an order of likeness for many, and the most frequent confusions."""
    if report.multi_label:
        rows = []
        for name, ((_, extra), (missed, found)) in zip(report.classes, report.confusion.tolist(), strict=True):
            cells = [_cell(found, found + missed, True, f"{name}: found {found} of {found + missed}"),
                     _cell(extra, found + extra, False, f"{name}: given {found + extra} times, {extra} wrongly"),
                     _cell(missed, found + missed, False, f"{name}: missed {missed} of {found + missed}")]  # fmt: skip
            rows.append({"name": name, "cells": cells})
        about = "Per label: how often it was found, given wrongly, and missed, at a threshold of 50 %."
        return {"about": about, "rows": rows, "names": ["found", "wrongly given", "missed"], "level": False, "top": []}
    n = int(report.metrics["n"])
    top = [
        {"truth": truth, "answer": answer, "count": count, "share": f"{percent(share, n)} %"}
        for truth, answer, count, share in report.top_confusions(12 if len(report.classes) <= MATRIX_CLASSES else 24)
    ]
    about = f"Rows are what a {noun} is, columns what the model called it; n = {n:,}. "
    if len(report.classes) > MATRIX_CLASSES:
        about += "The colour is the share of the row; classes that are confused with each other lie side by side."
        return {"about": about, "rows": [], "chart": draw.confusion_chart(report.confusion, report.classes), "top": top}
    rows = []
    for truth, counts in zip(report.classes, report.confusion.tolist(), strict=True):
        total = sum(counts)
        cells = [
            _cell(count, total, answer == truth, f"{truth} called {answer}: {count} of {total}")
            for answer, count in zip(report.classes, counts, strict=True)
        ]
        rows.append({"name": truth, "cells": cells})
    about += "The colour is the share of the row; the colour of mistakes is strengthened, so that single ones show."
    level = max(len(name) for name in report.classes) <= 3
    return {"about": about, "rows": rows, "names": report.classes, "level": level, "top": top}


def _cell(count: int, total: int, hit: bool, title: str) -> Context:
    share = count / total if total else 0.0
    alpha = 0.12 + 0.88 * (share if hit else math.sqrt(share))
    # How strong the colour is decides which text can be read on it; the page picks one for light and one for dark.
    strength = " full" if alpha > 0.78 else " strong" if alpha > 0.55 else ""
    kind = f"{'hit' if hit else 'miss'}{strength}"
    return {"count": count, "alpha": f"{alpha:.3f}", "kind": kind, "title": title}


def classes(report: Report, noun: str) -> Context:
    """The class table, weakest first."""
    n = report.metrics["n"]
    keys = ["recall", "precision", "f1", *(["average_precision"] if report.multi_label else [])]
    weakest = sorted(report.per_class, key=lambda row: (not math.isfinite(row["f1"]), row["f1"]))
    rows = []
    for row in weakest:
        cells = [{"text": f"{row['support']:,}", "bar": None}]
        for key in keys:
            defined = math.isfinite(row[key])
            text = f"{percent(row[key], n, 1)} %" if defined else "–"
            cells.append({"text": text, "bar": f"{100 * row[key]:.1f}" if defined and key == keys[-1] else None})
        rows.append({"name": row["class"], "cells": cells})
    about = f"Weakest first. Recall: how many of a class's {noun}s were found; precision: how many answers of that name "
    about += "were right; F1: their harmonic mean."
    if any(not math.isfinite(row[key]) for row in weakest for key in keys):
        about += f" A dash: these {noun}s have no such class, or it was never answered."
    columns = [f"{noun}s", "recall", "precision", "F1", *(["average precision"] if report.multi_label else [])]
    return {"about": about, "columns": columns, "rows": rows[:TABLE_CLASSES], "more": rows[TABLE_CLASSES:]}


def calibration(report: Report) -> Context:
    """Whether the probabilities can be taken at their word."""
    answers = sum(part.count for part in report.calibration)
    mean_gap = sum(part.count * (part.confidence - part.accuracy) for part in report.calibration if part.count) / answers
    tendency = "surer than it is right" if mean_gap > 0 else "more often right than it is sure"
    what = "label decisions" if report.multi_label else "answers"
    about = (
        f"A point on the dashed line means: of the {what} given with that probability, so many were right. On average the "
        f"model is {percent(abs(mean_gap), answers)} points {tendency}. The expected calibration error is "
        f"{percent(report.metrics['ece'], answers)} points; n = {answers:,} {what}."
    )
    return {"about": about, "chart": draw.calibration(report.calibration)}


def as_count(number: int) -> str:
    """5717416 as 5.72 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def as_time(minutes: float) -> str:
    """A duration in the unit that suits it."""
    if minutes < 2:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
