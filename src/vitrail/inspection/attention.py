"""What a transformer attends to: maps over the picture, rollout through the layers, how far each head looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.layers.attention import attention_sites, record_attention
from vitrail.models import Model

Grid = tuple[int, int, int]


class NoSingleMapError(ValueError):
    """Attention within windows, between stages or to fewer keys than queries: no map of all tokens by all tokens."""


@dataclass(frozen=True)
class AttentionView:
    """Where a model looked in b pictures: maps (b, t, h, w) over the token grid, attention shares that sum to 1 at most.

    last: the last layer, averaged over heads; rollout: all layers combined; asking: the token whose attention is shown;
    distances: per layer (b, heads) mean attention distance in pixels.
    """

    last: Float[Tensor, "b t h w"]
    rollout: Float[Tensor, "b t h w"]
    asking: str
    distances: dict[str, Float[Tensor, "b k"]]


def rollout(maps: Sequence[Float[Tensor, "b k n n"]], residual: bool = True) -> Float[Tensor, "b n n"]:
    """Attention from the last layer's tokens (rows) to the input's (columns) through all layers, first layer first in `maps`.

    Heads are averaged and the layers' matrices multiplied (Abnar & Zuidema, arXiv 2005.00928). With `residual` each matrix is
    0.5 A + 0.5 I for the skip connection, as they define it; the ViT paper's description (D.8) has no such term.
    Raises ValueError without maps.
    """
    if not maps:
        raise ValueError("rollout needs the attention maps of at least one layer")
    joint: Tensor | None = None
    for weights in maps:
        layer = weights.float().mean(1)
        if residual:
            layer = 0.5 * layer + 0.5 * torch.eye(layer.shape[-1], device=layer.device)
        joint = layer if joint is None else layer @ joint
    assert joint is not None
    return joint


def patch_attention(weights: Float[Tensor, "b m n"], grid: Grid, prefix: int, query: int | None) -> Float[Tensor, "b t h w"]:
    """One row of attention laid out over the patches: that of token number `query`, or the mean over the patch tokens if None.

    The shares that go to the `prefix` tokens are left out, so a map sums to 1 less them.
    """
    row = weights[:, prefix:].mean(1) if query is None else weights[:, query]
    return row[:, prefix:].unflatten(1, grid)


def attention_distance(
    weights: Float[Tensor, "b k n n"], grid: Grid, patch: tuple[int, int], prefix: int
) -> Float[Tensor, "b k"]:
    """Mean distance in pixels between a patch and the patches it attends to, weighted by attention, per picture and head.

    patch is its (height, width) in pixels; prefix tokens neither ask nor count, and the rest is normalised to 1 (ViT paper,
    figure 7 right and D.7). Frames of a clip lie on top of each other: the distance is within the picture.
    """
    frames, rows, columns = grid
    device = weights.device
    y = torch.arange(rows, device=device).repeat_interleave(columns).repeat(frames) * float(patch[0])
    x = torch.arange(columns, device=device).repeat(rows * frames) * float(patch[1])
    apart = torch.hypot(y[:, None] - y, x[:, None] - x)
    among = weights[:, :, prefix:, prefix:].float()
    return ((among * apart).sum(-1) / among.sum(-1).clamp_min(1e-12)).mean(-1)


@torch.no_grad()
def look(model: Model, images: Float[Tensor, "b c *t h w"]) -> AttentionView | None:
    """Run `model` on normalised pictures and collect what it attends to; None for a model without attention.

    The map is asked by the token that the classifier reads: the class token, the pooling query, or, for mean pooling, all
    patches alike. Raises NoSingleMapError where attention is not global, so that no such map exists.
    """
    if not attention_sites(model):
        return None
    was_training = model.training
    model.eval()
    try:
        with record_attention(model) as maps:
            features = model.features(images)
            model.pool(features)
    finally:
        model.train(was_training)
    tokens = features.tokens.shape[1]
    layers = {name: weights for name, weights in maps.items() if weights.shape[-2:] == (tokens, tokens)}
    pooling = [weights for weights in maps.values() if weights.shape[-2] == 1]
    if len(layers) + len(pooling) < len(maps):
        raise NoSingleMapError(f"attention of {model.family} models is not global: there is no single map of all tokens")
    joint, last = rollout(list(layers.values())), list(layers.values())[-1].float().mean(1)
    query: int | None = 0
    if pooling:
        asking = "the pooling query"
        last = pooling[-1].float().mean(1)
        joint = last @ joint
    elif model.config.pool.startswith("cls"):
        asking = "the class token"
    else:
        asking, query = "the mean over all patches", None
    patch = (images.shape[-2] // features.grid[1], images.shape[-1] // features.grid[2])
    return AttentionView(
        last=patch_attention(last, features.grid, features.prefix, query),
        rollout=patch_attention(joint, features.grid, features.prefix, query),
        asking=asking,
        distances={name: attention_distance(w, features.grid, patch, features.prefix) for name, w in layers.items()},
    )
