"""What papers and model zoos print about sizes is ours, rounded, or differs for a stated reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import published
from tests.models.counting import measured

from vitrail.models import MODELS

ROWS = published.printed()
PAGE = Path(__file__).parents[2] / "docs" / "published.md"


def test_parameters_of_every_variant(run_python) -> None:
    """Multiply-adds of all of them take a minute: python -m tests.results counts them, the tests of the families some."""
    found = measured(run_python, dict.fromkeys({row.model for row in ROWS}), flops=False)
    reasons = {d.reason for row in ROWS for d in published.differences(row, found[row.model][0], None)}
    assert {"cut off, not rounded", "counted without the head of 1000 classes"} <= reasons


def test_a_difference_without_a_reason_is_an_error() -> None:
    row = next(row for row in ROWS if row.model == "vit_base_patch16_224" and row.source == "torchvision")
    assert [*published.differences(row, 86_567_656, 35_127_656_448)] == []
    with pytest.raises(KeyError, match=r"torchvision prints gmacs of vit_base_patch16_224 \+1.0"):
        [*published.differences(row, 86_567_656, 35_500_000_000)]
    assert published.last_digit("59e1") == 10
    assert published.last_digit("4.51") == pytest.approx(0.01)


def test_the_page_has_every_figure() -> None:
    lines = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "as printed" not in line
    ]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [row.model for row in ROWS]
    assert {row.model for row in ROWS} <= set(MODELS)
    for line, row in zip(lines, ROWS, strict=True):  # a cost wherever one is printed, never 0
        ours = line.split("|")[5].strip()
        assert float(ours.replace(",", "")) > 0 if row.gmacs else not ours, line
