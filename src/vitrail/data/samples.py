"""Labelled pictures or videos as one map-style dataset over an index, and what happens to files that cannot be read."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from vitrail.config import ConfigError
from vitrail.data.footage import media_size
from vitrail.data.stores import Store, text_array

BadPolicy = Literal["skip", "refuse"]


class DataError(ConfigError):
    """Data that cannot be used as asked; the message says what was found, where, and what was expected."""


class BadFiles:
    """The unreadable pictures of a data set: counted and named, once each.

    Policy "skip": training takes the next readable sample of the data set's order in its place, so that batches keep
    their size and the order stays a pure function of seed and epoch; evaluation leaves it out. Policy "refuse":
    the first one raises DataError.
    """

    def __init__(self, policy: BadPolicy = "skip", noun: str = "picture") -> None:
        self.policy, self.noun = policy, noun
        self._reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        """Record one unreadable picture. Raises DataError under the policy "refuse"."""
        if self.policy == "refuse":
            raise DataError(f"{name}: {reason} (set bad_files to skip to leave such {self.noun}s out)")
        self._reasons.setdefault(name, reason)

    def __len__(self) -> int:
        return len(self._reasons)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(name, reason) of each, sorted by name."""
        return iter(sorted(self._reasons.items()))

    def summary(self, limit: int = 5) -> str:
        """One line: how many, and the first `limit` by name; empty when there are none."""
        if not self._reasons:
            return ""
        named = "; ".join(f"{name}: {reason}" for name, reason in list(self)[:limit])
        more = f"; and {len(self) - limit} more" if len(self) > limit else ""
        return f"{count(len(self), f'unreadable {self.noun}')} skipped ({named}{more})"


class ImageDataset:
    """Labelled pictures, or videos, in a fixed order.

    targets: int64 (n,), or float32 (n, k) of zeros and ones when `multi_label`. classes: k names. Nothing is decoded
    until a loader asks. Safe to pickle and to use from several processes.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[int] | np.ndarray,
        names: Sequence[str] | pa.Array,
        targets: np.ndarray,
        classes: Sequence[str],
        *,
        multi_label: bool = False,
        bad_files: BadPolicy = "skip",
        max_pixels: int = 178_956_970,
    ) -> None:
        self.store = store
        self.rows = np.asarray(rows, np.int64)
        self.targets = np.asarray(targets, np.float32 if multi_label else np.int64)
        self.classes = tuple(classes)
        self.multi_label = multi_label
        self.max_pixels = max_pixels
        self.bad = BadFiles(bad_files, self.noun)
        self.pixels: dict[Any, Any] = {}  # decoded pictures of a small set, kept by the loaders; never pickled
        self._sizes: dict[int, np.ndarray] = {}
        self._names = names if isinstance(names, pa.Array) else text_array(names)
        if len(self.targets) != len(self.rows):
            raise ValueError(f"{len(self.rows)} samples but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def video(self) -> bool:
        """Whether samples are videos, and `read` gives `Footage`."""
        return self.store.video

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return "video" if self.video else "picture"

    def read(self, index: int) -> Any:
        """The raw sample: encoded bytes, a path, or pixels; `Footage` of a video. Raises OSError or ValueError."""
        return self.store.read(int(self.rows[index]))

    def names(self, index: int) -> str:
        """The sample's name: a path, a member name or a row number."""
        return self._names[int(self.rows[index])].as_py()

    def key(self, index: int) -> bytes:
        """16 bytes that depend on the content only."""
        return self.store.key(int(self.rows[index]))

    def subset(self, places: np.ndarray) -> ImageDataset:
        """The samples at some places, in that order."""
        part = copy.copy(self)
        part.rows, part.targets, part.pixels, part._sizes = self.rows[places], self.targets[places], {}, {}
        return part

    def identity(self) -> str:
        """32 hexadecimal digits that change with the samples, their parts or their order, not with names or labels.

        "" where the content cannot be told: collections from Python. Reads both ends of every file (see `content_key`).
        """
        if self.store.random or not self.store.by_content:
            return ""
        made = hashlib.blake2b(digest_size=16)
        for row in self.rows.tolist():
            made.update(self.store.key(row) + repr(self.store.part(row)).encode())
        return made.hexdigest()

    def class_counts(self) -> np.ndarray:
        """int64 (k,): samples per class."""
        if self.multi_label:
            return self.targets.sum(0).astype(np.int64)
        return np.bincount(self.targets, minlength=len(self.classes))

    def sizes(self, limit: int = 64) -> np.ndarray:
        """int64 (m, 2): height and width of up to `limit` readable pictures, evenly spaced over the set, from headers only.

        Of videos, which take longer to open, an eighth of the limit.
        """
        limit = max(limit // 8, 1) if self.video else limit
        if limit not in self._sizes:
            found = []
            for index in np.unique(np.linspace(0, len(self) - 1, min(limit, len(self))).astype(int)):
                with suppress(OSError, ValueError):  # a loader will name what is unreadable
                    found.append(media_size(self.read(int(index))))
            self._sizes[limit] = np.array(found, np.int64).reshape(-1, 2)
        return self._sizes[limit]

    def keep(self, key: Any, pictures: Any) -> None:
        """Keep decoded pictures under `key` in `pixels`: the last two kinds (one for training, one for evaluation)."""
        while len(self.pixels) > 1:
            del self.pixels[next(iter(self.pixels))]
        self.pixels[key] = pictures

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pixels": {}}


@dataclass(frozen=True)
class Data:
    """A data set, ready for use: its splits (None where there is none), class names, and what was inferred on the way."""

    train: ImageDataset | None
    val: ImageDataset | None
    test: ImageDataset | None
    classes: tuple[str, ...]
    multi_label: bool
    name: str
    notes: tuple[str, ...] = ()

    def splits(self) -> dict[str, ImageDataset]:
        """The splits that exist, by name, each once: validation on the test split is listed as test."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        if self.val is self.test:
            del found["val"]
        return {name: dataset for name, dataset in found.items() if dataset is not None}


def count(number: int, noun: str) -> str:
    """`3 pictures`, `1 picture`, `2 classes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"
