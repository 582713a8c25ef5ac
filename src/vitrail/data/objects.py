"""Collections handed over from Python: lists of (picture, label) and map-style torch Datasets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from vitrail.data.listing import Listing, label_names
from vitrail.data.samples import DataError
from vitrail.data.stores import FootageStore, ObjectStore, PathStore, Store
from vitrail.data.video import is_video_name


def read_objects(source: Any) -> Listing:
    """List a collection that has a length and yields (picture, label) by number; its order is kept.

    picture: a path, encoded bytes, a PIL image, an array (h, w[, c]) or a tensor (c, h, w), uint8 or float in 0..1; or all of
    them are paths of videos.
    label: text, a whole number, a list of those, or for several labels a float or bool vector of zeros and ones.
    Labels are taken from the collection's `targets` or `labels`, and class names from `classes`, where it has them; else
    every item is loaded once. Raises DataError for other kinds.
    """
    if isinstance(source, IterableDataset) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise DataError(f"{type(source).__name__}: expected a path, a list of (picture, label) or a map-style data set")
    if not len(source):
        raise DataError(f"{type(source).__name__}: no samples")
    classes = _find_classes(source)
    values, notes = _find_labels(source), []
    paths: list[str | None] = []
    if values is None:
        values, paths = _load_labels(source)
        if not isinstance(source, (list, tuple)):
            notes.append(f"labels: every item of {type(source).__name__} was loaded once to learn its label")
    several = any(_is_vector(value) or isinstance(value, (list, tuple)) for value in values)
    labels = [_label(value, classes) for value in values]
    names = [path for path in paths if path is not None]
    store: Store = PathStore("", names) if len(names) == len(source) else ObjectStore(source)
    if isinstance(store, PathStore) and any(map(is_video_name, names)):
        if not all(map(is_video_name, names)):
            raise DataError("some paths of the list are videos, others are not; hand over a list of each")
        store = FootageStore(store)
    if isinstance(store, ObjectStore):
        names = [f"{row:08d}" for row in range(len(source))]
    splits = [""] * len(names)
    return Listing(store, names, labels, splits, several, classes, ordered=True, notes=tuple(notes))


def _find_classes(source: Any) -> tuple[str, ...] | None:
    if isinstance(source, Subset):
        return _find_classes(source.dataset)
    if isinstance(source, ConcatDataset):
        return _find_classes(source.datasets[0])
    stated = getattr(source, "classes", None)
    if isinstance(stated, (list, tuple)) and all(isinstance(name, str) for name in stated):
        return tuple(stated) or None
    return None


def _find_labels(source: Any) -> Sequence[Any] | None:
    """The labels that the collection keeps as an attribute, without loading any item."""
    if isinstance(source, Subset):
        inner = _find_labels(source.dataset)
        return None if inner is None else [inner[at] for at in source.indices]
    if isinstance(source, ConcatDataset):
        parts = [_find_labels(part) for part in source.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]
    for attribute in ("targets", "labels"):
        values = getattr(source, attribute, None)
        if isinstance(values, (list, tuple, np.ndarray, torch.Tensor)) and len(values) == len(source):
            return values if isinstance(values, (list, tuple)) else list(values)
    return None


def _load_labels(source: Any) -> tuple[list[Any], list[str | None]]:
    """The label of every item, and its path where the picture is one."""
    labels: list[Any] = []
    paths: list[str | None] = []
    for row in range(len(source)):
        item = source[row]
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise DataError(f"item {row} of {type(source).__name__}: expected (picture, label), got {type(item).__name__}")
        paths.append(os.fspath(item[0]) if isinstance(item[0], (str, os.PathLike)) else None)
        labels.append(item[1])
    return labels, paths


def _is_vector(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 1


def _label(value: Any, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if not _is_vector(value):
        return label_names(value, classes)
    vector = np.asarray(value)
    if vector.dtype.kind not in "fb":
        return label_names(vector.tolist(), classes)
    if not np.isin(vector, (0, 1)).all():
        raise DataError(f"label {vector.tolist()}: a vector of several labels holds zeros and ones only")
    return label_names(np.flatnonzero(vector).tolist(), classes)
