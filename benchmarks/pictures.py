"""Picture sets for the benchmarks of the data path: made photos, small copies, frames of videos, and random parts of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vitrail.data.images import image_size

SMALL_SIDE, SMALL_QUALITIES = 500, (75, 85, 95)
CUT_SIDES, CUT_QUALITIES, CUTS = (320, 400, 500, 640, 800, 1024, 1600), (60, 75, 85, 92, 97), 600
MADE_SIZES = ((1200, 1600), (1704, 2272), (2736, 3648), (1536, 2048), (3456, 4608), (1344, 1008))


def make_photos(folder: Path, sizes: tuple[tuple[int, int], ...] = MADE_SIZES) -> None:
    """JPEGs with what cameras record: large shapes, detail of every scale that falls off as 1 / frequency, and grain."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        planes = []
        for _ in range(3):
            waves = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
            plane = np.fft.irfft2(waves / frequency**1.4, (height, width))
            planes.append(plane / plane.std())
        light = planes[0][..., None]  # colours of a photo differ less than its brightness
        pixels = 120 + 45 * light + 12 * np.stack(planes, 2) + rng.normal(0, 1.5, (height, width, 1))
        edges = np.sign(planes[1] - 0.4)[..., None] * 12
        Image.fromarray(np.clip(pixels + edges, 0, 255).astype(np.uint8)).save(folder / f"made-{number}.jpg", quality=90)


def jpegs(folder: Path, at_least: float = 0) -> list[Path]:
    """The JPEGs of a folder with at least so many pixels, by name."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    return [path for path in found if math.prod(image_size(path)) >= at_least]


def _shown(path: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def make_small(photos: list[Path], folder: Path) -> list[Path]:
    """The photos with a long side of 500 pixels, at several qualities."""
    made = []
    for path in photos:
        small = _shown(path)
        small.thumbnail((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BICUBIC)
        for quality in SMALL_QUALITIES:
            made.append(folder / f"{path.stem}-q{quality}.jpg")
            small.save(made[-1], quality=quality)
    return made


def make_frames(videos: list[Path], folder: Path, each: int = 8) -> list[Path]:
    """Frames spread over each video, without loss (needs the extra `video`)."""
    import av

    made = []
    for path in videos:
        with av.open(path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        for number in range(each):
            made.append(folder / f"{path.stem}-frame{number}.png")
            frames[(2 * number + 1) * len(frames) // (2 * each)].save(made[-1])
    return made


def make_cuts(photos: list[Path], folder: Path, count: int = CUTS) -> list[Path]:
    """Random parts of the photos (or frames) at several sizes and qualities."""
    rng, made = np.random.default_rng(0), []
    for number, path in enumerate(photos):
        picture = _shown(path)
        for part in range(count * number // len(photos), count * (number + 1) // len(photos)):
            side = int(rng.uniform(0.3, 1.0) * min(picture.size))
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
            cut = picture.crop((left, top, left + side, top + int(side * rng.uniform(0.7, 1.0))))
            longest = int(rng.choice(CUT_SIDES))
            cut.thumbnail((longest, longest), Image.Resampling.BICUBIC)
            made.append(folder / f"{path.stem}-cut{part:03}.jpg")
            cut.save(made[-1], quality=int(rng.choice(CUT_QUALITIES)))
    return made
