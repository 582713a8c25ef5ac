"""What a user may ask about: paths, folders, patterns, stdin, pictures and videos in memory, one after the other."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vitrail.config import DataConfig
from vitrail.data.embedded import BIKES, FILM
from vitrail.data.footage import Footage, as_footage
from vitrail.data.listing import PICTURE_SUFFIXES, is_picture_name
from vitrail.data.live import Stream, is_stream
from vitrail.data.stores import FrameFolderStore, Picture, as_picture
from vitrail.data.video import VIDEO_SUFFIXES, is_video_name

Input: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
STDIN = "-"


class Kind(NamedTuple):
    """What is looked for in folders and patterns."""

    noun: str
    named: Callable[[str], bool]
    endings: frozenset[str]
    common: tuple[str, ...]


PICTURES = Kind("picture", is_picture_name, PICTURE_SUFFIXES, (".jpg", ".png", ".webp"))
VIDEOS = Kind("video", is_video_name, VIDEO_SUFFIXES, (".mp4", ".mkv", ".webm"))


class Asked(NamedTuple):
    """One picture or video to answer: its name, and what to decode or why there is nothing."""

    name: str
    picture: Picture | Footage | Stream | None
    error: str = ""


def expand(inputs: Input | Iterable[Input], videos: bool = False) -> Iterator[Asked]:
    """Every picture (or video) that `inputs` stand for, in order, found while it is asked for.

    A folder stands for the pictures in it and below, a pattern for the pictures it matches, both sorted by name; "-" for
    the paths on stdin, one a line (or between zero bytes); an address or a pipe for a stream. Where videos are asked for and a
    folder holds pictures only, each folder of them is a clip of 25 frames a second. Pictures in memory are called
    #0, #1, ... by their place; "bikes" is the embedded film. A path that leads to nothing is answered with an error in its
    place.
    """
    for asked in _expand(inputs, VIDEOS if videos else PICTURES):
        path = asked.picture
        yield asked._replace(picture=Footage(path)) if videos and isinstance(path, str) else asked


def _expand(inputs: Input | Iterable[Input], kind: Kind) -> Iterator[Asked]:
    single = isinstance(inputs, (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor))
    for place, item in enumerate([inputs] if single else inputs):  # type: ignore[list-item, arg-type]
        if isinstance(item, (str, os.PathLike)):
            yield from _paths(os.fspath(item), kind)
        else:
            yield _in_memory(item, f"#{place}", kind)


def _in_memory(item: Any, name: str, kind: Kind) -> Asked:
    try:
        return Asked(name, as_footage(item) if kind is VIDEOS else as_picture(item))
    except ValueError as problem:
        return Asked(name, None, str(problem))


def _paths(text: str, kind: Kind) -> Iterator[Asked]:
    if text == STDIN:
        for path in filter(None, _names(sys.stdin)):
            yield from _paths(path, kind)
    elif is_stream(text):
        stream = Stream(text) if kind is VIDEOS else None
        yield Asked(text, stream, "" if stream else "a stream is a video; this model takes pictures")
    elif os.path.isdir(text) and kind is VIDEOS and not any(_walk(text, VIDEOS)) and any(_walk(text, PICTURES)):
        yield from _frame_folders(text)
    elif os.path.isdir(text):
        yield from _found(_walk(text, kind), text, f"a folder without {kind.noun}s (files ending in {_endings(kind)})")
    elif glob.has_magic(text) and not os.path.lexists(text):
        matches = sorted(path for path in glob.iglob(text, recursive=True) if not os.path.isdir(path) and kind.named(path))
        yield from _found(iter(matches), text, f"the pattern matches no {kind.noun}")
    elif os.path.exists(text):
        yield Asked(text, text)
    elif text == FILM and kind is VIDEOS:
        yield Asked(str(BIKES), str(BIKES))
    else:
        camera = kind is VIDEOS and (text.isdecimal() or text.lower() in ("webcam", "camera"))
        told = " (a camera is asked for by its device file, as in /dev/video0)" if camera else ""
        yield Asked(text, None, f"no such file or folder{told}")


def _names(lines: Iterable[str]) -> Iterator[str]:
    """Names, one a line; or between zero bytes once one of these shows, and then a name may hold line ends.

    Until it is clear which of the two, a name that leads nowhere waits: it may go on in the next line.
    """
    separator, waiting = "", ""
    for line in lines:
        if "\0" in line:
            separator = "\0"
        elif not separator and os.path.lexists(line.rstrip("\r\n")):
            separator = "\n"
        waiting += line
        if separator:
            *names, waiting = waiting.split(separator)
            yield from (name.removesuffix("\r") for name in names)
    yield from (name.removesuffix("\r") for name in waiting.split(separator or "\n") if name.strip())


def _found(paths: Iterator[str], asked: str, otherwise: str) -> Iterator[Asked]:
    empty = True
    for path in paths:
        empty = False
        yield Asked(path, path)
    if empty:
        yield Asked(asked, None, otherwise)


def _walk(folder: str, kind: Kind) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if kind.named(name) and not name.startswith("."):
                yield str(Path(here) / name)


def _frame_folders(folder: str) -> Iterator[Asked]:
    """Every folder that holds pictures, as the frames of a clip."""
    for here in dict.fromkeys(str(Path(path).parent) for path in _walk(folder, PICTURES)):
        yield Asked(here, FrameFolderStore(here, ["."], DataConfig.frame_rate, is_picture_name).read(0))


def _endings(kind: Kind) -> str:
    return f"{', '.join(kind.common)} and {len(kind.endings) - len(kind.common)} more"
