"""Generated pictures for the tests of the data room: smooth areas, fine texture and hard edges, as photos have."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """uint8 (h, w, c): a colour gradient, waves of several lengths, grain and a few dark and bright blocks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    pixels = np.empty((height, width, channels))
    for c in range(channels):
        slope = rng.uniform(-80, 80, 2)
        pixels[..., c] = 128 + slope[0] * (y - 0.5) + slope[1] * (x - 0.5)
        for length in (2, 7, 23):
            pixels[..., c] += rng.uniform(4, 14) * np.sin(
                2 * np.pi * length * (x * rng.uniform(0.3, 1) + y * rng.uniform(0.3, 1))
            )
    for _ in range(6):
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        pixels[top : top + height // 5 + 1, left : left + width // 5 + 1] += rng.uniform(-60, 60, channels)
    pixels += rng.normal(0, 4, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The picture as a file of the kind Pillow calls `kind`."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """An Exif block that states an orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block
