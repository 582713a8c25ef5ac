"""Arrow dataset folders, as `datasets.Dataset.save_to_disk` and `pack_data` write them: memory-mapped, never copied."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitrail.config import DataConfig
from vitrail.data.listing import Listing, concat
from vitrail.data.packed import VIDEO_COLUMN, PackedStore, is_packed
from vitrail.data.samples import DataError
from vitrail.data.stores import ColumnStore, Picture, Store
from vitrail.data.tables import (
    IMAGE_COLUMNS,
    KEY_COLUMN,
    content_keys,
    find_column,
    label_column,
    label_columns,
    row_names,
    stated_classes,
)


def is_dataset_folder(path: Path) -> bool:
    """Whether the folder has the layout of a saved dataset, or of a saved dictionary of splits."""
    found = [(path / name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json")]
    return found[0] or (found[1] and found[2])


def is_dataset_object(source: object) -> bool:
    """Whether the object comes from the `datasets` library (asked without importing it)."""
    return type(source).__module__.split(".")[0] == "datasets"


def read_dataset_folder(path: Path, config: DataConfig) -> Listing:
    """List a saved dataset or dictionary of datasets. Raises DataError when the folder cannot be read."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(f"{path}: not a readable dataset folder ({problem})") from None
    return read_dataset(found, config, path)


def read_dataset(found: Any, config: DataConfig, path: Path = Path("dataset")) -> Listing:
    """List a `datasets.Dataset` or `DatasetDict`; splits keep their names. Raises DataError for other kinds."""
    import datasets

    if isinstance(found, datasets.Dataset):
        found = {str(found.split or ""): found}
    elif not isinstance(found, datasets.DatasetDict):
        raise DataError(f"{path}: expected a datasets.Dataset or DatasetDict, got {type(found).__name__}")
    parts = [_read_split(part, config, path, name) for name, part in found.items() if len(part)]
    if not parts:
        raise DataError(f"{path}: the data set has no rows")
    return concat(parts)


def _read_split(found: Any, config: DataConfig, path: Path, split: str) -> Listing:
    import datasets

    heavy = [name for name, feature in found.features.items() if isinstance(feature, datasets.Image)]
    store: PackedStore | DatasetStore
    if is_packed(found.features):
        store, heavy = PackedStore(found), [*heavy, VIDEO_COLUMN]
    else:
        image = config.image_column or (heavy[0] if len(heavy) == 1 else "")
        image = find_column("image", image, dict.fromkeys(found.features, ()), IMAGE_COLUMNS, path)
        store = DatasetStore(found, image, path)
    # In the Arrow format a slice of everything is the memory-mapped table itself; only an index mapping makes it a copy.
    light = [name for name in found.features if name not in heavy]
    table = found.select_columns(light).with_format("arrow")[:] if light else pa.table({})
    columns = {name: table.column(name).to_pylist() for name in light}
    label = label_column(columns, config, path)
    rest, notes = label_columns(columns, len(found), config, path, stated_classes(table.schema, label))
    if not any(rest["splits"]):
        rest["splits"] = [split] * len(found)
    names = row_names(columns, len(found), store.inner_paths() if isinstance(store, DatasetStore) else None)
    return Listing(store, names, **rest, keys=content_keys(columns), notes=tuple(notes))


class DatasetStore(Store):
    """The picture column of a `datasets.Dataset`: encoded bytes or paths."""

    def __init__(self, found: Any, column: str, root: Path) -> None:
        self.found, self.name, self.root = found, column, root
        self.packable = KEY_COLUMN not in found.column_names

    def __len__(self) -> int:
        return len(self.found)

    @cached_property
    def _column(self) -> ColumnStore:
        table = self.found.select_columns([self.name]).with_format("arrow")[:]
        return ColumnStore(table.column(0), self.root)

    def inner_paths(self) -> list[str | None] | None:
        """The paths kept beside the bytes, None where there are none."""
        parts = [chunk.field("path") for chunk in self._column.column.chunks if pa.types.is_struct(chunk.type)]
        return [path for part in parts for path in part.to_pylist()] if parts else None

    def read(self, row: int) -> Picture:
        """Encoded bytes, or a path where the row holds only that."""
        return self._column.read(row)

    def __getstate__(self) -> dict[str, Any]:  # the data set pickles as the names of its files, a table as its contents
        return {key: value for key, value in self.__dict__.items() if key != "_column"}
