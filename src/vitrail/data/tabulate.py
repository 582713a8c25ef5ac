"""Results about a data set as plain tables, and the progress of working through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.data.decoded import AHEAD, for_each
from vitrail.data.samples import Data, ImageDataset

T = TypeVar("T")


class Table(NamedTuple):
    """Something to print: a title, column headings and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def shortened(rows: Sequence[tuple[str, ...]], limit: int) -> Sequence[tuple[str, ...]]:
    """At most `limit` rows, the last one saying how many more there are."""
    if len(rows) <= limit:
        return rows
    more = f"... and {len(rows) - limit + 1:,} more"
    return [*rows[: limit - 1], (more, *[""] * (len(rows[0]) - 1))]


def each_sample(
    data: Data, work: Callable[[ImageDataset, int], T], what: str, progress: bool
) -> Iterator[tuple[str, int, T | Exception]]:
    """(split, index, what `work` returned, or why the sample is unreadable) for every sample of every split.

    Samples come in the order in which their source stores them; `work` runs in several threads, on few videos at a time, since
    what is made of one may be large. progress: a bar on stderr where that is a terminal.
    """
    splits = data.splits()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(what, total=sum(len(dataset) for dataset in splits.values()))
        for split, dataset in splits.items():
            stored = np.argsort(dataset.rows, kind="stable").tolist()
            results = for_each(partial(work, dataset), stored, ahead=1 if dataset.video else AHEAD)
            for index, result in zip(stored, results, strict=True):
                yield split, index, result
                bar.advance(task)
