"""Pillow, kept quiet and safe: which formats it may open, and how each of its modes becomes 1 to 4 channels."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.bands import to_uint8

CONVERTIBLE = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's mode

# Without those that start programs (EPS), play films, hold pictures of other sizes than they state (ICO), or are unknown to
# their first bytes.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "QOI", "PCX", "SGI")
_ORIENTATION = 0x0112

for _name in ("PIL", "tifffile"):  # a broken file is reported by the exception; without a handler these would print as well
    logging.getLogger(_name).addHandler(logging.NullHandler())


class _Quiet:
    """How many threads are inside `quiet`, and what the last one to leave puts back.

    `warnings.catch_warnings` alone is not safe: the filters belong to the process, and two overlapping threads would put
    them back in the wrong order.
    """

    lock = threading.Lock()
    depth = 0
    filters = warnings.catch_warnings()
    limit = Image.MAX_IMAGE_PIXELS


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow without warnings (an exception says what is wrong) and without its own limit of pixels (ours is checked)."""
    with _Quiet.lock:
        _Quiet.depth += 1
        if _Quiet.depth == 1:
            _Quiet.filters = warnings.catch_warnings()
            _Quiet.filters.__enter__()
            warnings.simplefilter("ignore")
            _Quiet.limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.depth -= 1
            if _Quiet.depth == 0:
                Image.MAX_IMAGE_PIXELS = _Quiet.limit
                _Quiet.filters.__exit__(None, None, None)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_pillow(data: bytes) -> Image.Image:
    """The image with its header read. Raises what Pillow raises for data that is no picture."""
    with quiet():
        return Image.open(io.BytesIO(data), formats=_formats())


def shown_orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 that is still to be applied, from the header (Pillow turns TIFF by itself)."""
    if getattr(image, "format", None) == "TIFF":
        return 1
    with quiet():
        try:
            return _valid(Image.Image.getexif(image))  # PngImageFile.getexif would decode the whole picture
        except Exception:  # Pillow raises nearly anything for a malformed block: then there is no orientation
            return 1


def exif_orientation(block: bytes) -> int:
    """Orientation 1 to 8 of an Exif block; 1 where it says nothing that can be understood."""
    exif = Image.Exif()
    with quiet():
        try:
            exif.load(block)
            return _valid(exif)
        except Exception:  # as above
            return 1


def _valid(exif: Image.Exif) -> int:
    orientation = exif.get(_ORIENTATION, 1)
    return int(orientation) if orientation in range(1, 9) else 1


def convert(image: Image.Image, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """The first frame as (h, w, channels): transparent parts on white unless opacity is asked for, 16 bits cut to 8.

    Raises ValueError when the image cannot become so many channels.
    """
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image)
        image = Image.fromarray(to_uint8(wide.astype(np.uint16) if image.format == "PPM" else wide))
    if channels not in CONVERTIBLE:
        return match_channels(_pixels(image), channels)
    target = CONVERTIBLE[channels]
    if channels in (1, 3) and image.mode != target and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return _pixels(image if image.mode == target else image.convert(target))


def match_channels(pixels: UInt8[np.ndarray, "h w k"], channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Grey, grey and opacity, colour or colour and opacity (1 to 4 channels) as any other of these.

    Raises ValueError when the numbers differ and one is not of that kind.
    """
    bands = pixels.shape[2]
    if bands == channels:
        return pixels
    if bands not in CONVERTIBLE or channels not in CONVERTIBLE:
        raise ValueError(f"has {bands} channels, and {channels} are wanted")
    return convert(Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if bands == 1 else pixels)), channels)


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
