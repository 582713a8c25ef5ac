"""Which parts of the input an answer rests on, by gradients: Grad-CAM for any family, and rollout weighted by gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.inspection.attention import ADDED, Blend, NoPathError, Placed, place, rollout
from vitrail.inspection.layers import evaluating
from vitrail.layers.attention import record_attention
from vitrail.layers.features import Features
from vitrail.layers.route import Route, tile
from vitrail.models import Model
from vitrail.models.base import intercept_blocks


def grad_cam(model: Model, inputs: Float[Tensor, "b c *t h w"], classes: Int64[Tensor, " b"]) -> Placed:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391) of a class per input: channels of the last map weighted by their mean
    gradient, negative sums set to 0.

    The map is that of `features`, which a pooled mean reads. Where a class token or a temporal encoder reads instead, the
    patches have no gradient there, and the tokens that the last attention over places reads are taken.
    """
    route = model.attention_route(tuple(inputs.shape[2:]))
    with evaluating(model), torch.enable_grad():
        if _read_by_attention(route):
            return _at_last_attention(model, inputs, classes, route)
        with torch.no_grad():
            features: Features = model.features(inputs)
        tokens = features.tokens.detach().requires_grad_()
        logits = model.head(model.pool(features._replace(tokens=tokens)))
        gradient = _gradient(logits, classes, tokens)
        patches = features._replace(tokens=tokens.detach()).patches
        cells = route.steps[-1].after if route.readout else tile(features.grid, inputs.shape[2:])
        if cells.grid != features.grid:  # behind a pooling query
            cells = tile(features.grid, inputs.shape[2:])
        cells = cells._replace(prefix=0)
        return place(_weighted(patches, gradient[:, features.prefix :]), cells)


def _read_by_attention(route: Route) -> bool:
    """Whether the classifier's tokens have no place, or lie on a grid of frames, and no pooling query asked the patches."""
    if not route.readout or route.steps[-1].shortcut is None:
        return False
    after = route.steps[-1].after
    main = next(iter(route.readout.values()))
    return bool(main[: after.prefix].sum() > 0) or math.prod(after.grid[1:]) == 1


def _at_last_attention(model: Model, inputs: Tensor, classes: Tensor, route: Route) -> Placed:
    last = max(i for i, step in enumerate(route.steps) if step.sites and math.prod(step.after.grid[1:]) > 1)
    site, before = route.steps[last].sites[0].name, route.steps[last - 1].after if last else route.first
    seen: list[Tensor] = []

    def around(name: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        if site.startswith(f"{name}."):
            x = x.detach().requires_grad_()
            seen.append(x)
        return block(x, *args)

    with intercept_blocks(model, around):
        logits = model.head(model.pool(model.features(inputs)))
    (tokens,) = seen
    gradient = _gradient(logits, classes, tokens)
    batch = inputs.shape[0]
    if tokens.shape[0] > batch:  # every frame is a row of its own, with its class token in front
        own = before.prefix // before.grid[0]
        tokens, gradient = (x[:, own:].reshape(batch, -1, x.shape[2]) for x in (tokens, gradient))
    else:
        tokens, gradient = tokens[:, before.prefix :], gradient[:, before.prefix :]
    cells = before._replace(prefix=0)
    return place(_weighted(tokens.detach(), gradient), cells)


def _gradient(logits: Tensor, classes: Tensor, at: Tensor) -> Tensor:
    chosen = logits.gather(1, classes[:, None].to(logits.device)).sum()
    return torch.autograd.grad(chosen, at)[0]


def _weighted(tokens: Float[Tensor, "b n c"], gradient: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    return (tokens.float() * gradient.float().mean(1, keepdim=True)).sum(2).relu()


def gradient_rollout(model: Model, inputs: Float[Tensor, "b c *t h w"], classes: Int64[Tensor, " b"]) -> Placed:
    """Rollout of attention weighted by how much each share raises the logit of a class per input.

    A layer counts as the mean over heads of the positive part of attention times gradient, added to the shortcut (Chefer et
    al., arXiv 2103.15679, equations 5 and 6); what the shortcut alone would give is subtracted, so that the map shows what
    attention brought. Not shares: only relations within a map have a meaning. Raises NoPathError as `look`, and for a model
    without attention.
    """
    route = model.attention_route(tuple(inputs.shape[2:]))
    if not route.readout:
        raise NoPathError(f"there is no path of attention through this {model.family} model")
    rows = next(iter(route.readout.values()))[None, None]
    with evaluating(model), torch.enable_grad(), record_attention(model, grad=True) as maps:
        # Weights that are frozen give no gradient; the input always does.
        logits = model.head(model.pool(model.features(inputs.detach().requires_grad_())))
        chosen = logits.gather(1, classes[:, None].to(logits.device)).sum()
        names = [name for name in route.sites if maps[name].requires_grad]
        found = torch.autograd.grad(chosen, [maps[name] for name in names], allow_unused=True)
    relevant = {}
    for name, gradient in zip(names, found, strict=True):
        weights = maps[name].detach()
        relevant[name] = (weights * (torch.zeros_like(weights) if gradient is None else gradient)).clamp_min(0).mean(1)
    with torch.no_grad():
        brought = rollout(route, relevant, rows, ADDED)
        if route.steps[-1].shortcut is not None:
            brought = brought - rollout(route, {n: torch.zeros_like(w) for n, w in relevant.items()}, rows, Blend(0.0, 1.0))
    return place(brought[:, 0].clamp_min(0), route.first)
