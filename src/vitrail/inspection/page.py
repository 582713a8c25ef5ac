"""The frame of every page: one file that opens anywhere, in the page's own colours, with a stained-glass window at the top."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("vitrail.inspection"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, titles: Mapping[str, str], context: Mapping[str, Any]) -> str:
    """A page's text from a template that extends base.html.jinja.

    titles: {name of a section in the context: its heading}, for the contents; sections that are None are left out. The context
    also has "title" and "subtitle".
    """
    contents = [(name, title) for name, title in titles.items() if context[name]]
    made = f"{datetime.now():%d %B %Y, %H:%M}".lstrip("0")
    return _TEMPLATES.get_template(template).render(
        contents=contents, band=_glass(48), panes=_window(), version=version("vitrail"), made=made, **context
    )


def _glass(count: int) -> list[dict[str, Any]]:
    """Shades of `count` panes: one accent in many strengths, a few in amber and ruby; the same on every page."""
    shades = [0.9, 0.45, 0.7, 0.3, 0.8, 0.55, 1.0, 0.38, 0.62, 0.85, 0.5]
    colours = {5: "#d8a23a", 13: "var(--wrong)", 18: "#d8a23a"}
    return [{"fill": colours.get(i % 23, "var(--accent)"), "opacity": shades[(i * 7) % len(shades)]} for i in range(count)]


def _window() -> list[dict[str, Any]]:
    return [{"x": 3 + 13.5 * (i % 4), "y": 3 + 13 * (i // 4), **shade} for i, shade in enumerate(_glass(24))]
