"""Opened pictures: the header has been read, so that a crop and a scale can be chosen before any pixel is decoded."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vitrail.data.bands import read_bands
from vitrail.data.pillow import convert, match_channels, quiet

Pixels: TypeAlias = UInt8[np.ndarray, "h w c"]

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

_FILMS = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"OggS", b"FLV")
_PICTURES_IN_FILM_FILES = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")


class ImageError(ValueError):
    """Data that is no readable picture, or too large a one; the message is the plain reason."""


class OpenImage:
    """A picture whose size is known and whose pixels are decoded on demand; made by `open_image`.

    stored_size and size are (height, width) before and after EXIF `orientation` (1 to 8) is applied.
    """

    def __init__(self, stored_size: tuple[int, int], channels: int, orientation: int = 1, data: bytes | None = None) -> None:
        self.stored_size, self.channels, self.orientation, self.data = stored_size, channels, orientation, data
        self.size = stored_size[::-1] if orientation >= 5 else stored_size

    def decode(self, scale: float = 1.0, rows: int | None = None) -> tuple[Pixels, int]:
        """Pixels as stored, before orientation, and how many stored pixels (1, 2, 4, 8) each stands for along a side.

        scale: the fraction of the full size that is enough; below 1 finer detail may be left out. rows: how many stored rows
        from the top are needed; more may be returned. Only JPEG makes use of these. Raises ImageError.
        """
        try:
            return self._decode(scale, rows)
        except ImageError:
            raise
        except Exception as problem:  # decoders raise nearly every kind of exception for malformed data
            raise ImageError(plain_reason(self.data, problem)) from None

    def _decode(self, scale: float, rows: int | None) -> tuple[Pixels, int]:
        raise NotImplementedError


class PillowImage(OpenImage):
    """A picture that Pillow reads, or a Pillow image."""

    def __init__(self, image: Image.Image, channels: int, orientation: int, data: bytes | None = None) -> None:
        super().__init__((image.height, image.width), channels, orientation, data)
        self.image = image

    def _decode(self, scale: float, rows: int | None) -> tuple[Pixels, int]:
        with quiet():
            return convert(self.image, self.channels), 1


class BandsImage(OpenImage):
    """A `.npy` file, or a TIFF that only tifffile reads."""

    def _decode(self, scale: float, rows: int | None) -> tuple[Pixels, int]:
        return match_channels(read_bands(self.data or b"", self.channels), self.channels), 1


class ArrayImage(OpenImage):
    """Pixels in memory."""

    def __init__(self, pixels: Pixels, channels: int) -> None:
        super().__init__((pixels.shape[0], pixels.shape[1]), channels)
        self.pixels = pixels

    def _decode(self, scale: float, rows: int | None) -> tuple[Pixels, int]:
        return match_channels(self.pixels, self.channels), 1


def file_format(data: bytes) -> str:
    """The name of the format that the first bytes say, or ""."""
    if data[:4] == b"RIFF":
        return "WebP" if data[8:12] == b"WEBP" else ""
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")


def holds_video(data: bytes) -> bool:
    """Whether the first bytes are those of a container of films: MP4 and its kin, Matroska, AVI, MPEG streams, Ogg, FLV."""
    if data[4:8] == b"ftyp":  # pictures lie in such files, too
        return data[8:12] not in _PICTURES_IN_FILM_FILES
    if data[:4] == b"RIFF":
        return data[8:11] == b"AVI"
    return data.startswith(_FILMS) or (data[:1] == b"G" and data[188:189] == b"G")


def plain_reason(data: bytes | None, problem: Exception) -> str:
    """Why `data` (None for a picture in memory) could not be read, in one line for a user."""
    text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    if data is None:
        return text
    if not data:
        return "an empty file (0 bytes)"
    head = data[:24]
    if holds_video(data):
        return "a video, not a picture"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"not a picture: it begins with the text {head.decode('ascii')!r}"
    kind = file_format(data)
    if kind and "truncated" in text.lower():
        return f"a {kind} file cut short: {text}"
    if kind:
        return f"a damaged {kind} file" + ("" if isinstance(problem, UnidentifiedImageError) else f": {text}")
    if not any(data[:4096]):
        return "not a picture: it begins with zeros only"
    return f"not a picture in a known format: it begins with the bytes {head[:8].hex(' ')}"
