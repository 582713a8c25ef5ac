from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "python -m benchmarks.tables"
    names = re.findall(r"<!-- ([a-z0-9-]+) -->", text)
    assert set(names) - {"end"} == set(tables.TABLES)


def test_a_failing_peer_and_a_missing_file_are_said(tmp_path: Path) -> None:
    where = {"device": "a CPU", "cores": 2, "threads": 2, "date": "2026-01-01", "commit": "abc", "versions": {"torch": "2.15"}}
    entry = {"ratio": 1.25, "low": 0.9, "high": 1.5, "ours_mib": 10.0, "peer_mib": 20.0}
    cells = {
        "x infer fp32 eager": {
            "peers": {"timm": entry, "other": {"fails": "TypeError: no"}}, "fastest_peer": "timm", "ratio": 1.25, "low": 0.9,
            "high": 1.5, "passes": True, "percent_of_peak": 50.0, "peer_percent_of_peak": 40.0, "measured": where,
        },
        "y infer fp32 eager": {"peers": {"other": {"fails": "TypeError: no"}}, "passes": False, "measured": where},
    }  # fmt: skip
    table = tables.models(cells)
    assert "| `x` | infer | fp32 | eager | timm (other fails) | 1.25 (0.90 to 1.50) | 50 / 40 | 10 / 20 | passes |" in table
    assert "none runs (other: TypeError: no)" in table
    assert "1 of 2 cells pass. Geometric means of the ratios: infer fp32 eager 1.25. Measured on 2026-01-01 at abc" in table
    assert "Not measured yet." in tables.page("<!-- data -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="no table 'nothing'; there are: models-cpu"):
        tables.page("<!-- nothing -->\n<!-- end -->", tmp_path)
