"""Tables of pictures or videos: CSV, TSV, JSONL and Parquet, with one column of them and one of labels.

Paths in a table are relative to the table's folder. Absolute paths and paths that lead out of that folder are allowed:
a table is its owner's own statement of where the pictures lie. They are only ever opened as pictures, and noted.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitrail.config import DataConfig, unknown
from vitrail.data.listing import Listing, is_picture_name, label_names
from vitrail.data.parquet import ParquetStore
from vitrail.data.samples import DataError, count
from vitrail.data.stores import KEY_BYTES, FootageStore, FrameFolderStore, PathStore, Store
from vitrail.data.video import is_video_name

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_COLUMNS = (
    "image", "path", "image_path", "file", "file_name", "filename", "filepath", "file_path", "img", "img_path", "picture",
    "video", "video_path", "clip",
)  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classes", "category", "target", "tags")
START_COLUMNS = ("start", "start_time", "start_seconds", "t_start")
END_COLUMNS = ("end", "end_time", "end_seconds", "stop", "t_end")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
NAME_COLUMNS = ("name", *IMAGE_COLUMNS)
KEY_COLUMN = "content_key"  # written by `pack_data`


def read_table(path: Path, config: DataConfig) -> Listing:
    """List the rows of one table. Raises DataError for a missing column, an unreadable table or one without rows."""
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, config)
    columns = _read_json_lines(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _read_delimited(path)
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path}: the table has no rows")
    image = find_column("image", config.image_column, columns, IMAGE_COLUMNS, path)
    paths = ["" if value is None else str(value).strip() for value in columns[image]]
    rest, more = label_columns(columns, len(paths), config, path)
    return _listing_of_paths(path, image, paths, columns, config, rest, more)


def _listing_of_paths(
    path: Path,
    column: str,
    paths: list[str],
    columns: Mapping[str, Sequence[Any]],
    config: DataConfig,
    rest: Mapping[str, Any],
    notes: Sequence[str],
) -> Listing:
    """The rows of a table of paths: files that are missing and parts that cannot be are broken from the start."""
    broken, outside = _missing_files(path, paths)
    store, names, parts = _store(path, paths, columns, config)
    for row, problem in _impossible_parts(store).items():
        broken.setdefault(row, problem)
    noun = "video" if store.video else "picture"
    notes = [f"{path.name}: {noun}s from column {column!r}", *notes]
    if parts:
        notes.append(f"{path.name}: parts of videos, in seconds")
    if outside:
        notes.append(f"{path.name}: {count(outside, noun)} outside the table's folder")
    return Listing(store, names, **rest, broken=broken, notes=tuple(notes))


def _store(
    path: Path, paths: list[str], columns: Mapping[str, Sequence[Any]], config: DataConfig
) -> tuple[Store, list[str], bool]:
    """What the paths of a table lead to, the names of its rows, and whether they are parts of videos."""
    files = PathStore(path.parent, paths)
    if config.media == "frames":
        return FrameFolderStore(path.parent, paths, config.frame_rate, is_picture_name), paths, False
    videos = [is_video_name(name) for name in paths if name]
    if config.media == "pictures" or not (any(videos) or config.media == "videos"):
        return files, paths, False
    if config.media == "auto" and not all(videos):
        raise DataError(f"{path}: some rows are videos, others are not; write a table of each")
    starts, ends = (_seconds(columns, usual, path) for usual in (START_COLUMNS, END_COLUMNS))
    if starts is None and ends is None:
        return FootageStore(files), paths, False
    starts = [0.0 if start != start else start for start in starts or [0.0] * len(paths)]
    ends = ends or [math.nan] * len(paths)
    until = ["" if end != end else f"-{end:g}" for end in ends]
    parts = [f"{name}@{start:g}{end}" for name, start, end in zip(paths, starts, until, strict=True)]
    return FootageStore(files, starts, ends), parts, True


def _impossible_parts(store: Store) -> dict[int, str]:
    """Rows whose part of a video lies before its beginning or ends before it starts; an end that is nan is the video's own."""
    if not isinstance(store, FootageStore):
        return {}
    starts, ends = store.starts, store.ends
    found = {row: f"the part ends at {ends[row]:g} s, but starts at {starts[row]:g} s" for row in _rows(ends <= starts)}
    outside = (starts < 0) | np.isinf(starts)
    return found | {row: f"the part starts at {starts[row]:g} s; expected 0 or more" for row in _rows(outside)}


def _rows(chosen: np.ndarray) -> list[int]:
    return [int(row) for row in np.flatnonzero(chosen)]


def _seconds(columns: Mapping[str, Sequence[Any]], usual: Sequence[str], path: Path) -> list[float] | None:
    """A column of times, nan where a cell is empty; None where there is no such column."""
    found = _matches(columns, usual)
    if not found:
        return None
    try:
        return [float("nan") if value in (None, "") else float(value) for value in columns[found[0]]]
    except (TypeError, ValueError) as problem:
        raise DataError(f"{path}, column {found[0]!r}: expected seconds ({problem})") from None


def label_columns(
    columns: Mapping[str, Sequence[Any]],
    rows: int,
    config: DataConfig,
    path: Path,
    classes: tuple[str, ...] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Labels, splits and what follows from them, as fields of a `Listing`, and notes on what was recognised.

    classes: names that whole numbers in the label column stand for.
    """
    label = label_column(columns, config, path)
    values = columns[label] if label else [None] * rows
    notes = [f"{path.name}: labels from column {label!r}"] if label else []
    labels = [label_names(value, classes) for value in values]
    several = any(isinstance(value, (list, tuple)) for value in values) or any(names and len(names) > 1 for names in labels)
    if several or config.multi_label:  # no label at all is an answer, too
        labels = [() if names is None else names for names in labels]
    splits = [""] * rows
    if config.split_column or _matches(columns, SPLIT_COLUMNS):
        column = find_column("split", config.split_column, columns, SPLIT_COLUMNS, path)
        splits = ["" if value is None else str(value).strip() for value in columns[column]]
        notes.append(f"{path.name}: splits from column {column!r}")
    return {"labels": labels, "splits": splits, "multi_label": several, "classes": classes}, notes


def label_column(columns: Mapping[str, Sequence[Any]], config: DataConfig, path: Path) -> str:
    """The column of labels; "" where there is none and none are needed. Raises DataError when there is none otherwise."""
    if config.unlabelled and not config.label_column and not _matches(columns, LABEL_COLUMNS):
        return ""
    return find_column("label", config.label_column, columns, LABEL_COLUMNS, path)


def find_column(what: str, asked: str, columns: Mapping[str, Sequence[Any]], usual: Sequence[str], path: Path) -> str:
    """The column asked for, or the first of the usual names. Raises DataError when there is none."""
    if asked:
        if asked not in columns:
            raise DataError(f"{path}: {unknown(f'{what} column', asked, columns)}")
        return asked
    found = _matches(columns, usual)
    if found:
        return found[0]
    if what == "image":  # a column of another name, if one alone holds paths of pictures
        looks = [name for name, values in columns.items() if _holds_picture_paths(values)]
        if len(looks) == 1:
            return looks[0]
    raise DataError(
        f"{path}: no {what} column recognised among {', '.join(map(repr, columns))}; "
        f"name it with {what}_column (recognised: {', '.join(usual)})"
    )


def _matches(columns: Mapping[str, Any], usual: Sequence[str]) -> list[str]:
    by_lower = {name.strip().lower(): name for name in reversed(list(columns))}
    return [by_lower[name] for name in usual if name in by_lower]


def _holds_picture_paths(values: Sequence[Any]) -> bool:
    first = [value for value in values[:20] if value]
    return bool(first) and all(
        isinstance(value, str) and (is_picture_name(value.strip()) or is_video_name(value.strip())) for value in first
    )


def _read_delimited(path: Path) -> dict[str, list[Any]]:
    """Columns of text. The delimiter is the one of tab, comma and semicolon that the header line holds most of."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max("\t,;" if path.suffix.lower() == ".tsv" else ",;\t", key=header.count)
            reader = csv.reader(file, delimiter=delimiter)
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the same name ({', '.join(names)})")
            rows = []
            for row in reader:
                if len(row) > len(names):
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields but {len(names)} columns")
                if row:
                    rows.append([field or None for field in row] + [None] * (len(names) - len(row)))
    except (UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path}: not a readable table in UTF-8 ({problem})") from None
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}


def _read_json_lines(path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise DataError(f"{path}, line {number}: not JSON ({problem})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected an object with named fields, got {type(row).__name__}")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path, config: DataConfig) -> Listing:
    """Pictures are paths, bytes, or structs {bytes, path}; class names come from the file's own metadata where it has them."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as problem:
        raise DataError(f"{path}: not a readable Parquet file ({problem})") from None
    image = _image_field(schema, config, path)
    kind = schema.field(image).type
    columns = _light_columns(path, schema, {image, config.label_column, config.split_column})
    rows = pq.read_metadata(path).num_rows
    if not rows:
        raise DataError(f"{path}: the table has no rows")
    label = config.label_column or next(iter(_matches(columns, LABEL_COLUMNS)), "")
    rest, notes = label_columns(columns, rows, config, path, stated_classes(schema, label))
    rest["keys"] = content_keys(columns)
    if not _holds_bytes(kind):
        paths = ["" if value is None else str(value) for value in columns[image]]
        return _listing_of_paths(path, image, paths, columns, config, rest, notes)
    store = ParquetStore(path, image)
    notes = [f"{path.name}: pictures from column {image!r}", *notes, *store.notes]
    inner = store.inner_paths() if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else None
    return Listing(store, row_names(columns, rows, inner), **rest, notes=tuple(notes))


def _image_field(schema: pa.Schema, config: DataConfig, path: Path) -> str:
    encoded = [field.name for field in schema if _holds_bytes(field.type)]
    names: dict[str, Sequence[Any]] = {field.name: () for field in schema}
    if not config.image_column and not _matches(names, IMAGE_COLUMNS) and len(encoded) == 1:
        return encoded[0]
    return find_column("image", config.image_column, names, IMAGE_COLUMNS, path)


def _light_columns(path: Path, schema: pa.Schema, asked: set[str]) -> dict[str, list[Any]]:
    """The columns without bytes; values only of those that are asked for or have a usual name."""
    light = [field.name for field in schema if not _holds_bytes(field.type)]
    usual = {*LABEL_COLUMNS, *SPLIT_COLUMNS, *NAME_COLUMNS, *START_COLUMNS, *END_COLUMNS, KEY_COLUMN}
    wanted = [name for name in light if name in asked or name.strip().lower() in usual]
    table = pq.read_table(path, columns=wanted)
    return {name: table.column(name).to_pylist() if name in wanted else [] for name in light}


def stated_classes(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Class names that the `datasets` library stored in a schema's metadata for column `label`."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        while "names" not in feature:  # a list of class labels nests them
            feature = feature["feature"]
        return tuple(str(name) for name in feature["names"])
    except (KeyError, TypeError, ValueError):
        return None


def row_names(columns: Mapping[str, Sequence[Any]], rows: int, inner: Sequence[str | None] | None = None) -> list[str]:
    """A name for each row: from a column of names, else the paths beside the bytes, else the row's number."""
    column = next(iter(_matches(columns, NAME_COLUMNS)), None)
    found = columns[column] if column else inner if inner is not None else [None] * rows
    return [f"{row:08d}" if name is None or name == "" else str(name) for row, name in enumerate(found)]


def content_keys(columns: Mapping[str, Sequence[Any]]) -> list[bytes] | None:
    """Content keys that a packed set carries; None when there are none, or they are not whole."""
    try:
        keys = [bytes.fromhex(value) for value in columns[KEY_COLUMN]]
    except (KeyError, TypeError, ValueError):
        return None
    return keys if all(len(key) == KEY_BYTES for key in keys) else None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _missing_files(table: Path, paths: Sequence[str]) -> tuple[dict[int, str], int]:
    """Rows whose file does not exist, and how many paths lead out of the table's folder. Each folder is listed once."""
    listed: dict[str, frozenset[str]] = {}
    broken: dict[int, str] = {}
    outside = 0
    folder = table.parent
    root = os.path.join(os.path.abspath(folder), "")
    for row, path in enumerate(paths):
        full = os.path.normpath(os.path.join(root, path))
        outside += not full.startswith(root)
        parent, name = os.path.split(full)
        if parent not in listed:
            try:
                listed[parent] = frozenset(os.listdir(parent))
            except OSError:
                listed[parent] = frozenset()
        if not path:
            broken[row] = "the table's cell is empty"
        elif name not in listed[parent]:
            broken[row] = "file not found"
    if len(broken) == len(paths):
        where = folder.absolute()
        raise DataError(
            f"{table}: none of its {count(len(paths), 'file')} exists; the first is {paths[0]!r}, looked for in {where}"
        )
    return broken, outside
