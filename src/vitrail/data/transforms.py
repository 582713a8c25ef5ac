"""From pictures to model input: evaluation fits, training crops, and the normalisation that runs on the device.

The exact paths give the pixels of torchvision's v2 transforms (antialiased Resize, CenterCrop, pad, resized_crop). All work
is done by torch's uint8 resampling on channels-last memory, several times faster than on planes or in float: measured by
`python -m benchmarks.data`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config import AugmentConfig, ConfigError, Interpolation, Preprocess
from vitrail.data.images import MAX_PIXELS, DecodeMode, ImageData, as_tensor, open_image, orient
from vitrail.data.opened import ImageError, OpenImage, Pixels

# A picture is decoded smaller only if this much more than the result's size is left: the last step of the reduction is then
# made by the same filter as in the exact path, which brings the pixels of both much closer.
_MARGIN = 1.3
_TRIES = 10  # of drawing a crop that fits, as in torchvision's RandomResizedCrop


class Box(NamedTuple):
    """A part of a picture in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class Normalise(nn.Module):
    """uint8 pictures (b, c, h, w) or clips (b, c, t, h, w) to float32 on its own device: (x / 255 - mean) / std.

    It travels into exports.

    Raises ConfigError when mean or std has neither one entry nor one per channel, or a std is not positive.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
            if len(values) not in (1, preprocess.channels):
                raise ConfigError(f"{name} has {len(values)} values, but there are {preprocess.channels} channels")
        if min(preprocess.std) <= 0:
            raise ConfigError(f"std must be positive, given {preprocess.std}")
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images: UInt8[Tensor, "b c *t h w"]) -> Float32[Tensor, "b c *t h w"]:
        """float32 in the memory layout of `images`."""
        shift, scale = (v if images.ndim == 4 else v.unsqueeze(2) for v in (self.shift, self.scale))
        return torch.addcmul(shift, images.float(), scale)


def resize_fit(image: UInt8[Tensor, "c h w"], preprocess: Preprocess) -> UInt8[Tensor, "c H W"]:
    """The evaluation fit of one picture: the pixels of torchvision v2's Resize(antialias) with CenterCrop, pad, or neither."""
    return frame_picture(resize_picture(image, preprocess), preprocess)


def resize_picture(image: UInt8[Tensor, "c h w"], preprocess: Preprocess) -> UInt8[Tensor, "c H W"]:
    """The first half of `resize_fit`: the size from which the centre is cut, or that is put on a border."""
    resized = fitted_size((image.shape[1], image.shape[2]), preprocess)
    return _resize(_channels_last(image), resized, preprocess.interpolation)[0]


def decode_for_eval(
    data: ImageData, preprocess: Preprocess, mode: DecodeMode = "exact", max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "c H W"]:
    """Decode and fit one picture for evaluation or prediction.

    mode "scaled" decodes a JPEG at 1/2, 1/4 or 1/8 where that leaves at least the resized size. Raises ImageError.
    """
    image = open_image(data, channels=preprocess.channels, max_pixels=max_pixels)
    size, whole = fitted_size(image.size, preprocess), Box(0, 0, *image.size)
    return frame_picture(_decode_part(image, whole, size, preprocess.interpolation, mode), preprocess)


def decode_for_train(
    data: ImageData,
    preprocess: Preprocess,
    augment: AugmentConfig,
    generator: torch.Generator,
    mode: DecodeMode = "scaled",
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "c H W"]:
    """Decode one picture, cut a random part (RandomResizedCrop) and resize it; the evaluation fit where crop is "none".

    The part is drawn from the header's size, so that mode "scaled" decodes no more detail than the part needs.
    Raises ImageError.
    """
    if augment.crop == "none":
        return decode_for_eval(data, preprocess, mode, max_pixels)
    image = open_image(data, channels=preprocess.channels, max_pixels=max_pixels)
    return decode_box(image, random_box(image.size, augment, generator), preprocess, mode)


def decode_box(image: OpenImage, box: Box, preprocess: Preprocess, mode: DecodeMode = "scaled") -> UInt8[Tensor, "c H W"]:
    """The part `box` of an opened picture, resized to the input size: torchvision v2's resized_crop when exact.

    mode "scaled" decodes only the rows and the detail that the part needs; it may then begin up to 7 pixels further up or
    left, less than one pixel of the result.
    """
    return _decode_part(image, box, preprocess.image_size, preprocess.interpolation, mode)


def random_box(size: tuple[int, int], augment: AugmentConfig, generator: torch.Generator) -> Box:
    """A box within (height, width) of random area (crop_scale) and shape (crop_ratio, width / height), log-uniform.

    "Inception crop", Szegedy et al. 2014, section 6; drawn as torchvision's RandomResizedCrop does.
    """
    height, width = size
    low, high = augment.crop_ratio
    for _ in range(_TRIES):
        area, ratio, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (augment.crop_scale[0] + area * (augment.crop_scale[1] - augment.crop_scale[0]))
        ratio = math.exp(math.log(low) + ratio * (math.log(high) - math.log(low)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
    h, w = height, width  # the picture is too long for any drawn shape: the largest centre part of an allowed shape
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def fitted_size(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) that a picture of this size is resized to before cropping or padding.

    Raises ImageError where that would be a monstrous picture: a few pixels high and a hundred thousand wide, cut to a square.
    """
    (height, width), (out_h, out_w) = size, preprocess.image_size
    if preprocess.fit == "stretch":
        return out_h, out_w
    if preprocess.fit == "pad":
        if out_h * width <= out_w * height:
            return out_h, min(out_w, max(1, round(out_h * width / height)))
        return min(out_h, max(1, round(out_w * height / width))), out_w
    cover_h, cover_w = math.floor(out_h / preprocess.crop_fraction), math.floor(out_w / preprocess.crop_fraction)
    if cover_h * width >= cover_w * height:  # the height is what binds; the other side is rounded down as v2's Resize does
        resized = cover_h, int(cover_h * width / height)
    else:
        resized = int(cover_w * height / width), cover_w
    if math.prod(resized) > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are too long a shape to be cut to {out_w} x {out_h}")
    return resized


def frame_picture(image: UInt8[Tensor, "c h w"], preprocess: Preprocess, place: float = 0.5) -> UInt8[Tensor, "c H W"]:
    """Cut the centre or centre on a border; nothing to do where the size is right.

    place: where along the longer side to cut instead, 0 (left or top) to 1 (right or bottom).
    """
    height, width = image.shape[1:]
    out_h, out_w = preprocess.image_size
    if (height, width) == (out_h, out_w):
        return image
    if height >= out_h and width >= out_w:
        down, right = (place, 0.5) if height - out_h > width - out_w else (0.5, place)
        top, left = round((height - out_h) * down), round((width - out_w) * right)
        return image[:, top : top + out_h, left : left + out_w]
    framed = _channels_last(image.new_full((image.shape[0], out_h, out_w), preprocess.pad_value))[0]
    top, left = (out_h - height) // 2, (out_w - width) // 2
    framed[:, top : top + height, left : left + width] = image
    return framed


def _decode_part(
    image: OpenImage, box: Box, size: tuple[int, int], interpolation: Interpolation, mode: DecodeMode
) -> UInt8[Tensor, "c H W"]:
    """A part of the shown picture, resized to `size`. It is turned last, when there is least to turn."""
    orientation = image.orientation
    if orientation >= 5:
        size = (size[1], size[0])
    top, left, height, width = _as_stored(box, image) if orientation > 1 else box
    if mode == "exact":
        pixels, reduction = image.decode(rows=top + height)
        # torchvision resizes along the shown width first; in a picture that lies on its side, that is the stored height.
        rows_first = orientation >= 5
    else:
        pixels, reduction = image.decode(_MARGIN * max(size[0] / height, size[1] / width), top + height)
        rows_first = size[0] < height
    if reduction == 1:
        resized = _resize(_cut(pixels, top, left, height, width), size, interpolation, rows_first)
    else:
        # A whole number of reduced pixels at the start, a fraction allowed at the end: then nothing is shifted.
        extent = (height / reduction, width / reduction)
        part = _cut(pixels, top // reduction, left // reduction, math.ceil(extent[0]), math.ceil(extent[1]))
        resized = _resize_reduced(part, size, interpolation, extent)
    if orientation == 1:
        return resized[0]
    return as_tensor(orient(resized[0].permute(1, 2, 0).numpy(), orientation))


def _as_stored(box: Box, image: OpenImage) -> Box:
    """A box of the shown picture in stored pixels: the inverse of `orient`."""
    (top, left, height, width), (shown_h, shown_w) = box, image.size
    if image.orientation in (3, 4, 7, 8):
        top = shown_h - top - height
    if image.orientation in (2, 3, 6, 7):
        left = shown_w - left - width
    return Box(left, top, width, height) if image.orientation >= 5 else Box(top, left, height, width)


def _cut(pixels: Pixels, top: int, left: int, height: int, width: int) -> UInt8[Tensor, "1 c H W"]:
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    return _one(torch.from_numpy(part if part.flags.writeable else part.copy()))


def _channels_last(image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "1 c h w"]:
    return _one(image.permute(1, 2, 0).contiguous())


def _one(pixels: UInt8[Tensor, "h w c"]) -> UInt8[Tensor, "1 c h w"]:
    """A batch of one that is plainly channels-last: with another batch stride torch repacks its result, at half the speed."""
    h, w, c = pixels.shape
    return pixels.as_strided((1, c, h, w), (c * h * w, 1, w * c, c))


def _resize(
    images: UInt8[Tensor, "1 c h w"], size: tuple[int, int], interpolation: Interpolation, rows_first: bool = False
) -> UInt8[Tensor, "1 c H W"]:
    """Antialiased resize. torch, and so torchvision v2, works along the width first; where a picture shrinks, the rows first
    is faster, as it leaves less to do for the slower of the two passes."""
    height, width = images.shape[2:]
    if (height, width) == size:
        return images
    antialias = interpolation != "nearest"
    if rows_first and height != size[0]:
        images = F.interpolate(images, size=(size[0], width), mode=interpolation, antialias=antialias)
    return F.interpolate(images, size=size, mode=interpolation, antialias=antialias)


def _resize_reduced(
    images: UInt8[Tensor, "1 c h w"], size: tuple[int, int], interpolation: Interpolation, extent: tuple[float, float]
) -> UInt8[Tensor, "1 c H W"]:
    """As `_resize` with rows first, for a picture whose last row and column are partial: it covers `extent` (height, width)."""
    antialias = interpolation != "nearest"
    for axis in (0, 1):
        # The size of the result is cut off, not rounded: without the small addition it could come out one short.
        scale = [1.0, 1.0]
        scale[axis] = (size[axis] + 1e-3) / extent[axis]
        images = F.interpolate(
            images, scale_factor=scale, mode=interpolation, antialias=antialias, recompute_scale_factor=False
        ).narrow(2 + axis, 0, size[axis])
    return images
