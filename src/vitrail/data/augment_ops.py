"""Picture operations on uint8 batches (n, c, h, w), each sample with its own parameter.

The results are those of torchvision v2's functions of the same name at the same parameter, to within one grey level. A
sample's result does not depend on its batch mates, bit for bit: nothing here is left to a kernel that may choose its order of
summation by the size of the batch, and sums are taken in integers.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torch.nn import functional as F

Batch = UInt8[Tensor, "n c h w"]
PerSample = Float64[np.ndarray, "n"]
Parameter: TypeAlias = PerSample | float

BLUR_RADIUS = 6  # pixels: three standard deviations of the widest blur, sigma 2


def luma(images: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Brightness as seen by the eye (ITU-R BT.601), rounded, in integers: the same on every device."""
    red, green, blue = images.to(torch.int32).split(1, 1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)


def grayscale(images: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 3 h w"]:
    """Three equal channels."""
    return luma(images).expand(-1, 3, -1, -1)


def brightness(images: Batch, factor: PerSample) -> Batch:
    """0 gives black, 1 the picture."""
    return _to_uint8(images * _column(factor, images))


def contrast(images: Batch, factor: PerSample) -> Batch:
    """0 gives the picture's mean luma (for other than three channels, the mean of all), 1 the picture."""
    source = luma(images) if images.shape[1] == 3 else images
    count = source[0].numel()
    mean = (source.sum((1, 2, 3), dtype=torch.int64, keepdim=True).double() / count).float()
    return _blend(images, mean, factor)


def saturation(images: UInt8[Tensor, "n 3 h w"], factor: PerSample) -> UInt8[Tensor, "n 3 h w"]:
    """0 gives grey, 1 the picture."""
    return _blend(images, luma(images), factor)


def sharpness(images: Batch, factor: PerSample) -> Batch:
    """0 gives a 3 x 3 smoothing, 1 the picture, 2 the detail doubled. The outermost pixels stay."""
    if min(images.shape[2:]) <= 2:
        return images
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    inner = wide[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth = (2 * total + 13).div(26, rounding_mode="floor")  # the nearest whole number to total / 13
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = _to_uint8(inner + (smooth - inner) * _column(1 - factor, images))
    return result


def posterize(images: Batch, bits: int) -> Batch:
    """Only the upper `bits` of the eight are kept."""
    return images & (0xFF << (8 - bits) & 0xFF)


def solarize(images: Batch, threshold: int | float) -> Batch:
    """Values of at least `threshold` are inverted."""
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Batch) -> Batch:
    """Each channel stretched to 0..255; a flat one stays."""
    pixels = images.float()
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    step = torch.where(high == low, 1.0, (high - low) * (1 / 255))
    return _to_uint8((pixels - torch.where(high == low, 0.0, low)) / step)


def equalize(images: Batch) -> Batch:
    """Each channel's values spread evenly over 0..255, by Pillow's integer rule; a channel of nearly one value stays."""
    n, c, h, w = images.shape
    values = images.reshape(n * c, h * w).long()
    counts = torch.zeros(n * c, 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, values, torch.ones((), dtype=torch.int64, device=images.device).expand_as(values))
    below = counts.cumsum(1)
    brightest = counts.gather(1, values.amax(1, keepdim=True))
    step = (h * w - brightest).div(255, rounding_mode="floor")  # pixels per grey level of the result
    table = (F.pad(below, (1, -1)) + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255).to(torch.uint8)
    return torch.where(step > 0, table.gather(1, values), images.reshape(n * c, h * w)).view(n, c, h, w)


def gaussian_blur(images: Batch, sigma: PerSample) -> Batch:
    """Gaussian of `sigma` pixels, cut at 6 pixels, borders mirrored."""
    offsets = np.arange(BLUR_RADIUS + 1)
    taps = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    taps /= taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdims=True)
    weights = [_column(column, images) for column in taps.T]
    blurred = images.float()
    for axis in (2, 3):
        size = blurred.shape[axis]
        padded = _mirror(blurred, axis)
        blurred = padded.narrow(axis, BLUR_RADIUS, size) * weights[0]
        for offset in range(1, BLUR_RADIUS + 1):
            pair = padded.narrow(axis, BLUR_RADIUS - offset, size) + padded.narrow(axis, BLUR_RADIUS + offset, size)
            blurred += pair.mul_(weights[offset])
    return blurred.round_().to(torch.uint8)


def _mirror(images: Tensor, axis: int) -> Tensor:
    """The borders mirrored about the outermost pixels, repeatedly where the picture is small."""
    size = images.shape[axis]
    period = max(2 * size - 2, 1)
    places = torch.arange(-BLUR_RADIUS, size + BLUR_RADIUS, device=images.device) % period
    return images.index_select(axis, torch.minimum(places, period - places) % size)


def warp(images: Batch, matrices: Float64[np.ndarray, "n 3 3"], bends: Float64[np.ndarray, "n 2 k k"] | None = None) -> Batch:
    """Each sample moved by its matrix, bilinear, black outside.

    A matrix takes column vectors (x, y, 1) of the picture to their new place, in pixels from the picture's centre. Where
    `bends` are given, a pixel is fetched from further away by (x, y) pixels, known on a coarse grid from corner to corner and
    bicubic between (U-Net, arXiv 1505.04597, section 3.1).
    """
    height, width = images.shape[2:]
    back = torch.from_numpy(np.linalg.inv(matrices).astype(np.float32)).to(images.device)[:, :2, :, None, None]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    places = back[:, :, 0] * x + (back[:, :, 1] * y + back[:, :, 2])  # n 2 h w
    if bends is not None:
        coarse = torch.from_numpy(bends.astype(np.float32)).to(images.device)
        places += F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    grid = torch.stack([places[:, 0] / (width / 2), places[:, 1] / (height / 2)], 3)
    return (
        F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False).round_().to(torch.uint8)
    )


def affine_matrices(
    angle: Parameter = 0.0,
    translate: tuple[Parameter, Parameter] = (0.0, 0.0),
    scale: Parameter = 1.0,
    shear: tuple[Parameter, Parameter] = (0.0, 0.0),
    centre: tuple[Parameter, Parameter] = (0.0, 0.0),
) -> Float64[np.ndarray, "n 3 3"]:
    """Matrices for `warp`: shear along x, along y, scale and turn about `centre`, then move; as torchvision's affine().

    angle and shear in radians, angle clockwise; translate and centre (x, y) in pixels, centre counted from the middle.
    """
    parts = np.broadcast_arrays(*np.atleast_1d(angle, *translate, scale, *shear, *centre))
    angle, right, down, scale, shear_x, shear_y, x, y = (part.astype(np.float64) for part in parts)
    one, zero = np.ones_like(angle), np.zeros_like(angle)

    def stack(*rows: list[np.ndarray]) -> np.ndarray:
        return np.moveaxis(np.array([*rows, [zero, zero, one]]), 2, 0)

    there = stack([one, zero, right + x], [zero, one, down + y])
    turn = stack([scale * np.cos(angle), -scale * np.sin(angle), zero], [scale * np.sin(angle), scale * np.cos(angle), zero])
    lean_y = stack([one, zero, zero], [-np.tan(shear_y), one, zero])
    lean_x = stack([one, -np.tan(shear_x), zero], [zero, one, zero])
    back = stack([one, zero, -x], [zero, one, -y])
    return there @ turn @ lean_y @ lean_x @ back


def _blend(images: Tensor, other: Tensor, factor: PerSample) -> Tensor:
    return _to_uint8(images * _column(factor, images) + other * _column(1 - factor, images))


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True)[:, None, None, None]
