"""Pictures inside a Parquet file: in memory when they fit, else one row group at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from vitrail.data.stores import ColumnStore, Picture, Store

MEMORY_LIMIT = 1 << 30  # bytes of pictures held in memory; Parquet is compressed by pages, so a lone row cannot be read
GROUP_LIMIT = 256 << 20  # bytes of row groups kept by each process above that


class ParquetStore(Store):
    """The picture column of one Parquet file: bytes, or structs {bytes, path}.

    Up to `MEMORY_LIMIT` the column is read whole at its first use; above, the row groups used last are kept, and reading in
    random order pays for a group each time (see `notes`).
    """

    def __init__(self, path: str | Path, column: str, memory_limit: int | None = None) -> None:
        self.path, self.name = str(path), column
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        self.starts = np.cumsum([0] + [group.num_rows for group in groups]).tolist()
        chunks = [[group.column(at) for at in range(group.num_columns)] for group in groups]
        self.sizes = [
            sum(c.total_uncompressed_size for c in part if c.path_in_schema.split(".")[0] == column) for part in chunks
        ]
        self.in_memory = sum(self.sizes) <= (MEMORY_LIMIT if memory_limit is None else memory_limit)
        self._groups: OrderedDict[int, ColumnStore] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about speed."""
        if self.in_memory:
            return ()
        rows = max(stop - start for start, stop in pairwise(self.starts))
        return (
            f"{Path(self.path).name}: {sum(self.sizes) / 2**30:.1f} GiB of pictures in row groups of up to {rows:,}; "
            "reading them in random order is slow, packing the data set once makes it fast",
        )

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, memory_map=True)

    @cached_property
    def _whole(self) -> ColumnStore:
        return self._column(list(range(len(self.sizes))))

    def _column(self, groups: list[int]) -> ColumnStore:
        # Threads of Arrow's own pool do not survive a fork into a loader process.
        table = self._file.read_row_groups(groups, columns=[self.name], use_threads=False)
        return ColumnStore(table.column(0), Path(self.path).parent)

    def inner_paths(self) -> list[str | None]:
        """The paths that structs keep beside the bytes, read without the bytes."""
        table = self._file.read(columns=[f"{self.name}.path"], use_threads=False)
        return [path for chunk in table.column(0).chunks for path in chunk.field("path").to_pylist()]

    def read(self, row: int) -> Picture:
        """Encoded bytes, or a path where the row holds only that."""
        with self._lock:
            if self.in_memory:
                return self._whole.read(row)
            group = bisect_right(self.starts, row) - 1
            if group not in self._groups:
                self._groups[group] = self._column([group])
                # Two at least: threads that read one after the other cross from group to group at different times.
                while len(self._groups) > 2 and sum(self.sizes[kept] for kept in self._groups) > GROUP_LIMIT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group].read(row - self.starts[group])

    def __getstate__(self) -> dict[str, Any]:
        lean = {key: value for key, value in self.__dict__.items() if key not in ("_file", "_whole", "_lock")}
        return {**lean, "_groups": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
