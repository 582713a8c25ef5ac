"""Tables and JSON on stdout, the same look for every verb."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 160  # a pipe has no width of its own; long names must not be cut there


def console() -> Console:
    """A console on stdout as it is now, as wide as the terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", right: Iterable[str] = ()) -> None:
    """Print rows under headings; columns named in `right` are aligned to the right."""
    heading(title)
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in set(right) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(number(value) for value in row))
    console().print(made)


def tables(found: Iterable[Any]) -> None:
    """Print tables that have a title, columns and rows."""
    for each in found:
        table(each.columns, each.rows, title=each.title)


def notes(lines: Iterable[str]) -> None:
    """Print one remark per line."""
    for line in lines:
        print(f"note: {line}")


def heading(text: str) -> None:
    """Print a title, bold on a terminal; nothing for ""."""
    if text:
        console().print(text, style="bold")


def pairs(values: Mapping[str, Any], title: str = "") -> None:
    """Print names and values in two columns, then an empty line."""
    heading(title)
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"  {name:<{width}}  {number(value)}")
    print()


def as_json(value: Any) -> None:
    """Print plain data as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def number(value: Any) -> str:
    """Four significant digits for a float, a sequence as flags spell it, the plain text for the rest."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(number, value))
    return "none" if value is None else str(value)
