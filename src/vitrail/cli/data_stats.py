"""`vitrail data stats`: what a data set looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vitrail.cli.parse import parse
from vitrail.config import DataConfig

EXAMPLES = """\
vitrail data stats photos/
vitrail data stats digits --channels 1"""


@dataclass(frozen=True)
class Arguments:
    """Count classes, sizes, formats, lengths and rates, and measure mean and std per channel, as --mean and --std take them."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set, or an embedded set: digits, emoji, motion."""
    channels: int = 3  # to decode to; 1 measures grey values
    limit: int = 20  # rows per table
    json: bool = False  # print everything as JSON
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> None:
    """Measure and print."""
    arguments = parse(Arguments, words, prog="vitrail data stats", examples=EXAMPLES)
    from vitrail.cli import show
    from vitrail.data import open_data
    from vitrail.data.stats import data_stats

    data = open_data(arguments.data, arguments.data_config)
    found = data_stats(data, channels=arguments.channels)
    if arguments.json:
        show.as_json(found.to_dict())
        return
    show.tables(found.tables(arguments.limit))
    show.notes(data.notes)
