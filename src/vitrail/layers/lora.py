"""Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen weight plus a trained product of two thin matrices.

A parametrization of `weight`, so that no layer and no model knows of it: whatever reads the weight reads the sum. Merged, the
model is exactly the one without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import attention_sites

PLACES = ("attention", "all")


class LowRank(nn.Module):
    """W + alpha / rank * B A (section 4.1): A (rank, in) starts random, B (out, rank) at zero."""

    def __init__(self, weight: Float[Tensor, "o i"], rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The adapted weight."""
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_lora(model: nn.Module, rank: int, alpha: float, place: str = "attention") -> list[str]:
    """Adapt the linear layers beside every attention site (or `all` but the head's); returns their names.

    Their own weights are frozen; nothing else is. Raises ValueError for a model without such a layer, and for a rank that is
    not below a layer's sides.
    """
    sites = {name.rpartition(".")[0] for name in attention_sites(model)}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("head.")
        and (place == "all" or name.rpartition(".")[0] in sites)
    }  # fmt: skip
    if not found:
        raise ValueError("low-rank adaptation needs linear layers beside attention; this model has none")
    smallest = min(min(module.weight.shape) for module in found.values())
    if not 0 < rank < smallest:
        raise ValueError(
            f"lora_rank is {rank}; the narrowest adapted layer has {smallest} channels, allowed: 1 to {smallest - 1}"
        )
    for module in found.values():
        module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, alpha))
    return list(found)


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every adapted layer."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], LowRank):  # type: ignore[index, union-attr]
            yield name, module


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the merged model; that of a model without adapted layers is its own."""
    state = model.state_dict()
    for name, module in adapted(model):
        inner = f"{name}.parametrizations.weight."
        for key in [key for key in state if key.startswith(inner)]:
            del state[key]
        state[f"{name}.weight"] = module.weight.detach()  # type: ignore[union-attr, operator]
    return state


def merge_lora(model: nn.Module) -> None:
    """Make the adapted weights the model's own; nothing but rounding changes in what it answers."""
    for _, module in list(adapted(model)):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        module.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
