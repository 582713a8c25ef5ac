"""`vitrail data pack`: a copy of a data set that opens at once and trains faster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from vitrail.cli.parse import parse
from vitrail.config import DataConfig

EXAMPLES = """\
vitrail data pack photos/ packed/ --size 256          shorter side at most 256 pixels
vitrail train packed/ --image-size 224"""


@dataclass(frozen=True)
class Arguments:
    """Write one Arrow data set of pre-resized pictures, with the same splits, order and names.

    `vitrail train` reads it like the original, and so does `datasets.load_from_disk`.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set, or an embedded set: digits, emoji."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write; it must not exist yet."""
    size: int | None = None  # larger pictures are resized to this shorter side; unset keeps every picture as it is
    quality: int = 95  # of the JPEGs that are written, 1..100
    channels: int = 3  # 1 = grey, 3 = colour
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> None:
    """Pack, and say what was written and left out."""
    arguments = parse(Arguments, words, prog="vitrail data pack", examples=EXAMPLES)
    from vitrail.data import open_data
    from vitrail.data.pack import pack_data

    data = open_data(arguments.data, arguments.data_config)
    done = pack_data(data, arguments.out, size=arguments.size, quality=arguments.quality, channels=arguments.channels)
    for name, reason in done.left_out:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    before, after = (size / 2**20 for size in (done.size_before, done.size_after))
    print(f"{done.path}: {done.pictures:,} pictures ({done.kept:,} as they were), {before:,.1f} MiB became {after:,.1f} MiB")
