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
    made = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in set(right) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(number(value) for value in row))
    console().print(made)


def pairs(values: Mapping[str, Any], title: str = "") -> None:
    """Print names and values in two columns, then an empty line."""
    if title:
        console().print(f"[bold]{title}[/bold]", markup=True)
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
