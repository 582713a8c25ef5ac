"""Predictions as text: a table for eyes, JSON lines and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

from vitrail.config import unknown
from vitrail.inference.predictor import Prediction

FORMATS = ("table", "jsonl", "csv")
COLUMNS = ("path", "label", "probability", "labels", "top", "error")
TIMES = ("start", "end")  # only of videos asked in windows


@runtime_checkable
class Writable(Protocol):
    """What text can be written to."""

    def write(self, text: str, /) -> Any:
        """Append text."""


def write_predictions(predictions: Iterable[Prediction], format: str, file: Writable, times: bool = False) -> tuple[int, int]:
    """Write predictions as they come; returns how many pictures were answered and how many could not be read.

    table: one aligned line per picture. jsonl: one object per line with the fields of `Prediction`. csv: the same columns, with
    labels as a|b and top as a=0.9|b=0.1; with `times` also start and end, in seconds. Raises ConfigError for an unknown format.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    writer = csv.writer(file, lineterminator="\n")
    if format == "csv":
        writer.writerow((*COLUMNS, *TIMES) if times else COLUMNS)
    elif format == "table":
        file.write(f"{'probability':>11}  {'label':<24}  path\n")
    answered = failed = 0
    for prediction in predictions:
        failed += bool(prediction.error)
        answered += not prediction.error
        if format == "csv":
            seconds = ["" if time is None else f"{time:.3f}" for time in (prediction.start, prediction.end)]
            writer.writerow([*_cells(prediction), *(seconds if times else ())])
        else:
            file.write(f"{_json(prediction) if format == 'jsonl' else _line(prediction)}\n")
    return answered, failed


def _line(prediction: Prediction) -> str:
    path = printable(prediction.path)
    if prediction.error:
        return f"{'–':>11}  {'(no answer)':<24}  {path}: {printable(prediction.error)}"
    if prediction.start is not None:
        path += f"  {prediction.start:.2f} to {prediction.end:.2f} s"
    return f"{100 * prediction.probability:>9.1f} %  {printable(answer_text(prediction)):<24}  {path}"


def answer_text(prediction: Prediction) -> str:
    """The labels that are given, or that there is none."""
    return ", ".join(prediction.labels) or f"(none; nearest {prediction.label})"


def _json(prediction: Prediction) -> str:
    values: dict[str, Any] = asdict(prediction) | ({"probability": None} if prediction.error else {})
    if prediction.start is None:
        values = {name: value for name, value in values.items() if name not in TIMES}
    text = json.dumps(values, ensure_ascii=False)
    # File names need not be valid text; escaped, even those survive the way to another program.
    return text if _encodable(text) else json.dumps(values)


def _cells(prediction: Prediction) -> list[str]:
    top = "|".join(f"{label}={probability:.6f}" for label, probability in prediction.top)
    probability = "" if prediction.error else f"{prediction.probability:.6f}"
    cells = [prediction.path, prediction.label, probability, "|".join(prediction.labels), top, prediction.error]
    return [cell if _encodable(cell) else cell.encode("utf-8", "backslashreplace").decode() for cell in cells]


def printable(text: str) -> str:
    """The text without anything that could move a terminal's cursor or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
