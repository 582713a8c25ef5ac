"""What a transformer attends to: rollout through the layers, maps over the input, how far each head looks.

Everything follows the model's route (layers/route.py), so it holds for windows, strides, pooling and folded axes as it does for
global attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.layers.attention import record_attention
from vitrail.layers.route import Cells, Route, Site, Step
from vitrail.models import Model

Maps = Mapping[str, Tensor]  # per site (b * groups, heads, n, m), or (b * groups, n, m) once averaged over heads


class NoPathError(ValueError):
    """Layers of another kind lie between a model's attention sites, so that they do not join to one map."""


class Blend(NamedTuple):
    """How much of a layer's tokens comes through its attention, and how much past it through the shortcut."""

    attention: float
    shortcut: float


RESIDUAL = Blend(0.5, 0.5)  # Abnar & Zuidema's rollout: half of every token is itself
PLAIN = Blend(1.0, 0.0)  # the ViT paper's description (appendix D.8) has no such term
ADDED = Blend(1.0, 1.0)  # Chefer et al.: what attention brings is added to what was there


class Placed(NamedTuple):
    """Shares over the cells of an input, (b, t, h, w), and where these cells lie in it."""

    shares: Float[Tensor, "b t h w"]
    cells: Cells

    def over(self, height: int, width: int) -> Float[Tensor, "b t height width"]:
        """The share of the cell that each pixel belongs to (the same for all pixels of a cell)."""
        rows, columns = self.cells.nearest(1, height), self.cells.nearest(2, width)
        return self.shares[:, :, rows.to(self.shares.device)][:, :, :, columns.to(self.shares.device)]


@dataclass(frozen=True)
class AttentionView:
    """Where a model looked in b inputs.

    asking: the token whose attention is shown, the one that the classifier reads. last: the last attention over places,
    averaged over heads; rollout: all layers joined, over the cells of the first one; both sum to 1 at most, the rest lies on
    tokens without a place. distances: {site: (b, heads)} mean distance in pixels, of the sites that look across the picture;
    frames: the same in frames, of the sites that look across time. even_distances, even_frames: {site: what attention to
    everything in reach alike would give}.
    """

    asking: str
    last: Placed
    rollout: Placed
    distances: dict[str, Float[Tensor, "b k"]] = field(default_factory=dict)
    frames: dict[str, Float[Tensor, "b k"]] = field(default_factory=dict)
    even_distances: dict[str, float] = field(default_factory=dict)
    even_frames: dict[str, float] = field(default_factory=dict)


def rollout(
    route: Route, maps: Maps, rows: Float[Tensor, "#b r n"] | None = None, blend: Blend = RESIDUAL, steps: slice = slice(None)
) -> Float[Tensor, "b r m"]:
    """Weights over the last tokens (`rows`; by default each token alone) as weights over those that the first step reads.

    Attention is averaged over heads and joined through the layers (Abnar & Zuidema, arXiv 2005.00928). Between layers tokens
    are traced through the route: merged and pooled tokens are the mean of what they are made of. `steps`: a part of the route
    to join. Raises ValueError for a route without steps.
    """
    chosen = route.steps[steps]
    if not chosen:
        raise ValueError("rollout needs at least one step of attention")
    if rows is None:
        rows = torch.eye(chosen[-1].after.tokens)[None]
    if (site := next((site for step in chosen for site in step.sites), None)) is not None:
        recorded = maps[site.name]
        rows = rows.to(recorded.device).expand(len(recorded) // len(site.keys), -1, -1)
    for step in reversed(chosen):
        rows = _through(rows, step, maps, blend)
    return rows


def _through(rows: Float[Tensor, "b r n"], step: Step, maps: Maps, blend: Blend) -> Float[Tensor, "b r m"]:
    """Weights over the tokens after a step as weights over those before it."""
    if not step.sites:
        return step.shortcut.pull(rows)  # type: ignore[union-attr]
    found: Tensor | float = 0.0
    for site in step.sites:
        found = found + _attended(rows, site, maps[site.name]) / len(step.sites)
    if step.shortcut is None:
        return found  # type: ignore[return-value]
    asks = torch.zeros(step.after.tokens + 1)
    for site in step.sites:
        asks[site.queries] = 1.0  # padding, -1, sets the last entry
    asks = asks[:-1].to(rows.device)
    past = rows * (asks * blend.shortcut + (1 - asks))  # who asks nothing goes on whole
    return blend.attention * found + step.shortcut.pull(past)


def _attended(rows: Float[Tensor, "b r n"], site: Site, weights: Tensor) -> Float[Tensor, "b r m"]:
    """Through one site. A token that asks in several groups (a class token's copies) is the mean of their answers."""
    shares = among_tokens(weights.float().mean(1) if weights.ndim == 4 else weights.float(), site)
    queries, keys = site.queries.to(rows.device), site.keys.to(rows.device)
    times = torch.bincount(queries[queries >= 0].flatten(), minlength=site.asking.tokens).clamp_min(1)
    padded = torch.cat([rows / times, rows.new_zeros(*rows.shape[:2], 1)], 2)
    asking = padded[:, :, queries]  # b r g n, padding asks with weight 0
    answers = torch.einsum("brgn,bgnm->brgm", asking, shares)
    found = answers.new_zeros(*answers.shape[:2], site.cells.tokens + 1)
    found.index_add_(2, keys.flatten() % (site.cells.tokens + 1), answers.flatten(2))
    found = found[:, :, :-1]
    return found if site.links is None else site.links.pull(found)


def among_tokens(weights: Tensor, site: Site) -> Tensor:
    """Recorded weights (b * g, ..., n, m) as (b, g, ..., n, m), without what goes to padding; the rest adds up as before."""
    shares = weights.unflatten(0, (-1, len(site.keys)))
    padding = site.keys < 0
    if not padding.any():
        return shares
    real = (~padding).to(shares).view(1, len(site.keys), *(1,) * (shares.ndim - 3), -1)
    kept = shares * real
    return kept * (shares.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-12))


def spans(site: Site) -> tuple[bool, bool]:
    """Whether the keys of a group lie at different times, and at different places of the picture."""
    places = _centres(site.cells, site.keys)
    first = places.nan_to_num(torch.inf).amin(1, keepdim=True)
    apart = (places.nan_to_num(-torch.inf) > first).flatten(0, 1).any(0)
    return bool(apart[0]), bool(apart[1] or apart[2])


def distance(weights: Float[Tensor, "bg k n m"], site: Site, axis: str = "space") -> Float[Tensor, "b k"]:
    """Mean distance from a patch to what it attends to, weighted by attention, per input and head.

    Measured between centres, in pixels ("space") or frames ("time"). Tokens without a place neither ask nor count, the rest is
    normalised to 1, and all asking patches weigh the same (ViT paper, figure 7 right and D.7).
    """
    asked, held = _centres(site.asking, site.queries), _centres(site.cells, site.keys)
    asks, counts = (~p[..., 0].isnan() for p in (asked, held))  # g n, g m
    t, y, x = (asked[:, :, None, a].nan_to_num() - held[:, None, :, a].nan_to_num() for a in range(3))  # g n m
    apart = (torch.hypot(y, x) if axis == "space" else t.abs()).to(weights.device)
    asks, counts = asks.to(weights.device), counts[:, None].to(weights.device)
    means = []
    for head in weights.unbind(1):  # one after the other: a map of all heads may be large
        among = head.float().unflatten(0, (-1, len(site.keys))) * counts  # b g n m
        mean = (among * apart).sum(-1) / among.sum(-1).clamp_min(1e-12)
        means.append((mean * asks).sum((1, 2)) / asks.sum())
    return torch.stack(means, 1)


def even_distance(site: Site, axis: str = "space") -> float:
    """The distance of attention to all tokens in reach alike."""
    g, n, m = *site.queries.shape, site.keys.shape[1]
    reach = torch.ones(g, n, m) if site.apart is None else (~site.apart).float()
    return distance(reach[:, None], site, axis).item()


def _centres(cells: Cells, numbers: Tensor) -> Tensor:
    places = torch.cat([cells.centres(), torch.full((1, 3), torch.nan)])
    return places[numbers]  # padding, -1, has no place


@torch.no_grad()
def look(model: Model, inputs: Float[Tensor, "b c *t h w"], blend: Blend = RESIDUAL) -> AttentionView | None:
    """Run `model` on normalised pictures or clips and collect what it attends to; None for a model without attention.

    The maps are asked by what the classifier reads: the class token, the pooling query, or, for mean pooling, all patches
    alike. Raises NoPathError where layers of another kind lie between the sites.
    """
    route = model.attention_route(tuple(inputs.shape[2:]))
    if not route.sites:
        return None
    if not route.readout:
        raise NoPathError(
            f"convolutions lie between the attention layers of this {model.family} model, so they have no rollout"
        )
    sites = route.sites
    reach = {name: spans(site) for name, site in sites.items()}
    far: dict[str, dict[str, Tensor]] = {"time": {}, "space": {}}

    def reduce(name: str, weights: Tensor) -> Tensor:
        for axis, crosses in zip(("time", "space"), reach[name], strict=True):
            if crosses and sites[name].asking.tokens > sites[name].asking.prefix:
                far[axis][name] = distance(weights, sites[name], axis)
        return weights.float().mean(1)

    maps = run_recorded(model, inputs, reduce)
    asking, rows = next(iter(route.readout.items()))
    rows = rows[None, None]
    last = max(i for i, step in enumerate(route.steps) if any(reach[site.name][1] for site in step.sites))
    if last + 1 < len(route.steps):
        rows = rollout(route, maps, rows, blend, slice(last + 1, None))
    before = route.steps[last - 1].after if last else route.first
    return AttentionView(
        asking,
        place(rollout(route, maps, rows, PLAIN, slice(last, last + 1))[:, 0], before),
        place(rollout(route, maps, rows, blend, slice(last + 1))[:, 0], route.first),
        far["space"], far["time"],
        {name: even_distance(sites[name]) for name in far["space"]},
        {name: even_distance(sites[name], "time") for name in far["time"]},
    )  # fmt: skip


def run_recorded(
    model: Model, inputs: Tensor, reduce: Callable[[str, Tensor], Tensor] | None = None, grad: bool = False
) -> dict[str, Tensor]:
    """The maps of all sites, in eval mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with record_attention(model, grad=grad, reduce=reduce) as maps:
            model.pool(model.features(inputs))
    finally:
        model.train(was_training)
    return maps


def place(weights: Float[Tensor, "b n"], cells: Cells) -> Placed:
    """Weights over tokens laid out over the cells; what lies on the prefix is left out."""
    return Placed(weights[:, cells.prefix :].unflatten(1, cells.grid), cells)
