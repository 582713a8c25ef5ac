"""What a user may ask about: paths, folders, patterns, stdin and pictures in memory, one after the other."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vitrail.data.listing import PICTURE_SUFFIXES, is_picture_name
from vitrail.data.stores import Picture, as_picture

Input: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
STDIN = "-"


class Asked(NamedTuple):
    """One picture to answer: its name, and what to decode or why there is nothing."""

    name: str
    picture: Picture | None
    error: str = ""


def expand(inputs: Input | Iterable[Input]) -> Iterator[Asked]:
    """Every picture that `inputs` stand for, in order, found while it is asked for.

    A folder stands for the pictures in it and below, a pattern for the pictures it matches, both sorted by name; "-" for
    the paths on stdin, one a line. Pictures in memory are called #0, #1, ... by their place. A path that leads to nothing
    is answered with an error in its place.
    """
    single = isinstance(inputs, (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor))
    for place, item in enumerate([inputs] if single else inputs):  # type: ignore[list-item, arg-type]
        if isinstance(item, (str, os.PathLike)):
            yield from _paths(os.fspath(item))
        else:
            yield _in_memory(item, f"#{place}")


def _in_memory(item: Any, name: str) -> Asked:
    try:
        return Asked(name, as_picture(item))
    except ValueError as problem:
        return Asked(name, None, str(problem))


def _paths(text: str) -> Iterator[Asked]:
    if text == STDIN:
        for line in sys.stdin:
            if line.rstrip("\r\n"):
                yield from _paths(line.rstrip("\r\n"))
    elif os.path.isdir(text):
        yield from _found(_walk(text), text, f"a folder without pictures (files ending in {_endings()})")
    elif glob.has_magic(text) and not os.path.lexists(text):
        matches = sorted(path for path in glob.iglob(text, recursive=True) if not os.path.isdir(path) and is_picture_name(path))
        yield from _found(iter(matches), text, "the pattern matches no picture")
    elif os.path.exists(text):
        yield Asked(text, text)
    else:
        yield Asked(text, None, "no such file or folder")


def _found(paths: Iterator[str], asked: str, otherwise: str) -> Iterator[Asked]:
    empty = True
    for path in paths:
        empty = False
        yield Asked(path, path)
    if empty:
        yield Asked(asked, None, otherwise)


def _walk(folder: str) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if is_picture_name(name) and not name.startswith("."):
                yield str(Path(here) / name)


def _endings() -> str:
    common = (".jpg", ".png", ".webp")
    return f"{', '.join(common)} and {len(PICTURE_SUFFIXES) - len(common)} more"
