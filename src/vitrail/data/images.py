"""Pictures from bytes, files or objects to uint8 tensors, and the plain reason where that cannot be done.

JPEG is decoded by simplejpeg (libjpeg-turbo, the same pixels as torchvision.io), everything else by Pillow, `.npy` and TIFF
of many bands as arrays. EXIF orientation is honoured everywhere, transparent parts are shown on white, 16-bit values keep
their upper 8 bits, and an animation is its first frame.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vitrail.data.bands import bands_size, read_bands
from vitrail.data.pillow import CONVERTIBLE, convert, exif_orientation, match_channels, open_pillow, quiet, shown_orientation

ImageData: TypeAlias = bytes | bytearray | str | os.PathLike | Tensor | Image.Image
DecodeMode = Literal["exact", "scaled"]
Pixels: TypeAlias = UInt8[np.ndarray, "h w c"]

MAX_PIXELS = 178_956_970
MAX_BYTES = 2**30
REDUCTIONS = (8, 4, 2, 1)  # what libjpeg-turbo reduces by in vector code; 8/5, 8/6, ... take longer than the full size

_JPEG_COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"BM": "BMP",
    b"\x93NUMPY": "NumPy",
}


class ImageError(ValueError):
    """Data that is no readable picture, or too large a one; the message is the plain reason."""


@runtime_checkable
class Source(Protocol):
    """A picture whose header has been read and whose pixels have not."""

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) before orientation."""

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""

    def decode(self, scale: float | None) -> tuple[Pixels, int]:
        """Pixels in stored orientation, and how many stored pixels (1, 2, 4, 8) each stands for along a side."""


@dataclass(frozen=True)
class OpenImage:
    """A picture opened by `open_image`: its size is known, its pixels are decoded on demand."""

    source: Source
    data: ImageData

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown, after EXIF orientation."""
        height, width = self.source.stored_size
        return (width, height) if self.orientation >= 5 else (height, width)

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8."""
        return self.source.orientation

    def decode(self, scale: float | None = None) -> tuple[Pixels, int]:
        """Pixels as stored, before orientation, and the reduction.

        scale: the fraction of the full size that is enough; a JPEG is then decoded at 1/2, 1/4 or 1/8 if that suffices,
        and with simple chroma upsampling. None decodes exactly. Raises ImageError when the data is damaged.
        """
        with _plain_reasons(self.data):
            return self.source.decode(scale)


def decode_image(
    data: ImageData,
    *,
    channels: int = 3,
    mode: DecodeMode = "exact",
    min_size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "c h w"]:
    """The picture as uint8 (channels, height, width), EXIF orientation applied; in memory the channel is the innermost axis.

    channels: 1 gives luma, 3 colour, 4 colour and opacity; any other number must be the picture's own. mode "scaled" may
    return a smaller picture whose sides are still >= min_size (height, width); only JPEG makes use of it.
    Raises ImageError with the reason: missing, empty, cut short, not a picture, more than max_pixels pixels ...
    """
    image = open_image(data, channels=channels, max_pixels=max_pixels)
    scale = None
    if mode == "scaled":
        scale = max(least / side for least, side in zip(min_size or image.size, image.size, strict=True))
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
    if isinstance(data, bytearray):
        data = bytes(data)
    with _plain_reasons(data):
        source = _open(data, channels)
    _check_pixels(source.stored_size, max_pixels)
    return OpenImage(source, data)


def read_file(path: str | os.PathLike) -> bytes:
    """The contents of an ordinary file of at most 1 GiB. Raises ImageError when there is none."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"not an ordinary file: {os.fspath(path)}")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"a file of {status.st_size:,} bytes; at most {MAX_BYTES:,} are read")
            return file.read()
    except FileNotFoundError:
        raise ImageError(f"no such file: {os.fspath(path)}") from None
    except (OSError, ValueError) as problem:
        raise problem if isinstance(problem, ImageError) else ImageError(f"cannot be read: {problem}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe without a writer must not hang the reader; ordinary files do not care."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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


@dataclass(frozen=True)
class JpegSource:
    """A JPEG that simplejpeg reads."""

    data: bytes
    channels: int
    stored_size: tuple[int, int]
    orientation: int

    def decode(self, scale: float | None) -> tuple[Pixels, int]:
        """See Source. Data that libjpeg-turbo complains about is left to Pillow: it forgives stray bytes, not missing ones."""
        height, width = self.stored_size
        reduction = next(r for r in REDUCTIONS if r == 1 or (scale is not None and scale * r <= 1))
        least = (-(-height // reduction), -(-width // reduction)) if reduction > 1 else (0, 0)
        try:
            pixels = simplejpeg.decode_jpeg(
                self.data,
                _JPEG_COLOURS[self.channels],
                fastupsample=scale is not None,
                min_height=least[0],
                min_width=least[1],
            )
            return pixels, reduction
        except ValueError:
            image = open_pillow(self.data)
            if (image.height, image.width) != self.stored_size:  # two headers: the size that was checked is not this one
                raise ImageError("a damaged JPEG file: it states two sizes") from None
            return PillowSource(image, self.channels, self.orientation).decode(None)


@dataclass(frozen=True)
class PillowSource:
    """A picture that Pillow reads, or a Pillow image."""

    image: Image.Image
    channels: int
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) before orientation."""
        return self.image.height, self.image.width

    def decode(self, scale: float | None) -> tuple[Pixels, int]:
        """See Source."""
        with quiet():
            return convert(self.image, self.channels), 1


@dataclass(frozen=True)
class BandsSource:
    """A `.npy` file or a TIFF that only tifffile reads."""

    data: bytes
    channels: int
    stored_size: tuple[int, int]
    orientation: int = 1

    def decode(self, scale: float | None) -> tuple[Pixels, int]:
        """See Source."""
        return match_channels(read_bands(self.data, self.channels), self.channels), 1


@dataclass(frozen=True)
class TensorSource:
    """Pixels in memory."""

    pixels: Pixels
    channels: int
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def decode(self, scale: float | None) -> tuple[Pixels, int]:
        """See Source."""
        return match_channels(self.pixels, self.channels), 1


def _open(data: bytes | Tensor | Image.Image, channels: int) -> Source:
    if isinstance(data, Tensor):
        if data.dtype != torch.uint8 or data.ndim != 3:
            raise ImageError(f"a tensor picture is uint8 (channels, height, width); given {data.dtype} {tuple(data.shape)}")
        return TensorSource(data.detach().cpu().permute(1, 2, 0).numpy(), channels)
    if isinstance(data, Image.Image):
        return PillowSource(data, channels, shown_orientation(data))
    kind = _format(data)
    if kind == "JPEG" and channels in _JPEG_COLOURS and (jpeg := _open_jpeg(data, channels)):
        return jpeg
    if kind == "NumPy":
        return BandsSource(data, channels, bands_size(data, channels))
    try:
        image = open_pillow(data)
        if kind == "TIFF" and channels not in CONVERTIBLE:
            raise UnidentifiedImageError("more bands than Pillow knows")
    except UnidentifiedImageError:
        if kind != "TIFF":
            raise
        return BandsSource(data, channels, bands_size(data, channels))
    return PillowSource(image, channels, shown_orientation(image))


def _open_jpeg(data: bytes, channels: int) -> JpegSource | None:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    return JpegSource(data, channels, (height, width), _jpeg_orientation(data))


def _jpeg_orientation(data: bytes) -> int:
    """The orientation in the first Exif segment before the picture data, else 1."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xFF:  # fill bytes are allowed before a marker
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return exif_orientation(data[at + 4 : at + 2 + length])
        at += 2 + length
    return 1


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise ImageError(f"an empty picture of {width} x {height} pixels")
    if height * width > max_pixels:
        raise ImageError(f"{width} x {height} = {height * width:,} pixels, more than the {max_pixels:,} allowed (max_pixels)")


def _format(data: bytes) -> str:
    if data[:4] == b"RIFF":
        return "WebP" if data[8:12] == b"WEBP" else ""
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")


@contextmanager
def _plain_reasons(data: object) -> Iterator[None]:
    """Whatever a decoder raises inside becomes an ImageError: for malformed data they raise nearly every kind of exception."""
    try:
        yield
    except ImageError:
        raise
    except Exception as problem:
        raise ImageError(_reason(data, problem)) from None


def _reason(data: object, problem: Exception) -> str:
    text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    if not isinstance(data, bytes):
        return text
    if not data:
        return "an empty file (0 bytes)"
    head = data[:24]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"not a picture: it begins with the text {head.decode('ascii')!r}"
    kind = _format(data)
    if kind and "truncated" in text.lower():
        return f"a {kind} file cut short: {text}"
    if kind:
        return f"a damaged {kind} file" + ("" if isinstance(problem, UnidentifiedImageError) else f": {text}")
    if not any(data[:4096]):
        return "not a picture: it begins with zeros only"
    return f"not a picture in a known format: it begins with the bytes {head[:8].hex(' ')}"
