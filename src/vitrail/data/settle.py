"""From what a source lists to what a run uses: class numbers, splits, the canonical order and subsets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from vitrail.config import ConfigError, DataConfig
from vitrail.data.listing import Listing, sort_classes
from vitrail.data.samples import Data, DataError, ImageDataset, count
from vitrail.data.splits import choose_splits, content_numbers, cut_validation, nested_subset, reseeded
from vitrail.data.stores import text_array

UNLABELLED = "(no label)"


def settle(listing: Listing, config: DataConfig, name: str, wanted: Sequence[str] | None = None) -> Data:
    """Give a listing its classes, splits, order and subset; what was inferred becomes notes.

    wanted: the class names of a model. Raises DataError for data that cannot be used, ConfigError for settings that do not fit.
    """
    multi_label = config.multi_label or listing.multi_label
    notes = list(listing.notes)
    if config.unlabelled:
        listing = _with_stand_in(listing, notes)
    labelled = np.array([label is not None for label in listing.labels])
    if not labelled.any():
        raise DataError(f"{name}: no sample has a label")
    if not labelled.all():
        first = listing.names[int(np.flatnonzero(~labelled)[0])]
        notes.append(f"{count(int((~labelled).sum()), 'sample')} without a label left out, such as {first}")
    classes = _classes(listing, wanted, multi_label or config.unlabelled, name, notes)
    targets = _targets(listing, classes, multi_label)
    rows_of = choose_splits(listing.splits, config)
    notes += rows_of.notes

    places: dict[str, np.ndarray | None] = {}
    for role in ("train", "val", "test"):
        rows: np.ndarray | None = getattr(rows_of, role)
        places[role] = None if rows is None else _in_order(rows[labelled[rows]], listing, targets)
    if rows_of.cut and places["train"] is not None:
        places["train"], places["val"] = _cut(places["train"], listing, targets, classes, config, notes)
    train = places["train"]
    if config.max_samples and train is not None and len(train):
        numbers = content_numbers(listing.store, train, listing.keys)[:, 1]
        kept = train[nested_subset(reseeded(numbers, config.subset_seed), targets[train], config.max_samples)]
        notes.append(f"training on {len(kept):,} of {len(train):,} samples (max_samples {config.max_samples})")
        places["train"] = kept

    names = text_array(listing.names)

    def dataset(rows: np.ndarray | None) -> ImageDataset | None:
        return _dataset(rows, listing, names, targets, classes, multi_label, config)

    val = dataset(places["val"])
    same = places["val"] is not None and places["test"] is not None and np.array_equal(places["val"], places["test"])
    test = val if same else dataset(places["test"])
    data = Data(dataset(places["train"]), val, test, classes, multi_label, name, ())
    return replace(data, notes=(*notes, *_bad_notes(data), *_count_notes(data)))


def _with_stand_in(listing: Listing, notes: list[str]) -> Listing:
    """The listing with one class of its own for all samples without a label."""
    missing = sum(labels is None for labels in listing.labels)
    if not missing:
        return listing
    if missing < len(listing.labels):
        notes.append(f"{count(missing, 'sample')} of {len(listing.labels):,} without a label, which is not needed")
    classes = None if listing.classes is None else (*listing.classes, UNLABELLED)
    return replace(listing, labels=[(UNLABELLED,) if names is None else names for names in listing.labels], classes=classes)


def _classes(listing: Listing, wanted: Sequence[str] | None, any_number: bool, name: str, notes: list[str]) -> tuple[str, ...]:
    present = {label for labels in listing.labels for label in labels or ()}
    found = listing.classes or sort_classes(present)
    if not found:
        raise DataError(f"{name}: no sample has a label")
    repeated = sorted(label for label, times in Counter(found).items() if times > 1)
    if repeated:
        raise DataError(f"{name}: class names appear twice: {', '.join(repeated)}")
    folded: dict[str, list[str]] = {}
    for label in found:
        folded.setdefault(" ".join(label.casefold().split()), []).append(label)
    for alike in folded.values():
        if len(alike) > 1:
            notes.append(f"classes {' and '.join(map(repr, alike))} differ only in letter case or spaces; they are kept apart")
    if wanted is not None:
        return _matching_classes(tuple(wanted), found, present, name, notes)
    if len(found) < 2 and not any_number:
        raise DataError(
            f"{name}: one class only ({found[0]!r}); a classifier needs at least two. "
            "In a folder, the classes are the folders right below it (or below train/, val/, test/)"
        )
    idle = [label for label in found if label not in present]
    if idle:
        notes.append(f"{count(len(idle), 'class')} without samples: {', '.join(idle[:5])}{', ...' if len(idle) > 5 else ''}")
    return found


def _matching_classes(
    wanted: tuple[str, ...], found: Sequence[str], present: set[str], name: str, notes: list[str]
) -> tuple[str, ...]:
    """The model's classes, when the data has no others; they decide the numbering."""
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"classes: {', '.join(sorted({c for c in wanted if wanted.count(c) > 1}))} given twice")
    others = [label for label in found if label in present and label not in wanted]
    missing = [label for label in wanted if label not in present]
    if others:
        raise DataError(
            f"{name}: its classes are not those of the model. Unknown to the model: {_some(others)}; "
            f"in the model but not in the data: {_some(missing) or 'none'}"
        )
    if missing:
        notes.append(f"{count(len(missing), 'class')} of the model without samples: {_some(missing)}")
    return wanted


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _targets(listing: Listing, classes: Sequence[str], multi_label: bool) -> np.ndarray:
    number = {label: at for at, label in enumerate(classes)}
    if not multi_label:
        return np.array([-1 if label is None else number[label[0]] for label in listing.labels], np.int64)
    targets = np.zeros((len(listing.labels), len(classes)), np.float32)
    for row, labels in enumerate(listing.labels):
        targets[row, [number[label] for label in labels or ()]] = 1
    return targets


def _in_order(rows: np.ndarray, listing: Listing, targets: np.ndarray) -> np.ndarray:
    """Rows in the canonical order (see `open_data`)."""
    if listing.ordered:
        return rows

    def place(row: int) -> tuple[int, str, str]:
        whole = os.path.splitext(listing.names[row].replace("\\", "/"))[0]
        return (int(targets[row]) if targets.ndim == 1 else 0, whole.rsplit("/", 1)[-1], whole)

    return np.array(sorted(rows.tolist(), key=place), np.int64)


def _cut(
    train: np.ndarray, listing: Listing, targets: np.ndarray, classes: Sequence[str], config: DataConfig, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    strata = targets[train] if targets.ndim == 1 else np.zeros(len(train), np.int64)
    held, without = cut_validation(content_numbers(listing.store, train, listing.keys)[:, 0], strata, config.val_fraction)
    notes.append(f"{int(held.sum()):,} of {len(train):,} training samples held out for validation, by content")
    if without and targets.ndim == 1:
        lone = _some([classes[target] for target in without])
        noun = "video" if listing.store.video else "picture"
        notes.append(f"no validation sample of {count(len(without), 'class')} with one {noun}: {lone}")
    return train[~held], train[held] if held.any() else None


def _dataset(
    rows: np.ndarray | None,
    listing: Listing,
    names: pa.Array,
    targets: np.ndarray,
    classes: tuple[str, ...],
    multi_label: bool,
    config: DataConfig,
) -> ImageDataset | None:
    """The samples of `rows` that are not known to be broken; the broken ones are recorded."""
    if rows is None:
        return None
    fine = np.array([row not in listing.broken for row in rows.tolist()], bool)
    made = ImageDataset(
        listing.store, rows[fine], names, targets[rows[fine]], classes,
        multi_label=multi_label, bad_files=config.bad_files, max_pixels=config.max_pixels,
    )  # fmt: skip
    for row in rows[~fine].tolist():
        made.bad.add(listing.names[row], listing.broken[row])
    return made if len(made) or made.bad else None


def _bad_notes(data: Data) -> list[str]:
    return [f"{split}: {dataset.bad.summary()}" for split, dataset in data.splits().items() if dataset.bad]


def _count_notes(data: Data) -> list[str]:
    """Classes that training cannot learn, or can hardly learn."""
    if data.train is None or data.multi_label:
        return []
    counts = data.train.class_counts()
    elsewhere = sum(part.class_counts() for part in data.splits().values()) - counts
    notes = []
    unseen = [label for label, n, others in zip(data.classes, counts, elsewhere, strict=True) if n == 0 and others]
    single = [label for label, n in zip(data.classes, counts, strict=True) if n == 1]
    if unseen:
        notes.append(f"{count(len(unseen), 'class')} without training samples: {_some(unseen)}")
    if single:
        notes.append(f"{count(len(single), 'class')} with a single training {data.train.noun}: {_some(single)}")
    return notes
