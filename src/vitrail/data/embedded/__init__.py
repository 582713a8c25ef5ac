"""The data sets inside the package: `digits` (handwritten, grey, 20x20), `emoji` (drawn by five designers, colour, 32x32) and
`motion` (videos: the emoji moving in eight ways); and the film `BIKES`, a real one to look at.

Sources and licences of the pictures lie beside them.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.config import ConfigError, DataConfig, unknown
from vitrail.data.embedded.motion import cut_out, read_motion
from vitrail.data.listing import Listing
from vitrail.data.stores import TensorStore

NAMES = ("digits", "emoji", "motion")
FILM = "bikes"  # what the film is called where a path of a video is asked for
EMOJI_LABELS = ("category", "glyph")
DIGITS_PER_CLASS, DIGITS_HELD_OUT = 500, 100
_FOLDER = Path(__file__).parent
BIKES = _FOLDER / "bikes" / "bikes.mp4"  # 250 frames of 640x272, 10 s, with cuts


def read_embedded(name: str, config: DataConfig) -> Listing:
    """List an embedded set.

    digits: 5,000 pictures, 500 a class; the last 100 of each class in file order are the test split.
    emoji: 7,150 pictures; `labels` "category" (8 classes, default) or "glyph" (one class per code point that two or more
    designers drew); `hold_out` names the designer whose drawings are the test split.
    motion: 4,800 videos of 16 frames in 8 classes, 800 of them the test split, which shows other drawings.
    Raises ConfigError for settings that the set does not have.
    """
    if name not in NAMES:
        raise unknown("embedded data set", name, NAMES)
    if name == "emoji":
        return _emoji(config)
    for setting, value in (("labels", config.labels), ("hold_out", config.hold_out)):
        if value:
            raise ConfigError(f"{setting}: {value!r} was given, but {name} has no such choice")
    if name == "motion":
        return read_motion(_cut_out_emoji())
    images = _cells(_FOLDER / "digits" / "digits.png", 20, 5000)
    names, labels, splits = [], [], []
    for digit in range(10):
        for number in range(DIGITS_PER_CLASS):
            names.append(f"{digit}/{number:03d}")
            labels.append((str(digit),))
            splits.append("train" if number < DIGITS_PER_CLASS - DIGITS_HELD_OUT else "test")
    return Listing(TensorStore(images), names, labels, splits)


def _emoji(config: DataConfig) -> Listing:
    kind = config.labels or "category"
    if kind not in EMOJI_LABELS:
        raise unknown("kind of emoji labels", kind, EMOJI_LABELS)
    rows = _emoji_rows()
    designers = sorted({row["vendor"] for row in rows})
    if config.hold_out and config.hold_out not in designers:
        raise unknown("emoji designer", config.hold_out, designers)
    images = _emoji_cells()
    drawn_by = defaultdict(set)
    for row in rows:
        drawn_by[row["codepoints"]].add(row["vendor"])
    chosen = [at for at, row in enumerate(rows) if kind == "category" or len(drawn_by[row["codepoints"]]) > 1]
    rows = [rows[at] for at in chosen]
    splits = [""] * len(rows)
    if config.hold_out:
        splits = ["test" if row["vendor"] == config.hold_out else "train" for row in rows]
    return Listing(
        TensorStore(images[chosen]),
        names=[f"{row['vendor']}/{row['codepoints']}" for row in rows],
        labels=[(row["category" if kind == "category" else "codepoints"],) for row in rows],
        splits=splits,
        notes=(f"labels: {kind}; designers: {', '.join(designers)}",),
    )


def _emoji_rows() -> list[dict[str, str]]:
    with open(_FOLDER / "emoji" / "emoji32.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache  # a third of a second, and studies open a set for every run
def _emoji_cells() -> Tensor:
    return _cells(_FOLDER / "emoji" / "emoji32.webp", 32, len(_emoji_rows()))


@cache
def _cut_out_emoji() -> Tensor:
    return cut_out(_emoji_cells())


def _cells(path: Path, side: int, number: int) -> Tensor:
    """uint8 (number, c, side, side): the cells of a sheet, row by row."""
    with Image.open(path) as sheet:
        pixels = np.array(sheet)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    rows, columns, channels = pixels.shape[0] // side, pixels.shape[1] // side, pixels.shape[2]
    cells = pixels.reshape(rows, side, columns, side, channels).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(cells.reshape(-1, channels, side, side)[:number].copy())
