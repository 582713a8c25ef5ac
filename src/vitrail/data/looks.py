"""What `data check` keeps of each sample: enough to find what is broken, copied, or of an odd size."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vitrail.data.clips import stretch
from vitrail.data.footage import Footage, open_footage
from vitrail.data.images import decode_image, image_size, read_file
from vitrail.data.samples import ImageDataset
from vitrail.data.stores import Picture
from vitrail.data.video import Video

THUMB = 32  # pixels


class Look(NamedTuple):
    """digest: 16 bytes of the content. size: (height, width). thumb: uint8 (3, 32, 32) of a picture. part: which part of a
    video. damage: what of a video could not be decoded; "" where all of it could."""

    digest: bytes
    size: tuple[int, int]
    thumb: Tensor | None = None
    part: str = ""
    damage: str = ""


def look_at(dataset: ImageDataset, index: int, channels: int) -> Look:
    """Decode one sample, all frames of a video. Raises OSError or ValueError with the reason where nothing can be read."""
    sample = dataset.read(index)
    if isinstance(sample, Footage):
        return _video(sample, dataset.key(index), repr(dataset.store.part(int(dataset.rows[index]))), dataset.max_pixels)
    return _picture(sample, channels, dataset.max_pixels)


def _video(footage: Footage, key: bytes, part: str, max_pixels: int) -> Look:
    with open_footage(footage, max_pixels=max_pixels) as opened:
        first, times, _ = stretch(opened, footage)
        for _ in opened.frames(range(first, first + len(times))):
            pass
        lost = opened.repaired if isinstance(opened, Video) else 0
        return Look(key, opened.size, part=part, damage=f"{lost} of {len(times)} frames cannot be decoded" if lost else "")


def _picture(picture: Picture, channels: int, max_pixels: int) -> Look:
    if isinstance(picture, str):
        picture = read_file(picture)
    if isinstance(picture, bytes):
        raw = picture
    else:
        raw = np.ascontiguousarray(picture).tobytes() if isinstance(picture, Image.Image) else picture.numpy().tobytes()
    size = image_size(picture)
    image = decode_image(picture, channels=channels, mode="scaled", min_size=(2 * THUMB, 2 * THUMB), max_pixels=max_pixels)
    image = image[:3] if channels >= 3 else image[:1].expand(3, -1, -1)
    thumb = F.interpolate(image[None], (THUMB, THUMB), mode="bilinear", antialias=True)[0]
    return Look(hashlib.blake2b(raw, digest_size=16).digest(), size, thumb.contiguous())
