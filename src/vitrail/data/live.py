"""Videos that have no end yet: an address on the network, or a pipe that another program writes into."""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.images import MAX_PIXELS
from vitrail.data.pillow import match_channels
from vitrail.data.video import CONTAINERS, Colours, Pixels, VideoError, decoded_frames, first_stream, load_av

PROTOCOLS = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "tcp", "udp", "rtp")
# What an address may lead on to (a playlist names others): the network, never a file of this machine.
_ALLOWED = ",".join((*PROTOCOLS, "tls", "crypto", "httpproxy"))
OPEN_SECONDS, SILENT_SECONDS = 15.0, 15.0  # until a stream counts as not there, and as stopped
_CAMERA = "/dev/video"


class Stream(NamedTuple):
    """A video that arrives while it is watched: an address (`rtsp://...`), a pipe or a camera."""

    address: str


def is_stream(text: str) -> bool:
    """Whether the text is an address, a camera, or the path of a pipe."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) or text.startswith(_CAMERA):
        return True
    try:
        kind = os.stat(text).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)


class Arriving:
    """Frames of a stream as they arrive, to be closed (`with`).

    rate: frames per second that the stream announces, 25 where it says nothing. ended: why it stopped, once it has; "" where it
    simply ended.
    Raises VideoError when it cannot be opened, ConfigError when PyAV is missing.
    """

    def __init__(self, stream: Stream, channels: int = 3, max_pixels: int = MAX_PIXELS) -> None:
        self.channels, self.max_pixels = channels, max_pixels
        self._container, self._stream = _open(stream.address)
        self.rate = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.ended = ""
        self._colours = Colours()

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *problem: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[tuple[float, Pixels]]:
        """(seconds since the first frame, pixels (h, w, c)); what cannot be decoded is passed over.

        Raises VideoError for a frame of too many pixels.
        """
        begin, last, size = None, -1 / self.rate, None
        problems: list[str] = []
        for frame in decoded_frames(self._container, self._stream, problems):
            begin = frame.time if begin is None else begin
            seconds = last + 1 / self.rate if frame.time is None else frame.time - begin
            if not last < seconds:  # a camera's clock may be set back
                seconds, begin = last + 1 / self.rate, (frame.time or 0.0) - last - 1 / self.rate
            last, size = seconds, size or (frame.height, frame.width)
            yield seconds, self._pixels(frame, size)
        self.ended = problems[0] if problems else ""

    def _pixels(self, frame: Any, size: tuple[int, int]) -> Pixels:
        height, width = size
        if height * width > self.max_pixels:
            raise VideoError(f"{width} x {height} pixels, more than the {self.max_pixels:,} allowed (max_pixels)")
        pixels = self._colours.pixels(frame, height, width)
        turned = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
        return match_channels(turned, self.channels)


def _open(address: str) -> tuple[Any, Any]:
    av = load_av()
    options, format = {"protocol_whitelist": _ALLOWED}, None
    protocol = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", address)
    if protocol is None:
        options = {"protocol_whitelist": "file,pipe", "format_whitelist": CONTAINERS}
        if address.startswith(_CAMERA) or stat.S_ISCHR(os.stat(address).st_mode):
            options, format = {}, _camera_format(address)
    elif protocol.group(1).lower() not in PROTOCOLS:
        raise VideoError(f"no stream: {protocol.group(1)}:// is none of {', '.join(PROTOCOLS)}")
    try:
        container = av.open(address, format=format, options=options, timeout=(OPEN_SECONDS, SILENT_SECONDS))
    except av.error.ExitError:
        raise VideoError(f"no stream: nothing came within {OPEN_SECONDS:.0f} s") from None
    except (av.error.FFmpegError, OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        if isinstance(problem, (av.error.InvalidDataError, EOFError)) or getattr(problem, "errno", None) == errno.EIO:
            reason = f"what came from there is no video, or ended before its first frame ({reason})"
        raise VideoError(f"no stream: {reason}") from None
    return container, first_stream(container)


def _camera_format(address: str) -> str:
    """The input format of cameras. Raises VideoError where there is no such camera, or PyAV cannot read cameras."""
    if not os.path.exists(address):
        found = sorted(glob.glob(f"{_CAMERA}*"))
        raise VideoError(f"no such camera; cameras here: {', '.join(found) if found else 'none'}")
    if "v4l2" not in load_av().formats_available:
        raise VideoError(
            "this PyAV was built without cameras; let FFmpeg hand it over: "
            f"mkfifo camera.ts; ffmpeg -f v4l2 -i {address} -f mpegts -y camera.ts & vitrail predict MODEL camera.ts"
        )
    return "v4l2"
