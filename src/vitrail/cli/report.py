"""`vitrail report`: the report page of a run, written again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail report runs/photos-vit_tiny_patch16_224"""


@dataclass(frozen=True)
class Arguments:
    """Write report.html of a run: curves, confusion, errors as pictures, attention, calibration, environment."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run directory."""


def run(words: Sequence[str]) -> None:
    """Write the page and name it."""
    arguments = parse(Arguments, words, prog="vitrail report", examples=EXAMPLES)
    from vitrail.inspection.report import write_report

    print(write_report(arguments.run))
