"""One door to labelled pictures and videos, wherever they come from: `open_data`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitrail.config import ConfigError, DataConfig, flat, not_found
from vitrail.data.arrow import is_dataset_folder, is_dataset_object, read_dataset, read_dataset_folder
from vitrail.data.embedded import NAMES as EMBEDDED
from vitrail.data.embedded import read_embedded
from vitrail.data.folders import read_folder
from vitrail.data.listing import Listing, concat, with_split
from vitrail.data.objects import read_objects
from vitrail.data.samples import Data, DataError
from vitrail.data.settle import settle
from vitrail.data.shards import expand_shards, read_shards
from vitrail.data.speed import SPEED, read_speed
from vitrail.data.splits import role_in_name
from vitrail.data.tables import SUFFIXES as TABLES
from vitrail.data.tables import read_table
from vitrail.limits import check_limits


def open_data(source: Any, config: DataConfig | None = None, classes: Sequence[str] | None = None) -> Data:
    """Open labelled pictures or videos; nothing is decoded and nothing copied.

    source: an image folder (root/[split/]class/picture), a table (.csv, .tsv, .jsonl, .parquet) or a folder of tables called
    after their splits, tar shards (a folder, a path, or a pattern such as "train-{000..009}.tar"), an Arrow dataset folder,
    "digits", "emoji" or "motion" (embedded); from Python also a list of (picture, label), a map-style torch Dataset of such
    pairs, a `datasets.Dataset`, or a dictionary of those by split. Folders, text tables, tables of paths, shards and lists of
    paths may hold videos instead of pictures; `ImageDataset.video` says which it is.

    Samples come in one canonical order, whatever the source: by split, then class, then the last part of the sample's
    name without its ending, then its whole name, then its place in the source. The same pictures as a folder, a table,
    shards or a packed set are therefore the same samples in the same order with the same classes. Only collections
    handed over from Python keep their own order. Classes are sorted (by number when all are whole numbers) unless the
    source states an order of its own.

    classes: the class names of a model; a data set with others is refused. Raises DataError (a ConfigError, a ValueError)
    for data that cannot be used, ConfigError for settings that do not fit.
    """
    config = config or DataConfig()
    check_limits(flat(config))
    listing, name = _read(source, config)
    if not len(listing.names):
        raise DataError(f"{name}: no samples")
    return settle(listing, config, name, classes)


def _read(source: Any, config: DataConfig) -> tuple[Listing, str]:
    if isinstance(source, str) and source in EMBEDDED:
        return read_embedded(source, config), source
    if config.labels == SPEED and isinstance(source, (str, os.PathLike)) and not config.hold_out:
        return read_speed(Path(source).expanduser()), f"{Path(source).resolve().name}-speed"
    if config.labels or config.hold_out:
        raise ConfigError(
            f"labels and hold_out are choices of the embedded emoji (labels {SPEED}: of a folder of videos), not of {source!r}"
        )
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source), config)
    if isinstance(source, (list, tuple)) and source and all(isinstance(part, (str, os.PathLike)) for part in source):
        paths = expand_shards([os.fspath(part) for part in source])
        return read_shards(paths, config), paths[0].stem
    if is_dataset_object(source):
        return read_dataset(source, config), "dataset"
    if isinstance(source, Mapping):
        parts = [with_split(_read(part, config)[0], str(split)) for split, part in source.items() if part is not None]
        if not parts:
            raise DataError("the dictionary of splits is empty")
        return concat(parts), "dataset"
    return read_objects(source), "dataset" if isinstance(source, (list, tuple)) else type(source).__name__.lower()


def _read_path(text: str, config: DataConfig) -> tuple[Listing, str]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _read_directory(path, config), path.resolve().name
    if text.endswith(".tar") and (path.exists() or any(sign in text for sign in "*?{[")):
        paths = expand_shards(str(path))
        return read_shards(paths, config), paths[0].stem
    if not path.exists():
        raise DataError(not_found(path))
    if path.suffix.lower() in TABLES:
        return read_table(path, config), path.stem
    raise DataError(
        f"{path}: {path.suffix or 'a file without ending'} is not a data source; expected a folder, a table "
        f"({', '.join(TABLES)}), tar shards or one of {', '.join(EMBEDDED)}"
    )


def _read_directory(path: Path, config: DataConfig) -> Listing:
    if is_dataset_folder(path):
        return read_dataset_folder(path, config)
    shards = expand_shards(str(path))
    if shards:
        return read_shards(shards, config)
    tables = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in TABLES)
    if not tables:
        return read_folder(path, config)
    splits = [role_in_name(table.name) for table in tables]
    if all(splits):
        parts = [read_table(table, config) for table in tables]
        return concat(
            [part if any(part.splits) else with_split(part, split) for part, split in zip(parts, splits, strict=True)]
        )
    try:
        listing = read_folder(path, config)
    except DataError:
        if len(tables) == 1:
            return read_table(tables[0], config)
        raise DataError(f"{path}: several tables ({', '.join(table.name for table in tables)}); name the one to open") from None
    ignored = f"read as class folders; tables ignored: {', '.join(table.name for table in tables)}"
    return replace(listing, notes=(*listing.notes, ignored))
