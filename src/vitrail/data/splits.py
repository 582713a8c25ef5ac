"""Which samples are for training, validation and testing, and subsets of them: decided by content, never by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vitrail.config import ConfigError, DataConfig, unknown
from vitrail.data.samples import count
from vitrail.data.stores import Store

Role = Literal["train", "val", "test"]
ROLES: dict[str, Role] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def role_of(name: str) -> Role | None:
    """What a split of that name is for; None when the name does not say."""
    return ROLES.get(name.strip().lower())


def role_in_name(name: str) -> str:
    """The one word in a file's or folder's name that names a split (`train-00000-of-00002.parquet`), else ""."""
    words = {word for word in re.split(r"[^a-z]+", name.lower()) if role_of(word)}
    return words.pop() if len(words) == 1 else ""


class SplitRows(NamedTuple):
    """Rows of each split; None where there is no such split. `cut`: validation is still to be cut from the training rows."""

    train: np.ndarray | None
    val: np.ndarray | None
    test: np.ndarray | None
    cut: bool
    notes: tuple[str, ...]


def choose_splits(splits: Sequence[str], config: DataConfig) -> SplitRows:
    """Give every row its role from the name of its split ("" where the source names none).

    Training: `train_split`, else the split called train, else everything that is neither validation nor test.
    Validation: `val_split`, else the split called val (valid, validation, dev), else it is cut from the training rows,
    never from the test rows: what is chosen on a split cannot be measured on it. `val_split` may name the training split
    (which asks for the cut) or the test split. Raises ConfigError for unknown names.
    """
    named = np.asarray(splits, object)
    names = sorted(set(splits) - {""})
    roles = {name: role_of(name) for name in names}
    for setting in (config.train_split, config.val_split):
        if setting and setting not in names:
            if not names:
                raise ConfigError(f"split {setting!r}: the source names no splits")
            raise unknown("split", setting, names)

    def rows(role: Role, setting: str = "") -> np.ndarray:
        return np.flatnonzero(np.isin(named, [setting] if setting else [name for name in names if roles[name] == role]))

    notes = []
    train, val, test = rows("train", config.train_split), rows("val", config.val_split), rows("test")
    if not len(train):
        train = np.setdiff1d(np.arange(len(named)), np.concatenate([val, test]))
        others = [name for name in names if roles[name] is None and name != config.val_split]
        if others:
            notes.append(f"no split is called train: training on {', '.join(others)}")
    if len(trained := np.intersect1d(train, test)):
        notes.append(f"{count(len(trained), 'sample')} of the test split are trained on, so they are not tested on")
        test = np.setdiff1d(test, trained)
    if config.val_split and np.array_equal(val, train):
        val = val[:0]
    cut = not len(val)
    if not cut and np.array_equal(val, test):
        notes.append("the test split is used for validation too: a best epoch chosen on it flatters its figures")
    unused = np.setdiff1d(np.arange(len(named)), np.concatenate([train, val, test]))
    if len(unused):
        which = sorted({str(named[row]) or "no split named" for row in unused})
        notes.append(f"{count(len(unused), 'sample')} left out, in no split that is used ({', '.join(which)})")
    found = [part if len(part) else None for part in (train, val, test)]
    return SplitRows(found[0], found[1], found[2], cut and config.val_fraction > 0, tuple(notes))


def content_numbers(store: Store, rows: np.ndarray, keys: Sequence[bytes] | None = None) -> np.ndarray:
    """float64 (n, 2) in [0, 1): two independent numbers per row that depend on its content only.

    keys: content keys by row, where a source carries them (a packed set keeps those of the original files).
    """
    raw = bytearray(16 * len(rows))
    for at in np.argsort(rows, kind="stable"):  # in the order of storage: row groups and shards are read once
        key = keys[rows[at]] if keys is not None else store.key(int(rows[at]))
        raw[16 * at : 16 * at + 16] = key
    return (np.frombuffer(bytes(raw), "<u8").reshape(-1, 2) >> 11) / 2.0**53


def cut_validation(numbers: np.ndarray, targets: np.ndarray, fraction: float) -> tuple[np.ndarray, list[int]]:
    """bool (n,), True for validation, and the classes that got none.

    numbers: (n,) from content. A sample is held out when its number is below `fraction`: of every class about that share,
    exact copies always on the same side, and no sample moves when others are added, removed or renamed. Only where
    this leaves a class of two or more without a sample on one side does the sample nearest to the limit change sides.
    targets: int64 (n,); for multi-label targets pass zeros. Raises ConfigError unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"val_fraction: {fraction} is not in 0 <= fraction < 1")
    held = numbers < fraction
    without = []
    for target in np.unique(targets):
        members = np.flatnonzero(targets == target)
        inside = held[members]
        if not inside.any():
            nearest = members[numbers[members] == numbers[members].min()]
            if len(nearest) < len(members):
                held[nearest] = True
            else:
                without.append(int(target))
        elif inside.all():
            nearest = members[numbers[members] == numbers[members].max()]
            held[nearest] = False
            if len(nearest) == len(members):
                without.append(int(target))
    return held, without


def nested_subset(numbers: np.ndarray, targets: np.ndarray, per_class: int) -> np.ndarray:
    """Positions (sorted) of at most `per_class` samples of each class, those with the lowest numbers.

    A smaller subset is part of every larger one, and names play no role. targets: int64 (n,) or float (n, k); with
    several labels a sample is kept while any of its labels still lacks samples.
    """
    order = np.argsort(numbers, kind="stable")
    if targets.ndim == 1:
        by_class = np.argsort(targets[order], kind="stable")
        sorted_targets = targets[order][by_class]
        rank = np.arange(len(order)) - np.searchsorted(sorted_targets, sorted_targets)
        return np.sort(order[by_class[rank < per_class]])
    seen = np.cumsum(targets[order] > 0, axis=0)
    lacking = ((targets[order] > 0) & (seen <= per_class)).any(1)
    unlabelled = ~(targets[order] > 0).any(1)
    lacking |= unlabelled & (np.cumsum(unlabelled) <= per_class)
    return np.sort(order[lacking])


def reseeded(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Other numbers of the same samples, for another choice of them; seed 0 leaves them as they are.

    numbers: float64 (n,) in [0, 1). The seed is mixed into each one's bits (the finaliser of splitmix64), so that two seeds
    order the samples independently, still by their content only.
    """
    if not seed:
        return numbers
    with np.errstate(over="ignore"):
        bits = (numbers * 2.0**53).astype(np.uint64) + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
