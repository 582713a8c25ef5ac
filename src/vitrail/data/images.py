"""Pictures from bytes, files or objects to uint8 tensors, and the plain reason where that cannot be done.

JPEG is decoded by simplejpeg, everything else by Pillow, `.npy` and TIFF of many bands as arrays. EXIF orientation is
honoured everywhere, transparent parts are shown on white, 16-bit values keep their upper 8 bits, and an animation is its
first frame.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitrail.data.bands import bands_size
from vitrail.data.jpeg import COLOURS, open_jpeg
from vitrail.data.opened import ArrayImage, BandsImage, ImageError, OpenImage, PillowImage, Pixels, file_format, plain_reason
from vitrail.data.pillow import CONVERTIBLE, open_pillow, shown_orientation

ImageData: TypeAlias = bytes | bytearray | str | os.PathLike | Tensor | Image.Image
DecodeMode = Literal["exact", "scaled"]

MAX_PIXELS = 178_956_970
MAX_BYTES = 2**30

# Without waiting: a pipe without a writer must not hang the reader. Ordinary files do not care.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def decode_image(
    data: ImageData,
    *,
    channels: int = 3,
    mode: DecodeMode = "exact",
    min_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "c h w"]:
    """The picture as uint8 (channels, height, width), EXIF orientation applied; in memory the channel is the innermost axis.

    channels: 1 gives luma, 2 luma and opacity, 3 colour, 4 colour and opacity; of more the picture must have as many. mode
    "scaled" may return a smaller picture whose sides are still >= min_size (height, width); only JPEG makes use of it.
    Raises ImageError with the reason: missing, empty, cut short, not a picture, more than max_pixels pixels ...
    """
    image = open_image(data, channels=channels, max_pixels=max_pixels)
    scale = 1.0
    if mode == "scaled" and min_size is not None:
        scale = max(min_size[0] / image.size[0], min_size[1] / image.size[1])
    return as_tensor(orient(image.decode(scale)[0], image.orientation))


def image_size(data: ImageData) -> tuple[int, int]:
    """(height, width) as shown, after EXIF orientation, from the header alone. Raises ImageError."""
    return open_image(data, max_pixels=sys.maxsize).size


def open_image(data: ImageData, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> OpenImage:
    """Read the header only, so that a crop and a scale can be chosen before decoding.

    A tensor is uint8 (c, h, w). Raises ImageError when there is no picture or it has more than max_pixels pixels.
    """
    if isinstance(data, (str, os.PathLike)):
        data = read_file(data)
    elif isinstance(data, bytearray):
        data = bytes(data)
    try:
        image = _open(data, channels)
    except ImageError:
        raise
    except Exception as problem:  # decoders raise nearly every kind of exception for malformed data
        raise ImageError(plain_reason(data if isinstance(data, bytes) else None, problem)) from None
    height, width = image.stored_size
    if height < 1 or width < 1:
        raise ImageError(f"an empty picture of {width} x {height} pixels")
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} = {height * width:,} pixels, more than the {max_pixels:,} allowed (max_pixels)")
    return image


def read_file(path: str | os.PathLike) -> bytes:
    """The contents of an ordinary file of at most 1 GiB. Raises ImageError when there is none."""
    try:
        file = os.open(path, _OPEN_FLAGS)
    except FileNotFoundError:
        raise ImageError(f"no such file: {os.fspath(path)}") from None
    except (OSError, ValueError) as problem:
        raise ImageError(f"cannot be read: {problem}") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"not an ordinary file: {os.fspath(path)}")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"a file of {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    except OSError as problem:
        raise ImageError(f"cannot be read: {problem}") from None
    finally:
        os.close(file)


def orient(pixels: Pixels, orientation: int) -> UInt8[np.ndarray, "H W c"]:
    """Stored pixels turned and mirrored to what EXIF orientation 1 to 8 shows (Exif 2.32, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def as_tensor(pixels: Pixels) -> UInt8[Tensor, "c h w"]:
    """A writable (c, h, w) tensor over channels-last memory."""
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)


def _open(data: bytes | Tensor | Image.Image, channels: int) -> OpenImage:
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8 or data.ndim != 3:
            raise ImageError(f"a tensor picture is uint8 (channels, height, width); given {data.dtype} {tuple(data.shape)}")
        return ArrayImage(data.detach().cpu().permute(1, 2, 0).numpy(), channels)
    if isinstance(data, Image.Image):
        return PillowImage(data, channels, shown_orientation(data))
    kind = file_format(data)
    if kind == "JPEG" and channels in COLOURS and (jpeg := open_jpeg(data, channels)):
        return jpeg
    if kind == "NumPy":
        return BandsImage(bands_size(data, channels), channels, data=data)
    try:
        image = open_pillow(data)
        if kind == "TIFF" and channels not in CONVERTIBLE:
            raise UnidentifiedImageError("more bands than Pillow knows")
    except UnidentifiedImageError:
        if kind != "TIFF":
            raise
        return BandsImage(bands_size(data, channels), channels, data=data)
    return PillowImage(image, channels, shown_orientation(image), data)
