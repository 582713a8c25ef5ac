"""Image folders: one subfolder per class, or train/val/test subfolders that each hold them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.listing import Listing, is_picture_name, label_names
from vitrail.data.samples import DataError, count
from vitrail.data.splits import role_of
from vitrail.data.stores import PathStore

_LEFTOVERS = ("Thumbs.db", "desktop.ini", "__MACOSX")  # of file managers and archives


def read_folder(root: Path, extra_splits: tuple[str, ...] = ()) -> Listing:
    """List `root`/[split/]class/.../picture. The class is the first folder below the root or split.

    Subfolders are splits when one of them is called like a training split (or is named in `extra_splits`) and holds
    folders itself. Files that are no pictures by their ending, and empty classes, are left out and noted. Links are followed.
    Raises DataError when no picture lies in a class folder.
    """
    splits = _split_folders(root, extra_splits)
    names: list[str] = []
    labels: list[tuple[str, ...] | None] = []
    split_of: list[str] = []
    strangers: list[str] = []
    empty: list[str] = []
    for split in splits or [""]:
        for folder in _subfolders(root / split):
            before = len(names)
            for name in _files(root, folder):
                (names if is_picture_name(name) else strangers).append(name)
            label = label_names(folder.name)
            labels += [label] * (len(names) - before)
            split_of += [split] * (len(names) - before)
            if len(names) == before:
                empty.append(folder.relative_to(root).as_posix())
        strangers += [entry.relative_to(root).as_posix() for entry in _visible(root / split) if entry.is_file()]
    if not names:
        raise DataError(_nothing_found(root))
    return Listing(PathStore(root, names), names, labels, split_of, notes=_notes(root, splits, strangers, empty))


def _notes(root: Path, splits: list[str], strangers: list[str], empty: list[str]) -> tuple[str, ...]:
    notes = []
    if splits:
        notes.append(f"split folders: {', '.join(splits)}")
        unused = [folder.name for folder in _subfolders(root) if folder.name not in splits]
        if unused:
            notes.append(f"{count(len(unused), 'folder')} beside them ignored: {_some(unused)}")
    if strangers:
        notes.append(f"{count(len(strangers), 'file')} ignored, in no class folder or no picture by name: {_some(strangers)}")
    if empty:
        notes.append(f"{count(len(empty), 'class folder')} without pictures ignored: {_some(empty)}")
    return tuple(notes)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")


def _unseen(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not _unseen(entry.name))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _split_folders(root: Path, extra: tuple[str, ...]) -> list[str]:
    """The subfolders that are splits, by name; none when the subfolders are classes."""
    found = [folder for folder in _subfolders(root) if role_of(folder.name) or folder.name in extra]
    if not any(role_of(folder.name) == "train" or folder.name in extra for folder in found):
        return []
    nested = [folder.name for folder in found if _subfolders(folder)]
    if not any(role_of(name) == "train" or name in extra for name in nested):
        return []  # a class that happens to be called "train" holds pictures, not folders
    return nested


def _files(root: Path, folder: Path) -> Iterator[str]:
    """Every file below `folder`, sorted, relative to `root`; a link back to a folder already seen is not entered again."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _unseen(name))
        prefix = Path(here).relative_to(root).as_posix()
        yield from (f"{prefix}/{name}" for name in sorted(files) if not _unseen(name))


def _nothing_found(root: Path) -> str:
    direct = [entry for entry in _visible(root) if entry.is_file() and is_picture_name(entry.name)]
    if direct:
        return (
            f"{root}: {count(len(direct), 'picture')} but no class folders; put the pictures of each class into a folder "
            f"named after it ({root.name}/<class>/picture.jpg), or write a table with a column of paths and one of labels"
        )
    what = "is empty" if not any(root.iterdir()) else "holds no pictures"
    return f"{root}: the folder {what}; expected {root.name}/<class>/picture.jpg, a table, tar shards or a dataset folder"
