"""The task "how fast is it played?": any folder of videos, no labels needed."""

from __future__ import annotations

from pathlib import Path

from vitrail.data.folders import files_below
from vitrail.data.listing import Listing
from vitrail.data.samples import DataError, count
from vitrail.data.stores import FootageStore, PathStore
from vitrail.data.video import is_video_name

SPEED = "speed"
SPEEDS = (1, 2, 4)


def read_speed(root: Path) -> Listing:
    """Every video in and below `root` three times: played at its own, at double and at fourfold speed, which is the class.

    The three never fall on both sides of a split. It takes dense sampling: other clips cover a video at any speed.
    Raises DataError where there is no such folder, or no video in it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: labels {SPEED} needs a folder of videos")
    videos = [name.removeprefix("./") for name in files_below(root, root) if is_video_name(name)]
    if not videos:
        raise DataError(f"{root}: the folder holds no videos")
    names = [f"{name} {speed}x" for speed in SPEEDS for name in videos]
    speeds = [float(speed) for speed in SPEEDS for _ in videos]
    return Listing(
        FootageStore(PathStore(root, videos * len(SPEEDS)), speeds=speeds),
        names,
        [(f"{speed}x",) for speed in SPEEDS for _ in videos],
        [""] * len(names),
        classes=tuple(f"{speed}x" for speed in SPEEDS),
        notes=(f"{count(len(videos), 'video')}, each at {', '.join(f'{speed}x' for speed in SPEEDS)}",),
    )
