"""A video transformer that starts from an image ViT (ViViT, section 3.4; TimeSformer's loader)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.config import unknown
from vitrail.layers.position import PositionTable, VideoPosition, resize_grid
from vitrail.models import Model
from vitrail.models.timesformer import SCHEMES, TimeSformer
from vitrail.models.vit import ViT
from vitrail.models.vivit import ViViT

from .mapping import CheckpointError, State

KERNELS = ("central_frame", "average", "rank_pooling")


def inflate_kernel(kernel: Float[Tensor, "d c h w"], frames: int, how: str = "central_frame") -> Float[Tensor, "d c t h w"]:
    """A patch kernel as a tubelet kernel.

    central_frame: the frame t // 2 alone, the others zero (the paper's choice); average: kernel / t on every frame, "filter
    inflation"; rank_pooling: frames weighted as approximate rank pooling weights them (arXiv 1612.00738), scenic's
    average_arp_frame. Raises ValueError for another word.
    """
    if how not in KERNELS:
        raise unknown("kernel", how, KERNELS)
    weights = torch.zeros(frames, dtype=kernel.dtype)
    if how == "central_frame":
        weights[frames // 2] = 1
    elif how == "average":
        weights[:] = 1 / frames
    else:
        for i in range(frames):
            later = sum((2 * k - frames - 1) / k for k in range(i + 1, frames + 1))
            weights[i] = later / frames
    return kernel[:, :, None] * weights[:, None, None]


@torch.no_grad()
def inflate(
    image: ViT, video: Model, *, kernel: str = "central_frame", resize: str | None = None, time_from_space: bool = True
) -> list[str]:
    """Put an image ViT's weights into a ViViT or TimeSformer of the same width; returns the names left as they were.

    Positions are resized to the video's grid of patches (`resize`: by this rule instead of the image model's) and repeated
    over time. As published, these stay at their initial values: the head, tables of times, the temporal encoder and the
    class tokens of ViViT's factorised encoder, the time norms of factorised self-attention, and TimeSformer's zero linear
    layers after the new attentions. New attentions over time (or blocks, or rows) start as copies of the image model's;
    `time_from_space` off leaves ViViT's at random.
    Raises CheckpointError for models whose parts do not fit each other.
    """
    state = _translate(image, video, kernel, resize, time_from_space)
    wanted = video.state_dict()
    for key, tensor in state.items():
        if key not in wanted or wanted[key].shape != tensor.shape:
            there = tuple(wanted[key].shape) if key in wanted else "no such part"
            raise CheckpointError(f"the image model's {key} is {tuple(tensor.shape)}, the video model has {there}")
    video.load_state_dict(state, strict=False)
    return [key for key in wanted if key not in state]


def matching_settings(image: ViT) -> dict[str, Any]:
    """Fields of a video config that the image model decides: the function of its blocks and its channels."""
    c = image.config
    return {name: getattr(c, name) for name in ("norm_eps", "activation", "qkv_bias", "in_channels")}


def _translate(image: ViT, video: Model, kernel: str, resize: str | None, time_from_space: bool) -> State:
    if not isinstance(video, (ViViT, TimeSformer)):
        raise CheckpointError(f"no image model can become a {video.family}; those that can: vivit, timesformer")
    _check(image, video)
    source, out = image.state_dict(), State()
    for key, tensor in source.items():
        part = key.split(".")
        if part[0] == "blocks":
            out |= _block_keys(key, tensor, video, time_from_space)
        elif part[0] in ("embed", "norm"):
            out[key] = tensor
    if isinstance(video, ViViT):
        out["embed.proj.weight"] = inflate_kernel(source["embed.proj.weight"], video.config.tubelet[0], kernel)
    encoder = isinstance(video, ViViT) and video.config.model == "factorised_encoder"
    if image.class_token is not None and video.class_token is not None and not encoder:
        out["class_token"] = source["class_token"]
    if video.position is not None and image.positions:
        out["position.table"] = _positions(image, video.position, resize)
    return out


def _block_keys(key: str, tensor: Tensor, video: ViViT | TimeSformer, time_from_space: bool) -> State:
    """Where a tensor of an image model's block goes."""
    _, number, part, *rest = key.split(".")
    block, last = f"blocks.{number}.", ".".join(rest)
    if isinstance(video, TimeSformer):
        *early, late = SCHEMES[video.config.attention]
        if part == "attn":
            return {f"{block}attn.{late}.{last}": tensor} | {f"{block}steps.{axis}.attn.{last}": tensor for axis in early}
        if part == "norm1":
            return {key: tensor} | {f"{block}steps.{axis}.norm.{last}": tensor for axis in early}
    elif video.config.model == "factorised_self_attention":
        if part == "attn":
            axes = ("space", "time") if time_from_space else ("space",)
            return {f"{block}attn.{axis}.{last}": tensor for axis in axes}
        if part == "norm1":
            return {f"{block}norm.space.{last}": tensor}
    return {key: tensor}


def _positions(image: ViT, position: VideoPosition, resize: str | None) -> Tensor:
    """The image's positions on the video's grid of patches, once per time where the table is joint."""
    table: Any = image.positions[0]
    if not isinstance(table, PositionTable):
        raise CheckpointError("relative positions have no place in a video model; nearest: position.kind='1d'")
    times, places = (position.grid[0] if position.kind == "joint" else 1), position.grid[1:]
    if resize is None:
        first, patches = table(places)
    else:
        first, patches = table(table.grid)
        patches = resize_grid(patches[0], table.grid, places, resize)[None]
    prefix = position.table[:, : position.prefix]  # without positions of its own, the class token keeps the new ones
    if first is not None and position.prefix:
        prefix = first
    return torch.cat([prefix, *[patches] * times], 1)


def _check(image: ViT, video: ViViT | TimeSformer) -> None:
    """Raise CheckpointError where the image model has parts that the video model lacks, or another size."""
    c, v = image.config, video.config
    patch = video.config.tubelet[1:] if isinstance(video, ViViT) else video.config.patch
    sizes = {"width": v.width, "depth": v.depth, "heads": v.heads, "mlp_dim": v.mlp_dim, "patch": patch}
    for name, value in sizes.items():
        if getattr(c, name) != value:
            raise CheckpointError(f"the image model has {name} {getattr(c, name)}, the video model {value}; they must agree")
    plain = {"registers": 0, "qk_norm": False, "layer_scale": None, "stem_norm": False, "patch_bias": True,
             "norm_after_pool": False, "mlp": "plain"}  # fmt: skip
    for name, value in plain.items():
        if getattr(c, name) != value:
            raise CheckpointError(f"video models have no {name}; the image model has {name}={getattr(c, name)!r}")
    if c.position.place != "stem" and c.position.kind != "none":
        raise CheckpointError(f"video models add positions at the stem, the image model at {c.position.place!r}")
