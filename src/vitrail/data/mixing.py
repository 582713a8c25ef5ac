"""Mixup and CutMix: pairs of pictures blended or pasted into each other, and their targets with them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vitrail.config import AugmentConfig


def mix_batch(
    images: Float[Tensor, "b c *t h w"], targets: Float[Tensor, "b k"], augment: AugmentConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "b c *t h w"], Float[Tensor, "b k"]]:
    """Mix every picture with another one of the batch, by mixup or CutMix, each with its own share; clips frame by frame alike.

    targets: one-hot, smoothed or multi-label rows; they are averaged by the share of each picture. A picture is mixed with
    probability mix_probability, by CutMix with probability mix_switch where both are on; its share is drawn from
    Beta(alpha, alpha). Everything is decided by `generator`. Nothing happens with both alphas 0 or a single picture.
    Sources: mixup, Zhang et al. 2017; CutMix, Yun et al. 2019, algorithm A1.
    """
    count, (height, width) = len(images), images.shape[-2:]
    if count < 2 or not (augment.mixup or augment.cutmix):
        return images, targets
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)))
    partners = torch.arange(count, device=images.device).roll(int(rng.integers(1, count)))
    mixed = rng.random(count) < augment.mix_probability
    cut = rng.random(count) < (augment.mix_switch if augment.mixup and augment.cutmix else bool(augment.cutmix))
    shares = np.where(cut, _beta(rng, augment.cutmix, count), _beta(rng, augment.mixup, count))
    shares = np.where(mixed, shares, 1.0)
    boxes = cut_boxes(rng, shares, (height, width))
    boxes[~cut] = 0
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    shares = np.where(cut, 1 - areas / (height * width), shares)  # what is left after the box was cut off at the border
    return mix(images, targets, partners, shares, boxes)


def mix(
    images: Float[Tensor, "b c *t h w"],
    targets: Float[Tensor, "b k"],
    partners: Int64[Tensor, " b"],
    shares: Float64[np.ndarray, " b"],
    boxes: Int64[np.ndarray, "b 4"],
) -> tuple[Float[Tensor, "b c *t h w"], Float[Tensor, "b k"]]:
    """Sample i takes box i (top, bottom, left, right) from sample `partners[i]`; where that is empty, the two are blended.

    shares: the part of each sample that stays its own, 0..1, in the picture and in the target.
    """
    height, width = images.shape[-2:]
    top, bottom, left, right = torch.from_numpy(boxes).to(images.device)[:, :, None, None].unbind(1)
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # b h w
    own = torch.from_numpy(shares).to(images.device, images.dtype)[:, None, None]
    pasted = (bottom > top) & (right > left)
    weight = torch.where(pasted, (~inside).to(images.dtype), own)
    own = own[:, 0].to(targets.dtype)
    weight = weight.view(len(images), *[1] * (images.ndim - 3), *weight.shape[1:])
    return torch.lerp(images[partners], images, weight), torch.lerp(targets[partners], targets, own)


def cut_boxes(rng: np.random.Generator, shares: Float64[np.ndarray, " b"], size: tuple[int, int]) -> Int64[np.ndarray, "b 4"]:
    """Boxes (top, bottom, left, right) of area 1 - share, shaped like the picture, centred anywhere, cut off at its border."""
    edges = []
    for side in size:
        half = (side * np.sqrt(1 - shares) / 2).astype(np.int64)
        centre = rng.integers(0, side, len(shares))
        edges += [np.clip(centre - half, 0, side), np.clip(centre + half, 0, side)]
    return np.stack(edges, 1)


def _beta(rng: np.random.Generator, alpha: float, count: int) -> np.ndarray:
    return rng.beta(alpha, alpha, count) if alpha > 0 else np.ones(count)
