"""Videos kept decoded: every frame a JPEG or plain pixels of its own in an Arrow column, with the time when it is shown.

Any frame is reached at once, without those before it, and a clip is cut as from the file: by the same times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vitrail.data.clips import stretch
from vitrail.data.footage import Footage, open_footage
from vitrail.data.images import MAX_PIXELS, decode_image
from vitrail.data.pillow import match_channels
from vitrail.data.stores import Store, digest
from vitrail.data.video import Frames, Pixels, VideoError

VIDEO_COLUMN = "video"


class PackedVideo(NamedTuple):
    """A row of the column. frames: JPEG files, or where `raw` pixels (height, width, channels). times, end: in seconds, as in
    `Frames`. speed: of playback."""

    frames: Sequence[bytes]
    raw: bool
    times: Sequence[float]
    end: float
    height: int
    width: int
    channels: int
    speed: float


def packed_features() -> dict[str, Any]:
    """The column as the `datasets` library describes it."""
    from datasets import Sequence as Many
    from datasets import Value

    whole = dict.fromkeys(("height", "width", "channels"), Value("int32"))
    frames = {"frames": Many(Value("large_binary")), "raw": Value("bool"), "times": Many(Value("float64"))}
    return {**frames, "end": Value("float64"), **whole, "speed": Value("float64")}


def pack_video(
    footage: Footage,
    prepare: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], bytes] | None,
    channels: int,
    max_pixels: int = MAX_PIXELS,
) -> PackedVideo:
    """Decode all frames of the footage. prepare: makes a frame (c, h, w) smaller; encode: None keeps its pixels.

    Raises VideoError or ImageError with the reason.
    """
    frames: list[bytes] = []
    size = (0, 0)
    with open_footage(footage, channels=channels, max_pixels=max_pixels) as opened:
        first, times, end = stretch(opened, footage)
        for _, pixels in opened.frames(range(first, first + len(times))):
            frame = prepare(torch.tensor(pixels).permute(2, 0, 1))
            size = (frame.shape[1], frame.shape[2])
            frames.append(encode(frame) if encode else frame.permute(1, 2, 0).contiguous().numpy().tobytes())
    return PackedVideo(frames, encode is None, times.tolist(), end, *size, channels, footage.speed)


class PackedFrames(Frames):
    """The frames of a packed video. Raises VideoError where the row does not fit together."""

    def __init__(self, row: PackedVideo) -> None:
        if not row.frames or len(row.frames) != len(row.times):
            raise VideoError(f"a packed video of {len(row.frames)} frames and {len(row.times)} times")
        super().__init__(np.array(row.times, np.float64), row.end, (row.height, row.width))
        self.row = row

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels (h, w, 3)). Raises IndexError for a number that does not exist, ImageError or VideoError."""
        for number in np.unique(np.asarray(wanted, np.int64)).tolist():
            if not 0 <= number < len(self.times):
                raise IndexError(f"frame {number} of {len(self.times)}")
            yield number, self._pixels(self.row.frames[number])

    def _pixels(self, data: bytes) -> Pixels:
        shape = (*self.size, self.row.channels)
        if not self.row.raw:
            pixels = decode_image(data).permute(1, 2, 0).numpy()
        elif len(data) == math.prod(shape):
            pixels = match_channels(np.frombuffer(bytearray(data), np.uint8).reshape(shape), 3)
        else:
            raise VideoError(f"a packed frame of {len(data):,} bytes instead of {math.prod(shape):,}")
        if pixels.shape[:2] != self.size:
            raise VideoError(f"a packed frame of {pixels.shape[1]} x {pixels.shape[0]} instead of {shape[1]} x {shape[0]}")
        return pixels


class _Frames(Sequence[bytes]):
    """Binary cells of Arrow, each copied when it is asked for."""

    def __init__(self, cells: pa.LargeBinaryArray) -> None:
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, number: Any) -> Any:
        return self.cells[number].as_py()


def is_packed(features: Mapping[str, Any]) -> bool:
    """Whether a `datasets.Dataset` with these features holds packed videos."""
    column = features.get(VIDEO_COLUMN)
    return isinstance(column, dict) and set(PackedVideo._fields) <= set(column)


class PackedStore(Store):
    """The column of packed videos of a `datasets.Dataset`."""

    video = True
    packable = False

    def __init__(self, found: Any) -> None:
        self.found = found
        self.played_faster = any(speed != 1 for chunk in self._chunks for speed in chunk.field("speed").to_pylist())

    def __len__(self) -> int:
        return len(self.found)

    @cached_property
    def _chunks(self) -> list[pa.StructArray]:
        # In the Arrow format a slice of everything is the memory-mapped table itself.
        return self.found.select_columns([VIDEO_COLUMN]).with_format("arrow")[:].column(0).chunks

    @cached_property
    def _starts(self) -> list[int]:
        return np.cumsum([0] + [len(chunk) for chunk in self._chunks]).tolist()

    def _row(self, row: int) -> PackedVideo:
        part = bisect_right(self._starts, row) - 1
        chunk, at = self._chunks[part], row - self._starts[part]
        cells = {name: chunk.field(name)[at] for name in PackedVideo._fields}
        frames = _Frames(cells.pop("frames").values)
        return PackedVideo(frames=frames, **{name: cell.as_py() for name, cell in cells.items()})

    def read(self, row: int) -> Footage:
        """Its frames, none of them decoded. Raises VideoError for a row that does not fit together."""
        found = self._row(row)
        return Footage(PackedFrames(found), speed=found.speed)

    def key(self, row: int) -> bytes:
        """From the first, middle and last frame and their number."""
        frames = self._row(row).frames
        some = [frames[at] for at in (0, len(frames) // 2, len(frames) - 1)] if len(frames) else []
        return digest(len(frames), b"".join(some))

    def part(self, row: int) -> tuple[float, ...]:
        """When it ends, and speed."""
        found = self._row(row)
        return found.end, found.speed

    def __getstate__(self) -> dict[str, Any]:  # the data set pickles as the names of its files
        return {key: value for key, value in self.__dict__.items() if key not in ("_chunks", "_starts")}
