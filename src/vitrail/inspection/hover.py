"""Attention maps small enough for a page: bytes in base64, for every token that may be asked, with where everything lies."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.inspection.attention import among_tokens, run_recorded
from vitrail.layers.route import Cells, Site
from vitrail.models import Model

BUDGET = 6_000_000  # bytes of maps of one input, before base64


@torch.no_grad()
def hover_maps(model: Model, inputs: Float[Tensor, "1 c *t h w"], budget: int = BUDGET) -> dict[str, Any]:
    """The maps of all layers and heads for one normalised picture or clip, ready for JSON.

    Every row is scaled to its largest share, which is kept beside it. Where all rows would take more than `budget` bytes, only
    tokens on a coarser lattice may be asked, and "every" of a layer says how coarse. Raises ValueError without attention.
    """
    sites = model.attention_route(tuple(inputs.shape[2:])).sites
    if not sites:
        raise ValueError(f"a {model.family} model has no attention to show")
    sizes: dict[str, int] = {}
    run_recorded(model, inputs, lambda name, weights: _note(sizes, name, weights))
    part = min(1.0, budget / sum(sizes.values()))
    layers: dict[str, dict[str, Any]] = {}

    def keep(name: str, weights: Tensor) -> Tensor:
        layers[name] = _layer(sites[name], weights, part * sizes[name])
        return weights[:0]

    run_recorded(model, inputs, keep)
    return {"sides": [1, *inputs.shape[2:]][-3:], "layers": [layers[name] for name in sites]}


def _note(sizes: dict[str, int], name: str, weights: Tensor) -> Tensor:
    sizes[name] = weights.numel()
    return weights[:0]


def _layer(site: Site, weights: Float[Tensor, "g k n m"], share: float) -> dict[str, Any]:
    heads, keys = weights.shape[1], weights.shape[3]
    for every in itertools.count(1):
        asked = (site.queries >= 0) & _lattice(site.asking, every)[site.queries]
        if int(asked.sum()) * heads * keys <= max(share, 1) or every > max(site.asking.grid):
            break
    shares = among_tokens(weights.float(), site)[0].transpose(0, 1)[:, asked.to(weights.device)].cpu()  # k rows m
    shares = shares * (site.keys >= 0)[:, None].expand(-1, asked.shape[1], -1)[asked]
    peaks = shares.amax(2)
    bytes_ = (255 * shares / peaks.clamp_min(1e-12)[..., None]).round().to(torch.uint8)
    groups = torch.arange(len(site.keys))[:, None].expand_as(site.queries)[asked]
    return {
        "name": site.name.removesuffix(".site"),
        "heads": heads,
        "every": every,
        "asking": _cells(site.asking),
        "cells": _cells(site.cells),
        "rows": _pack(torch.stack([site.queries[asked], groups], 1), np.int32),
        "keys": _pack(site.keys, np.int32),
        "width": keys,
        "shares": _pack(bytes_, np.uint8),
        "peaks": _pack(peaks, np.float32),
    }


def _lattice(cells: Cells, every: int) -> Bool[Tensor, " n"]:
    """Every so manieth token along each axis, those without a place always; one more entry for padding, false."""
    axes = [(torch.arange(n) % every == min(every, n) // 2) | (every == 1) for n in cells.grid]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    flat = (t & y & x).flatten()
    return torch.cat([torch.ones(cells.prefix, dtype=torch.bool), flat, torch.zeros(1, dtype=torch.bool)])


def _cells(cells: Cells) -> dict[str, Any]:
    return {"grid": cells.grid, "origin": cells.origin, "step": cells.step, "prefix": cells.prefix}


def _pack(values: Tensor, kind: type) -> str:
    return base64.b64encode(values.cpu().numpy().astype(kind).tobytes()).decode()
