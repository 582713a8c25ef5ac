"""What a source holds, before splits and classes are settled; every kind of source is read into one `Listing`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitrail.data.samples import DataError, count
from vitrail.data.stores import ConcatStore, Store

PICTURE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".qoi", ".npy",
})  # fmt: skip
LABEL_SEPARATOR = "|"


@dataclass(frozen=True)
class Listing:
    """Rows of a source, all sequences of one length.

    labels: class names of each row, a tuple (one name, or several with `multi_label`); None where the source gives none.
    splits: the name of the row's split, "" where the source does not say. classes: an order that the source itself
    states. keys: content keys that the source carries. broken: row -> reason, of rows that are known to be unreadable.
    ordered: the order of rows is the user's own and is kept.
    """

    store: Store
    names: Sequence[str]
    labels: Sequence[tuple[str, ...] | None]
    splits: Sequence[str]
    multi_label: bool = False
    classes: tuple[str, ...] | None = None
    keys: Sequence[bytes] | None = None
    broken: dict[int, str] = field(default_factory=dict)
    ordered: bool = False
    notes: tuple[str, ...] = ()


def concat(listings: Sequence[Listing]) -> Listing:
    """One listing of several, in order. Raises DataError when they disagree about the classes they state."""
    if len(listings) == 1:
        return listings[0]
    stated = {listing.classes for listing in listings}
    if len(stated) > 1:
        raise DataError(f"the parts of this source state different classes: {' / '.join(str(names) for names in stated)}")
    broken: dict[int, str] = {}
    start = 0
    for listing in listings:
        broken.update({start + row: reason for row, reason in listing.broken.items()})
        start += len(listing.names)
    return Listing(
        store=_joined_stores(listings),
        names=[name for listing in listings for name in listing.names],
        labels=[label for listing in listings for label in listing.labels],
        splits=[split for listing in listings for split in listing.splits],
        multi_label=any(listing.multi_label for listing in listings),
        classes=listings[0].classes,
        keys=_joined_keys(listings),
        broken=broken,
        ordered=any(listing.ordered for listing in listings),
        notes=tuple(dict.fromkeys(note for listing in listings for note in listing.notes)),
    )


def _joined_stores(listings: Sequence[Listing]) -> Store:
    try:
        return ConcatStore([listing.store for listing in listings])
    except ValueError as problem:
        raise DataError(str(problem)) from None


def _joined_keys(listings: Sequence[Listing]) -> Sequence[bytes] | None:
    if any(listing.keys is None for listing in listings):
        return None
    return [key for listing in listings for key in listing.keys or ()]


def with_split(listing: Listing, split: str) -> Listing:
    """The listing with every row in `split`."""
    return replace(listing, splits=[split] * len(listing.names))


def label_names(value: Any, classes: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """The class names in one label: text (`a|b` means two), a number, or a list of either; None when it is missing.

    Surrounding spaces never count. classes: names that whole numbers stand for. Raises DataError for a label that is
    neither text nor a whole number.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple, set)):
        return tuple(dict.fromkeys(name for item in value for name in label_names(item, classes) or ()))
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(LABEL_SEPARATOR)]
        return tuple(dict.fromkeys(part for part in parts if part)) or None
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, float) and value != value:  # how data frames store a missing number
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"label {value!r}: expected text, a whole number or a list of them") from None
    if number != value:
        raise DataError(f"label {value!r}: expected a class, got a fraction (regression is not supported)")
    if classes is None:
        return (str(number),)
    if number == -1:  # the usual mark of an unlabelled row
        return None
    if not 0 <= number < len(classes):
        raise DataError(f"label {number}: there are {count(len(classes), 'class')}, numbered from 0")
    return (classes[number],)


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in their canonical order: by number when all are whole numbers, else by text."""
    unique = sorted(set(names))
    if all(re.fullmatch(r"-?\d+", name) for name in unique):
        unique.sort(key=int)
    return tuple(unique)


def is_picture_name(name: str) -> bool:
    """Whether the name ends like that of a picture."""
    return "." in name and "." + name.rsplit(".", 1)[1].lower() in PICTURE_SUFFIXES
