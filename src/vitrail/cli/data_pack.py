"""`vitrail data pack`: a copy of a data set that opens at once and reads faster."""

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
vitrail train packed/ --image-size 224
vitrail data pack clips/ packed/ --size 256           videos: every frame decoded and kept as a JPEG"""


@dataclass(frozen=True)
class Arguments:
    """Write one Arrow data set of smaller pictures or decoded videos, with the same splits, order and names.

    `vitrail train` reads it like the original, and so does `datasets.load_from_disk`.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set, or an embedded set: digits, emoji, motion."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write; it must not exist yet."""
    size: int | None = None  # larger pictures and frames are resized to this shorter side; unset keeps their size
    quality: int = 95  # of the JPEGs that are written, 1..100
    exact: bool = False  # of videos: keep the pixels of frames uncompressed instead of JPEGs
    channels: int = 3  # 1 = grey, 3 = colour
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> None:
    """Pack, and say what was written and left out."""
    arguments = parse(Arguments, words, prog="vitrail data pack", examples=EXAMPLES)
    from vitrail.data import open_data
    from vitrail.data.pack import pack_data
    from vitrail.data.samples import count

    data = open_data(arguments.data, arguments.data_config)
    chosen = {name: getattr(arguments, name) for name in ("size", "quality", "exact", "channels")}
    done = pack_data(data, arguments.out, **chosen)
    for name, reason in done.left_out:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    before, after = (size / 2**20 for size in (done.size_before, done.size_after))
    kept = f" ({done.kept:,} as they were)" if done.noun == "picture" else ""
    print(f"{done.path}: {count(done.samples, done.noun)}{kept}, {before:,.1f} MiB became {after:,.1f} MiB")
