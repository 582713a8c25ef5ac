"""A study written down: one HTML page, the rows as CSV, the numbers as JSON, every chart as PNG and SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.checkpoints.io import write_text
from vitrail.config import dump, to_dict
from vitrail.inspection.page import render
from vitrail.inspection.run import environment
from vitrail.studies import STUDIES
from vitrail.studies.chart import draw
from vitrail.studies.grid import write_rows
from vitrail.studies.study import Findings, Row, StudyConfig, Table

PAGE, RUNS, NUMBERS = "study.html", "runs.csv", "findings.json"
_TITLES = {
    "answer": "Answer",
    "charts": "Charts",
    "pictures": "Pictures",
    "tables": "Tables",
    "runs": "Runs",
    "reproduce": "Reproduce",
}
_COLUMNS = ("data", "model", "variant", "seed", "pictures", "parameters", "steps", "flops", "seconds", "top1")


def write_study(out: Path, name: str, config: StudyConfig, findings: Findings, rows: Sequence[Row], command: str = "") -> Path:
    """Write everything a study found into its directory; returns the page's path."""
    charts = [{"svg": draw(chart, out), "note": chart.note} for chart in findings.charts]
    write_rows(out / RUNS, rows)
    told = {
        "study": name, "answer": findings.answer, "sentences": list(findings.sentences), "numbers": _finite(findings.numbers),
        "config": to_dict(config), "environment": dict(environment("cpu")),
    }  # fmt: skip
    write_text(out / NUMBERS, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    context = {
        "title": f"{Path(config.data).name} · {name}",
        "subtitle": f"A study of {_counted(rows)}: {STUDIES[name].summary}.",
        "answer": {"about": _about(config, rows), "answer": findings.answer, "sentences": findings.sentences},
        "charts": charts,
        "pictures": {"about": findings.pictures_about, "cards": findings.pictures} if findings.pictures else None,
        "tables": [_shown(table) for table in findings.tables],
        "runs": {"about": f"One row per run, with all metrics in {RUNS}.", "table": _shown(_runs(rows))},
        "reproduce": {"command": command, "environment": environment("cpu"), "config": dump(config)},
    }
    write_text(out / PAGE, render("study.html.jinja", _TITLES, context))
    return out / PAGE


def _counted(rows: Sequence[Row]) -> str:
    """How many runs were trained, or how many measurements of trained models there are."""
    trained = sum("steps" in row for row in rows)
    count, noun = (trained, "run") if trained else (len(rows), "measurement")
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _about(config: StudyConfig, rows: Sequence[Row]) -> str:
    name = Path(config.data).name
    flops = sum(row.get("flops", 0) for row in rows)
    if not flops:
        return f"On {name}; nothing was trained."
    seeds = "one seed" if len(config.seeds) == 1 else f"{len(config.seeds)} seeds"
    return f"On {name}, {seeds}. All runs together cost {flops:.1e} FLOPs."


def _runs(rows: Sequence[Row]) -> Table:
    rows = [row for row in rows if "model" in row]  # comparisons of runs are in the file alone
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    columns += [name for name in dict.fromkeys(n for row in rows for n in row) if name.startswith("top1@")]
    return Table("", columns, [[row.get(name, "") for name in columns] for row in rows])


def _shown(table: Table) -> dict[str, Any]:
    """A table as text, with the columns of numbers on the right."""
    right = [
        bool(table.rows) and all(not isinstance(row[at], str) or _is_number(row[at]) for row in table.rows)
        for at in range(len(table.columns))
    ]
    rows = [[text(cell) for cell in row] for row in table.rows]
    return {"title": table.title, "columns": table.columns, "rows": rows, "right": right, "note": table.note}


def _is_number(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "+-–−.<>"


def text(value: Any) -> str:
    """A cell: four significant digits, large numbers in whole ones or with an exponent, a dash for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "–"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) >= 1e5 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """Plain data whose numbers JSON can hold: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
