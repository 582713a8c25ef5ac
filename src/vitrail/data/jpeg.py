"""JPEG by simplejpeg (libjpeg-turbo): the pixels of torchvision.io, or no more of them than a crop needs."""

from __future__ import annotations

import numpy as np
import simplejpeg

from vitrail.data.opened import ImageError, OpenImage, PillowImage, Pixels
from vitrail.data.pillow import exif_orientation, open_pillow

COLOURS = {1: "GRAY", 3: "RGB", 4: "RGBA"}  # channels -> simplejpeg's name

_PLAIN = 0.91  # up to this scale colour of half the resolution is enlarged by repeating it: resizing smooths it again
_MCU = 16  # rows of the usual unit of a JPEG
_EXIF, _START_OF_SCAN, _RESTARTS = 0xE1, 0xDA, 0xDD  # markers of the JPEG standard, ITU-T T.81, table B.1
_SEQUENTIAL = (0xC0, 0xC1)  # frames whose rows follow each other in the file
_FRAMES = (*_SEQUENTIAL, 0xC2)  # and progressive ones
_REST_LEFT_OUT = "extraneous bytes before marker 0xd9"  # libjpeg's warning when data is left at the end of the picture


class JpegImage(OpenImage):
    """A JPEG of grey or colour; `frame` is where its height is stated, 0 where its rows are not stored one after another."""

    def __init__(self, data: bytes, channels: int, stored_size: tuple[int, int], orientation: int, frame: int) -> None:
        super().__init__(stored_size, channels, orientation, data)
        self.bytes, self.frame = data, frame

    def _decode(self, scale: float, rows: int | None) -> tuple[Pixels, int]:
        # What libjpeg-turbo reduces by in vector code; 8/5, 8/6 and 8/7 take longer than the full size.
        reduction = 8 if scale <= 1 / 8 else 4 if scale <= 1 / 4 else 2 if scale <= 1 / 2 else 1
        plain = scale <= _PLAIN and reduction == 1
        if rows is not None and self.frame and (needed := -(-(rows + reduction) // _MCU) * _MCU) < self.stored_size[0]:
            top = self._top(needed, reduction, plain)
            if top is not None:
                return top, reduction
        try:
            pixels = simplejpeg.decode_jpeg(self.bytes, **self._options(self.stored_size[0], reduction, plain))
        except ValueError:  # Pillow forgives stray bytes, but not missing ones
            image = open_pillow(self.bytes)
            if (image.height, image.width) != self.stored_size:  # the size that was checked is not the one that counts
                raise ImageError("a damaged JPEG file: it states two sizes") from None
            return PillowImage(image, self.channels, self.orientation, self.data).decode()
        return pixels, reduction

    def _options(self, height: int, reduction: int, plain: bool) -> dict[str, object]:
        least = (-(-height // reduction), -(-self.stored_size[1] // reduction)) if reduction > 1 else (0, 0)
        # Repeated colour saves 7 % of the time. Everywhere, a ViT-Ti would take 2.7 % more pictures for something else
        # than after exact decoding, only here 1 % (`python -m benchmarks.data`). The fast DCT saves 2 % and costs more.
        return {"colorspace": COLOURS[self.channels], "fastupsample": plain, "min_height": least[0], "min_width": least[1]}

    def _top(self, height: int, reduction: int, plain: bool) -> Pixels | None:
        """The upper `height` rows, or None where they are damaged.

        libjpeg is told that the picture ends there. It then warns that data is left, after all pixels have been written;
        as it reports the first warning only, damage among the wanted rows would be reported instead, and so is a missing end.
        """
        shorter = bytearray(self.bytes)
        shorter[self.frame : self.frame + 2] = height.to_bytes(2, "big")
        pixels = np.empty((-(-height // reduction), -(-self.stored_size[1] // reduction), self.channels), np.uint8)
        try:
            simplejpeg.decode_jpeg(shorter, buffer=pixels, **self._options(height, reduction, plain))
        except ValueError as problem:
            return pixels if _REST_LEFT_OUT in str(problem) else None
        return pixels


def open_jpeg(data: bytes, channels: int) -> JpegImage | None:
    """The opened JPEG, or None where it is one for Pillow: CMYK, unusual, or damaged."""
    at, end, orientation, frame, restarts = 2, len(data) - 10, 0, 0, False
    while at <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _START_OF_SCAN:
            break
        if marker == 0xFF:  # fill bytes are allowed before a marker
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES and not frame:
            frame = at
        elif marker == _RESTARTS:
            restarts = True
        elif marker == _EXIF and not orientation and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 4 : at + 2 + length])
        at += 2 + length
    if not frame or data[frame + 4] != 8 or data[frame + 9] not in (1, 3):  # bits of a value, number of components
        return None
    size = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    if not size[0]:  # stated at the end of the first scan
        return None
    in_order = data[frame + 1] in _SEQUENTIAL and not restarts
    return JpegImage(data, channels, size, orientation or 1, frame + 5 if in_order else 0)
