"""`vitrail data check`: what is wrong with a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vitrail.cli.parse import parse
from vitrail.config import DataConfig

EXAMPLES = """\
vitrail data check photos/
vitrail data check table.parquet --image-column file --json > findings.json"""


@dataclass(frozen=True)
class Arguments:
    """Find unreadable pictures or videos, copies (also across splits), contradicting labels, imbalance and odd sizes.

    The exit code is 1 when something is unreadable, leaks from one split to another, or has two labels.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set, or an embedded set: digits, emoji, motion."""
    limit: int = 20  # rows per table
    json: bool = False  # print everything as JSON
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> int:
    """Check and print; 1 when there is something to mend."""
    arguments = parse(Arguments, words, prog="vitrail data check", examples=EXAMPLES)
    from vitrail.cli import show
    from vitrail.data import open_data
    from vitrail.data.check import check_data

    findings = check_data(open_data(arguments.data, arguments.data_config))
    if arguments.json:
        show.as_json(findings.to_dict())
    else:
        show.tables(findings.tables(arguments.limit))
        show.notes(findings.notes)
        print("nothing to mend" if findings.ok else "worth mending: see above")
    return int(not findings.ok)
