"""Folders of pictures or videos: one subfolder per class, or train/val/test subfolders that each hold them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.config import DataConfig
from vitrail.data.listing import Listing, is_picture_name, label_names
from vitrail.data.samples import DataError, count
from vitrail.data.splits import role_of
from vitrail.data.stores import FootageStore, FrameFolderStore, PathStore, Store
from vitrail.data.video import is_video_name

_LEFTOVERS = ("Thumbs.db", "desktop.ini", "__MACOSX")  # of file managers and archives


def read_folder(root: Path, config: DataConfig) -> Listing:
    """List `root`/[split/]class/.../picture. The class is the first folder below the root or split.

    Subfolders are splits when one of them is called like a training split (or is named in the settings) and holds folders
    itself. Samples are pictures, or videos where there is no picture, or what `media` says: with "frames" every folder below
    a class that holds pictures is one clip. Other files, and empty classes, are left out and noted. Links are followed.
    With `unlabelled`, pictures and videos that lie in no class folder are samples without a label.
    Raises DataError when no sample lies in a class folder.
    """
    splits = _split_folders(root, tuple(name for name in (config.train_split, config.val_split) if name), config.unlabelled)
    found = [
        (split, folder, list(files_below(root, folder))) for split in splits or [""] for folder in _subfolders(root / split)
    ]
    listed = [name for _, _, files in found for name in files]
    if config.unlabelled:
        listed += [entry.name for split in splits or [""] for entry in _visible(root / split)]
    media = config.media if config.media != "auto" else _media(listed)
    is_sample = is_video_name if media == "videos" else is_picture_name
    names: list[str] = []
    labels: list[tuple[str, ...] | None] = []
    split_of: list[str] = []
    strangers: list[str] = []
    empty: list[str] = []
    for split in splits or [""]:
        for folder, files in ((folder, files) for of, folder, files in found if of == split):
            before = len(names)
            strangers += [name for name in files if not is_sample(name)]
            fine = [name for name in files if is_sample(name)]
            names += dict.fromkeys(name.rpartition("/")[0] for name in fine) if media == "frames" else fine
            label = label_names(folder.name)
            labels += [label] * (len(names) - before)
            split_of += [split] * (len(names) - before)
            if len(names) == before:
                empty.append(folder.relative_to(root).as_posix())
        loose = [entry.relative_to(root).as_posix() for entry in _visible(root / split) if entry.is_file()]
        if config.unlabelled and media != "frames":
            without = [name for name in loose if is_sample(name)]
            loose = [name for name in loose if not is_sample(name)]
            names, labels, split_of = names + without, labels + [None] * len(without), split_of + [split] * len(without)
        strangers += loose
    if not names:
        raise DataError(_nothing_found(root, config.media))
    store: Store = PathStore(root, names)
    if media == "videos":
        store = FootageStore(store)
    elif media == "frames":
        store = FrameFolderStore(root, names, config.frame_rate, is_picture_name)
    return Listing(store, names, labels, split_of, notes=_notes(root, splits, strangers, empty, media))


def _media(files: list[str]) -> str:
    return "videos" if any(map(is_video_name, files)) and not any(map(is_picture_name, files)) else "pictures"


def _notes(root: Path, splits: list[str], strangers: list[str], empty: list[str], media: str) -> tuple[str, ...]:
    notes = ["every folder of pictures is a clip"] if media == "frames" else []
    what = "video" if media == "videos" else "picture"
    if splits:
        notes.append(f"split folders: {', '.join(splits)}")
        unused = [folder.name for folder in _subfolders(root) if folder.name not in splits]
        if unused:
            notes.append(f"{count(len(unused), 'folder')} beside them ignored: {_some(unused)}")
    if strangers:
        notes.append(f"{count(len(strangers), 'file')} ignored, in no class folder or no {what} by name: {_some(strangers)}")
    if media == "pictures" and any(map(is_video_name, strangers)):
        notes.append("pictures and videos lie side by side: reading the pictures; media videos reads the others")
    if empty:
        notes.append(f"{count(len(empty), 'class folder')} without {what}s ignored: {_some(empty)}")
    return tuple(notes)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")


def _unseen(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not _unseen(entry.name))


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _split_folders(root: Path, extra: tuple[str, ...], unlabelled: bool = False) -> list[str]:
    """The subfolders that are splits, by name; none when the subfolders are classes."""
    found = [folder for folder in _subfolders(root) if role_of(folder.name) or folder.name in extra]
    if not any(role_of(folder.name) == "train" or folder.name in extra for folder in found):
        return []
    if unlabelled and len(found) == len(_subfolders(root)):  # they may hold pictures directly
        return [folder.name for folder in found]
    nested = [folder.name for folder in found if _subfolders(folder)]
    if not any(role_of(name) == "train" or name in extra for name in nested):
        return []  # a class that happens to be called "train" holds pictures, not folders
    return nested


def files_below(root: Path, folder: Path) -> Iterator[str]:
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


def _nothing_found(root: Path, media: str) -> str:
    direct = [entry.name for entry in _visible(root) if entry.is_file()]
    for what, is_sample in (("picture", is_picture_name), ("video", is_video_name)):
        if number := sum(map(is_sample, direct)):
            return (
                f"{root}: {count(number, what)} but no class folders; put the {what}s of each class into a folder "
                f"named after it ({root.name}/<class>/), or write a table with a column of paths and one of labels"
            )
    kinds = {"pictures": "pictures", "videos": "videos", "frames": "folders of pictures"}
    what = "is empty" if not any(root.iterdir()) else f"holds no {kinds.get(media, 'pictures and no videos')}"
    return f"{root}: the folder {what}; expected {root.name}/<class>/picture.jpg, a table, tar shards or a dataset folder"
