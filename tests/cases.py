"""What the golden cases are: their descriptions, without a tensor."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "oracles"


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """All cases of the independent implementations by id."""
    cases = json.loads((FOLDER / "manifest.json").read_text())["cases"]
    return {case["id"]: case for case in sorted(cases, key=lambda case: case["id"])}


def versions() -> dict[str, str]:
    """The implementations that made the outputs, and their versions."""
    return json.loads((FOLDER / "manifest.json").read_text())["versions"]


@cache
def original(case_id: str) -> dict[str, Any]:
    """A case of the authors' own code."""
    return json.loads((FOLDER / "original" / f"{case_id}.json").read_text())
