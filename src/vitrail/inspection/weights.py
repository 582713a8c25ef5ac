"""What a model's weights show without any picture: patch filters, how alike positions are, and position biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.bias import ContinuousBias, RelativeBias
from vitrail.layers.position import ClipPosition, PositionTable, RelativePosition, VideoPosition
from vitrail.models import Model

LOGITS = "added to the logits"
COMPONENTS = 28  # as many as the ViT paper shows (figure 7, left)


@dataclass(frozen=True)
class Filters:
    """Principal components of the first layer's filters, (n, c, t, h, w), unit length, and the share of variance of each.

    name: the layer. Pictures have t = 1.
    """

    name: str
    components: Float[Tensor, "n c t h w"]
    variance: Float[Tensor, " n"]


@torch.no_grad()
def filter_components(model: Model, count: int = COMPONENTS) -> Filters:
    """Principal components of the filters that read the pixels: a ViT's patch embedding, tubelets, or a stem's convolution.

    The filters are the samples, centred on their mean (ViT paper, figure 7 left). Signs are arbitrary; here the largest entry
    is positive. Raises ValueError for a model whose first layer is no convolution.
    """
    first = next(((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if first is None or first[1].in_channels != model.input_shape[0]:
        raise ValueError(f"the first layer of a {model.family} model is no convolution of the pixels")
    name, layer = first
    weights = layer.weight.double().cpu()
    shape = (weights.shape[1], *(1,) * (5 - weights.ndim), *weights.shape[2:])
    flat = weights.flatten(1)
    _, strength, rows = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    kept = min(count, int((strength > 1e-5 * strength[0].clamp_min(1e-30)).sum()))
    share = strength.square() / strength.square().sum().clamp_min(1e-30)
    components = (rows * largest.sign())[:kept].unflatten(1, shape)
    return Filters(name, components.float(), share[:kept].float())


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity between learned positions. name: the table; space: between places, (h, w, h, w), in a clip averaged
    over frames; time: between frames, (t, t), averaged over places; None where the table has one of that axis.
    """

    name: str
    space: Float[Tensor, "h w h w"] | None
    time: Float[Tensor, "t t"] | None

    def structure(self) -> dict[str, float]:
        """Mean similarity to other places of the same row, of the same column, and of neither (the ViT paper's figure 7)."""
        if self.space is None:
            return {}
        h, w = self.space.shape[:2]
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        row = rows.flatten()[:, None] == rows.flatten()
        column = columns.flatten()[:, None] == columns.flatten()
        flat, itself = self.space.flatten(2).flatten(0, 1), torch.eye(h * w, dtype=torch.bool)
        parts = {"same row": row & ~itself, "same column": column & ~itself, "neither": ~row & ~column}
        return {name: flat[mask].mean().item() for name, mask in parts.items() if mask.any()}


@torch.no_grad()
def position_similarity(model: Model) -> list[Similarity]:
    """How alike the learned positions that are added to the tokens are, a row per table (ViT paper, figure 7 centre)."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PositionTable):
            table = module(module.grid)[1][0]
            found.append(_similarity(name, table.view(1, *module.grid, -1)))
        elif isinstance(module, VideoPosition) and module.time is not None:
            places = _similarity(name, module.table[0, module.prefix :].unflatten(0, (1, *module.grid[1:])))
            times = _similarity(name, module.time[0].view(-1, 1, 1, module.time.shape[-1]))
            found.append(Similarity(name, places.space, times.time))
        elif isinstance(module, ClipPosition) and not module.joint:
            places = _similarity(name, module.places[0].unflatten(0, (1, *module.grid[1:])))
            times = _similarity(name, module.frames[0].view(-1, 1, 1, module.frames.shape[-1]))
            found.append(Similarity(name, places.space, times.time))
        elif isinstance(module, (VideoPosition, ClipPosition)):
            found.append(_similarity(name, module.table[0, module.prefix :].unflatten(0, module.grid)))
    return [similarity for similarity in found if similarity.space is not None or similarity.time is not None]


def _similarity(name: str, table: Float[Tensor, "t h w c"]) -> Similarity:
    unit = F.normalize(table.float().cpu(), dim=-1)
    t, h, w = table.shape[:3]
    space = torch.einsum("tyxc,tvuc->yxvu", unit, unit) / t if h * w > 1 else None
    time = torch.einsum("tyxc,syxc->ts", unit, unit) / (h * w) if t > 1 else None
    return Similarity(name, space, time)


@dataclass(frozen=True)
class BiasTable:
    """What attention prefers by offset alone, per head: (k, rows, columns), offset query - key, the middle is no offset."""

    name: str
    heads: Float[Tensor, "k y x"]
    unit: str = LOGITS

    @property
    def contrast(self) -> Float[Tensor, "k y x"]:
        """What of it can matter: logits without each head's mean, which softmax does not see; similarities as they are."""
        return self.heads - self.heads.mean((1, 2), keepdim=True) if self.unit == LOGITS else self.heads


@torch.no_grad()
def bias_tables(model: Model) -> list[BiasTable]:
    """Swin's tables of relative position bias, learned (v1) or computed by v2's small network.

    Of vectors that meet the queries (ViT's relative positions, MViT v2) the table shows how alike those of two offsets are.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (RelativeBias, ContinuousBias)):
            h, w = module.window
            bias = module().view(-1, h, w, h, w).float().cpu()
            heads = bias.new_empty(bias.shape[0], 2 * h - 1, 2 * w - 1)
            for y in range(1 - h, h):
                for x in range(1 - w, w):  # any pair of that offset: the first that lies in the window
                    heads[:, y + h - 1, x + w - 1] = bias[:, max(y, 0), max(x, 0), max(-y, 0), max(-x, 0)]
            found.append(BiasTable(name, heads))
        elif isinstance(module, RelativePosition):
            tables = {"rows": module.rows, "columns": module.columns, "frames": module.frames}
            for axis, table in tables.items():
                if table is not None and len(table) > 1:
                    unit = F.normalize(table.float().cpu(), dim=-1)
                    found.append(
                        BiasTable(f"{name}.{axis}", (unit @ unit.T)[None], "cosine similarity of two offsets' vectors")
                    )
    return found
