"""Video files: which frames they hold and when each is shown, and any of them decoded, exactly, in bounded memory.

Frames are found by timestamp. Reading a file's packets (nothing is decoded for it) tells when every frame is shown and where
decoding may begin; a frame is then reached from the last such place before it. So a variable frame rate, B-frames and streams
that begin late need no special care, and frame 1000 is the same frame whether it was sought or arrived at.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from vitrail.config import ConfigError
from vitrail.data.images import MAX_PIXELS
from vitrail.data.opened import file_format
from vitrail.data.pillow import match_channels

VideoData: TypeAlias = str | bytes
Pixels: TypeAlias = UInt8[np.ndarray, "h w c"]

VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv",
    ".3gp", ".3g2", ".mxf", ".vob",
})  # fmt: skip
# Containers of one file. A playlist, which could name other files or addresses, is no video here whatever it is called.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,ivf,h264,hevc,m4v,mpegvideo"
_OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
_INDICES_KEPT = 4096  # files whose index a process remembers
# VP8 hides reference frames in packets of their own, with timestamps: what is shown is known after decoding only.
_HIDES_FRAMES = frozenset({"vp8"})
# In H.264 every picture says whether others refer to it (nal_ref_idc, H.264 section 7.4.1). A clip of every fourth frame needs
# none of the others that nobody refers to. HEVC's sub-layer non-reference pictures may be referred to by higher sub-layers.
_SAYS_WHAT_IS_REFERRED_TO = frozenset({"h264"})


class VideoError(ValueError):
    """Data that is no readable video, or holds no readable frame where one was asked for; the message is the plain reason."""


@dataclass(frozen=True)
class VideoIndex:
    """What is known of a video before its frames are decoded.

    pts: of every frame in the order of showing, in units of `unit` seconds. keys: those at which decoding may begin; empty
    where only the beginning will do. size: (height, width) as shown. turns: quarter turns against the clock that show it
    upright.
    """

    pts: Int64[np.ndarray, " n"]
    keys: Int64[np.ndarray, " k"]
    unit: float
    size: tuple[int, int]
    turns: int
    codec: str
    in_packets: bool = False  # whether every packet holds the frame of its own timestamp

    @property
    def times(self) -> Float64[np.ndarray, " n"]:
        """Seconds since the first frame."""
        return (self.pts - self.pts[0]) * self.unit

    @property
    def end(self) -> float:
        """When the last frame has been shown, as long as frames usually are."""
        return float(self.times[-1] + (np.median(np.diff(self.times)) if len(self.pts) > 1 else 0.04))


def load_av() -> Any:
    """PyAV. Raises ConfigError naming the extra where it is not installed."""
    try:
        import av
    except ImportError:
        raise ConfigError("reading videos needs PyAV: pip install 'vitrail[video]'") from None
    return av


def is_video_name(name: str) -> bool:
    """Whether the name ends like that of a video."""
    return "." in name and "." + name.rsplit(".", 1)[1].lower() in VIDEO_SUFFIXES


def video_index(data: VideoData) -> VideoIndex:
    """The index of a video: a path, remembered while its size and time of change stay, or a whole file in memory.

    Raises VideoError when there is no video in it, ConfigError when PyAV is missing.
    """
    if isinstance(data, bytes):
        return _make_index(data)
    try:
        status = os.stat(data)
    except OSError as problem:
        raise VideoError(f"cannot be read: {problem.strerror or problem}") from None
    if not os.path.isfile(data):
        raise VideoError("not an ordinary file")
    return _remembered(os.path.abspath(data), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_INDICES_KEPT)
def _remembered(path: str, size: int, mtime_ns: int) -> VideoIndex:
    return _make_index(path)


class Colours:
    """Turns decoded frames into pixels.

    One converter on one thread for all frames: a new one for each, with threads of its own, costs as much as decoding does
    (640x480 on an AMD EPYC: 1.2 ms of processor time instead of 0.2, and more of waiting where the machine is busy).
    """

    def __init__(self) -> None:
        self._converter = load_av().video.reformatter.VideoReformatter()

    def pixels(self, frame: Any, height: int, width: int) -> Pixels:
        """(h, w, 3), resized where the frame has another size."""
        return self._converter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()


class Frames:
    """Footage of any kind, opened, to be closed: `with ... as opened: opened.frames([0, 30])`.

    times: float64 (n,), seconds since the first frame, of every frame. end: when the last one has been shown. size: (height,
    width) as shown.
    """

    def __init__(self, times: Float64[np.ndarray, " n"], end: float, size: tuple[int, int]) -> None:
        self.times, self.end, self.size = times, end, size

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels (h, w, c)) of the wanted frames, each once, in the order of showing; one is held at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what is open."""

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Video(Frames):
    """An open video file, its rotation applied.

    threads: of the decoder, 0 = as many as it likes. Frames that cannot be decoded show the one before, and are counted in
    `repaired`.
    Raises VideoError when it cannot be opened or has more than max_pixels pixels, ConfigError when PyAV is missing.
    """

    def __init__(self, data: VideoData, *, channels: int = 3, threads: int = 1, max_pixels: int = MAX_PIXELS) -> None:
        self.data, self.channels, self.threads = data, channels, threads
        self.index = video_index(data)
        super().__init__(self.index.times, self.index.end, self.index.size)
        if self.size[0] * self.size[1] > max_pixels:
            raise VideoError(f"{self.size[1]} x {self.size[0]} pixels, more than the {max_pixels:,} allowed (max_pixels)")
        self.repaired = 0
        self._colours = Colours()
        self._container: Any = None
        self._decoded: Iterator[Any] = iter(())
        self._waiting: tuple[int, Any] | None = None  # a frame decoded while looking for an earlier one
        self._last: tuple[int, Any] | None = None  # the newest frame at or before the last one asked for
        self._wanted: frozenset[int] = frozenset()  # timestamps of this request; empty where all frames have to be decoded
        self._left_out: set[int] = set()  # timestamps that were not wanted since decoding began, perhaps not decoded

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()
        self._container, self._decoded, self._waiting, self._last = None, iter(()), None, None

    def frames(self, wanted: Sequence[int] | np.ndarray) -> Iterator[tuple[int, Pixels]]:
        """(number, pixels (h, w, c)) of the wanted frames.

        Raises IndexError for a number that does not exist, VideoError where nothing can be decoded up to there.
        """
        numbers = np.unique(np.asarray(wanted, np.int64)).tolist()
        if self.index.in_packets and self.index.codec in _SAYS_WHAT_IS_REFERRED_TO:
            self._wanted = frozenset(self.index.pts[[number for number in numbers if 0 <= number < len(self.times)]].tolist())
        for number in numbers:
            if not 0 <= number < len(self.times):
                raise IndexError(f"frame {number} of {len(self.times)}")
            yield number, self._pixels(self._reach(number))

    def _reach(self, number: int) -> Any:
        """The decoded frame, or the last one before it that can be decoded."""
        gone = int(self.index.pts[number]) in self._left_out
        if self._last is None or number < self._last[0] or self._key(number) > self._last[0] or gone:
            self._begin_before(number)
        while self._last is None or self._last[0] < number:
            following = self._waiting or self._next()
            if following is None or following[0] > number:
                self._waiting = following
                break
            self._last, self._waiting = following, None
        if self._last is None:
            raise VideoError(f"no frame at or before {self.times[number]:.3f} s can be decoded")
        self.repaired += self._last[0] != number
        return self._last[1]

    def _key(self, number: int) -> int:
        """The number of the last frame, up to this one, at which decoding may begin; -1 where that is the beginning."""
        at = int(np.searchsorted(self.index.keys, self.index.pts[number], "right")) - 1
        return int(np.searchsorted(self.index.pts, self.index.keys[at])) if at > 0 else -1

    def _begin_before(self, number: int) -> None:
        """Stand so that the next decoded frame is at or before the wanted one; further back, where a file lands too late."""
        self._left_out.clear()
        at = int(np.searchsorted(self.index.keys, self.index.pts[number], "right")) - 1
        back = 1
        while at > 0:
            self._open()
            try:
                self._container.seek(int(self.index.keys[at]), stream=self._stream, backward=True)
                self._decoded = self._decode()
                first = self._next()
            except load_av().error.FFmpegError:
                first = None
            if first is not None and first[0] <= number:
                self._last, self._waiting = None, first
                return
            at, back = at - back, 2 * back
        self.close()
        self._open()

    def _open(self) -> None:
        if self._container is None:
            self._container, self._stream = _open(self.data)
            self._stream.thread_type = "AUTO" if self.threads != 1 else "SLICE"
            self._stream.codec_context.thread_count = self.threads
            self._decoded = self._decode()
        self._last, self._waiting = None, None

    def _next(self) -> tuple[int, Any] | None:
        """The next decoded frame that the index knows."""
        for frame in self._decoded:
            if frame.pts is not None:
                number = int(np.searchsorted(self.index.pts, frame.pts))
                if number < len(self.index.pts) and self.index.pts[number] == frame.pts:
                    return number, frame
        return None

    def _decode(self) -> Iterator[Any]:
        return decoded_frames(self._container, self._stream, leave_out=self._leaves_out)

    def _leaves_out(self, packet: Any) -> bool:
        """Whether its frame is of no use now unless others refer to it. One after the last wanted frame may soon be wanted."""
        if not self._wanted or packet.pts is None or packet.pts in self._wanted or packet.pts > max(self._wanted):
            return False
        self._left_out.add(packet.pts)
        return True

    def _pixels(self, frame: Any) -> Pixels:
        height, width = self.size if self.index.turns % 2 == 0 else self.size[::-1]
        pixels = self._colours.pixels(frame, height, width)  # a stream may change its size halfway
        if self.index.turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, self.index.turns))
        return match_channels(pixels, self.channels)


def _open(data: VideoData) -> tuple[Any, Any]:
    """A container and its video stream."""
    av = load_av()
    try:
        # An absolute path: `a:b.mp4` would be taken for a protocol.
        container = av.open(io.BytesIO(data) if isinstance(data, bytes) else os.path.abspath(data), options=dict(_OPEN_OPTIONS))
    except (av.error.FFmpegError, OSError, ValueError) as problem:
        raise VideoError(_reason(data, problem)) from None
    return container, first_stream(container)


def first_stream(container: Any) -> Any:
    """Its first video stream that is no cover picture. Raises VideoError, the container closed, where there is none."""
    cover = load_av().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        container.close()
        raise VideoError("holds no video stream")
    return streams[0]


def _reason(data: VideoData, problem: Exception) -> str:
    """Why there is no video in it, in one line for a user."""
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
            head = file.read(256)
            cut = head[4:8] == b"ftyp" and not _has_table(file)
    except OSError as refused:
        return f"cannot be read: {refused.strerror or refused}"
    if not head:
        return "an empty file (0 bytes)"
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    if kind := file_format(head):
        text = f"it is a {kind} picture"
    elif cut:
        text = "cut short, the table of its frames is missing"
    elif isinstance(problem, EOFError):
        text = "it ends before its first frame"
    return f"not a readable video: {text}"


def _has_table(file: io.BufferedIOBase) -> bool:
    """Whether the boxes of an MP4 file come to "moov", without which nothing tells where its frames lie."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return False
        if head[4:8] == b"moov":
            return True
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        if size < 8:  # 0: up to the end of the file
            return False
        at += size


def decoded_frames(
    container: Any,
    stream: Any,
    problems: list[str] | None = None,
    leave_out: Callable[[Any], bool] = lambda packet: False,
) -> Iterator[Any]:
    """Frames as they come; packets that cannot be decoded are passed over, and a file that breaks off ends there.

    problems: receives the reason where reading breaks off. leave_out: says of a packet that its frame is only needed where
    others refer to it.
    """
    broken = load_av().error.FFmpegError
    skipping = False
    try:
        for packet in container.demux(stream):
            if leave_out(packet) != skipping:
                skipping = not skipping
                stream.codec_context.skip_frame = "NONREF" if skipping else "DEFAULT"
            try:
                frames = packet.decode()
            except (broken, EOFError):
                continue
            yield from frames
    except broken as problem:
        if problems is not None:
            problems.append(problem.strerror or str(problem))
        try:
            yield from stream.codec_context.decode(None)
        except (broken, EOFError):
            return


def _make_index(data: VideoData) -> VideoIndex:
    container, stream = _open(data)
    with container:
        stream.codec_context.thread_count = 1
        first, pts, keys = _scan_packets(container, stream)
        unit, codec = float(stream.time_base), stream.codec_context.name
    size, turns = (first.height, first.width), round(first.rotation / 90) % 4
    shown = size if turns % 2 == 0 else (size[1], size[0])
    # Where packets do not say what is shown, everything is decoded once.
    in_packets = not (codec in _HIDES_FRAMES or None in pts or len(set(pts)) < len(pts) or first.pts != min(pts))
    if not in_packets:
        pts, keys = _scan_frames(data), []
    return VideoIndex(np.array(sorted(pts), np.int64), np.array(sorted(keys), np.int64), unit, shown, turns, codec, in_packets)


def _scan_packets(container: Any, stream: Any) -> tuple[Any, list[int], list[int]]:
    """The first frame, and the timestamps of all packets and of those where decoding may begin."""
    broken = load_av().error.FFmpegError
    first, pts, keys = None, [], []
    with suppress(broken):  # a file that breaks off ends there
        for packet in container.demux(stream):
            if first is None:
                with suppress(broken, EOFError):
                    first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard and not packet.is_corrupt:
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
    if first is None:
        raise VideoError("no frame of it can be decoded" if pts else "holds no frames")
    return first, pts, keys


def _scan_frames(data: VideoData) -> list[int]:
    container, stream = _open(data)
    with container:
        return sorted({frame.pts for frame in decoded_frames(container, stream) if frame.pts is not None})
