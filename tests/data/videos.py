"""Generated videos for tests: a moving pattern over a gradient, every frame different."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frames(number: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    """uint8 (t, h, w, 3): a bright block that moves right over a gradient; the lower left part darker with every frame."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([y * 160 // height, x * 160 // width, np.full_like(x, 40 + 30 * (seed % 5))], 2).astype(np.uint8)
    made = np.repeat(base[None], number, 0)
    for at, frame in enumerate(made):
        left = (3 * at + 11 * seed) % (width - 8)
        frame[8:16, left : left + 8] = 250
        frame[height // 2 :, : width // 2] = 10 + 220 * at // max(number, 1)
    return made


def write_video(
    target: Path | io.BytesIO,
    pixels: np.ndarray,
    *,
    codec: str = "libx264",
    rate: int = 25,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    audio: bool = False,
    format: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    bframes: int = 2,
    gop: int = 12,
) -> None:
    """Encode frames (t, h, w, 3). times: of each frame in milliseconds instead of a steady rate."""
    with av.open(
        target if isinstance(target, io.BytesIO) else str(target), "w", format=format, options=container_options
    ) as out:
        stream = out.add_stream(codec, rate=rate, options={"bf": str(bframes), "threads": "1", **(options or {})})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = gop
        unit = Fraction(1, 1000) if times is not None else Fraction(1, rate)
        if times is not None:
            stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio else None
        for at, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (at if times is None else times[at]), unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            tone = (8000 * np.sin(np.arange(16000) / 20)).astype(np.int16)[None]
            note = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            note.sample_rate, note.pts = 16000, 0
            out.mux(sound.encode(note))
            out.mux(sound.encode(None))


def remux_from(source: Path, target: Path, start: float, rotation: int = 0) -> None:
    """Copy the packets from the last key frame before `start` seconds on; an edit list hides what lies before `start`."""
    with av.open(str(source)) as whole, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as out:
        stream = whole.streams.video[0]
        copy = out.add_stream_from_template(stream)
        if rotation:
            copy.set_display_rotation(rotation)
        at = round(start / stream.time_base)
        whole.seek(at, stream=stream)
        for packet in whole.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - at, packet.dts - at, copy
                out.mux(packet)


def decoded(path: Path) -> list[tuple[float, np.ndarray]]:
    """(seconds since the first frame, pixels) of every frame, by nothing but decoding the file from the start."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return [(float((pts - found[0][0]) * stream.time_base), pixels) for pts, pixels in found]
