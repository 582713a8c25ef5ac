"""Pictures made worse in five steps: common corruptions, and the tests of what a model takes a picture to be.

The corruptions are chosen after Hendrycks and Dietterich (arXiv 1903.12261), as functions of tensors and scaled to the side of
the picture, so that they mean the same at 32 and at 224 pixels. Shifting, covering patches and shuffling them test inductive
biases: a convolution commutes with a shift, while a transformer knows order by its positions alone (arXiv 2105.10497).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Generator, Tensor

from vitrail.data import augment_ops as ops

Batch = UInt8[Tensor, "n c h w"]
LEVELS = (1, 2, 3, 4, 5)
Corruption = Callable[[Tensor, int, Generator], Tensor]


def corrupt(images: Batch, name: str, level: int, first: int = 0) -> Batch:
    """Pictures (uint8, n c h w) after the corruption `name` (a key of CORRUPTIONS) at level 1 to 5; level 0 gives them back.

    What is random depends on the name, the level and `first`, the number of the first picture: every model meets the same.
    """
    if not level:
        return images
    seed = zlib.crc32(f"{name} {level} {first}".encode())
    return CORRUPTIONS[name](images, level, torch.Generator().manual_seed(seed))


def _at(values: tuple[float | int, ...], level: int) -> float | int:
    return values[level - 1]


def _same(images: Tensor, value: float) -> np.ndarray:
    """One value for every picture, as the augmentation's operations take it."""
    return np.full(len(images), value)


def noise(images: Batch, level: int, generator: Generator) -> Batch:
    """Gaussian noise."""
    sigma = 255 * _at((0.04, 0.08, 0.12, 0.18, 0.26), level)
    return _bytes(images + sigma * torch.randn(images.shape, generator=generator))


def impulses(images: Batch, level: int, generator: Generator) -> Batch:
    """Single pixels black or white."""
    share = _at((0.01, 0.03, 0.06, 0.11, 0.18), level)
    drawn = torch.rand(images.shape[0], 1, *images.shape[2:], generator=generator)
    images = torch.where(drawn < share / 2, torch.zeros_like(images), images)
    return torch.where(drawn > 1 - share / 2, torch.full_like(images, 255), images)


def blur(images: Batch, level: int, generator: Generator) -> Batch:
    """A Gaussian whose width is a share of the side."""
    return ops.gaussian_blur(images, _same(images, min(images.shape[2:]) * _at((0.015, 0.025, 0.035, 0.05, 0.07), level)))


def contrast(images: Batch, level: int, generator: Generator) -> Batch:
    """Towards the picture's mean grey."""
    return ops.contrast(images, _same(images, _at((0.7, 0.5, 0.35, 0.22, 0.12), level)))


def bright(images: Batch, level: int, generator: Generator) -> Batch:
    """Overexposed."""
    return ops.brightness(images, _same(images, _at((1.25, 1.5, 1.8, 2.2, 2.8), level)))


def dark(images: Batch, level: int, generator: Generator) -> Batch:
    """Underexposed."""
    return ops.brightness(images, _same(images, _at((0.7, 0.5, 0.35, 0.22, 0.12), level)))


def jpeg(images: Batch, level: int, generator: Generator) -> Batch:
    """Written as JPEG of low quality and read again; of other than one or three channels each channel by itself."""
    quality, (n, c) = int(_at((40, 25, 15, 10, 6), level)), images.shape[:2]
    grey = c != 3
    space = "GRAY" if grey else "RGB"
    planes = images.reshape(n * c, 1, *images.shape[2:]) if grey else images
    done = []
    for picture in planes.permute(0, 2, 3, 1).contiguous().numpy():
        data = simplejpeg.encode_jpeg(picture, quality=quality, colorspace=space)
        done.append(torch.from_numpy(simplejpeg.decode_jpeg(data, colorspace=space)))
    return torch.stack(done).permute(0, 3, 1, 2).reshape(images.shape).contiguous()


def pixelate(images: Batch, level: int, generator: Generator) -> Batch:
    """Shrunk by averaging and enlarged in hard pixels."""
    h, w = images.shape[2:]
    share = _at((0.75, 0.6, 0.45, 0.33, 0.22), level)
    small = F.interpolate(images.float(), (max(round(h * share), 1), max(round(w * share), 1)), mode="area")
    return _bytes(F.interpolate(small, (h, w), mode="nearest"))


def shift(images: Batch, level: int, generator: Generator) -> Batch:
    """Moved in a random direction by a share of the side, the border mirrored."""
    h, w = images.shape[2:]
    angles = 2 * torch.pi * torch.rand(len(images), generator=generator)
    share = _at((0.03, 0.06, 0.12, 0.18, 0.25), level)
    moved = []
    for image, down, right in zip(
        images, (h * share * angles.sin()).round().int(), (w * share * angles.cos()).round().int(), strict=True
    ):
        rows, columns = (_mirrored(torch.arange(size) + int(by), size) for size, by in ((h, down), (w, right)))
        moved.append(image[:, rows][:, :, columns])
    return torch.stack(moved)


def occlusion(images: Batch, level: int, generator: Generator) -> Batch:
    """Random patches of an 8 x 8 grid covered with the picture's mean colour."""
    n, _, h, w = images.shape
    covered = round(64 * _at((0.1, 0.25, 0.4, 0.6, 0.8), level))
    chosen = torch.rand(n, 64, generator=generator).argsort(1) < covered
    mask = F.interpolate(chosen.view(n, 1, 8, 8).float(), (h, w), mode="nearest").bool()
    return torch.where(mask, _bytes(images.float().mean((2, 3), keepdim=True)), images)


def shuffle(images: Batch, level: int, generator: Generator) -> Batch:
    """Cut into a grid of 2 to 16 tiles a side, which change places at random; what does not fill a tile stays."""
    grid = min(int(_at((2, 3, 4, 8, 16), level)), min(images.shape[2:]))
    n, c, h, w = images.shape
    th, tw = h // grid, w // grid
    inner = images[:, :, : th * grid, : tw * grid]
    tiles = inner.reshape(n, c, grid, th, grid, tw).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, c, th, tw)
    order = torch.rand(n, grid * grid, generator=generator).argsort(1)
    tiles = tiles[torch.arange(n)[:, None], order].reshape(n, grid, grid, c, th, tw)
    shuffled = images.clone()
    shuffled[:, :, : th * grid, : tw * grid] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(inner.shape)
    return shuffled


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Places beyond a border counted back from it."""
    period = max(2 * size - 2, 1)
    places = places % period
    return torch.minimum(places, period - places) % size


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


COMMON: dict[str, Corruption] = {
    "noise": noise, "impulses": impulses, "blur": blur, "contrast": contrast, "bright": bright, "dark": dark, "jpeg": jpeg,
    "pixelate": pixelate,
}  # fmt: skip
BIASES: dict[str, Corruption] = {"shift": shift, "occlusion": occlusion, "shuffle": shuffle}
CORRUPTIONS: dict[str, Corruption] = {**COMMON, **BIASES}
