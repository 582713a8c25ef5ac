"""Fine-tuning: which of the weights that training starts from are trained, from which head, and what resizing alone did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, Preprocess, RunConfig, TransferConfig
from vitrail.data import Data, ImageDataset
from vitrail.evaluation import linear
from vitrail.evaluation.classify import predict_dataset
from vitrail.evaluation.features import extract_features
from vitrail.layers.lora import add_lora
from vitrail.models import Model

from .distributed import Ranks

PROBE_L2 = 1e-2  # of the logistic regression that a probed head starts from, on standardised features
BACKBONE = "backbone"


def prepare_transfer(
    model: Model, config: RunConfig, source: str, data: Data, preprocess: Preprocess, ranks: Ranks, *, resumed: bool
) -> tuple[str, ...]:
    """What the settings ask for before the optimiser is built; returns what to say. A resumed run has its weights already."""
    assert data.train is not None
    notes = []
    if not resumed and (told := compare_sizes(model, source, config, data, preprocess, ranks)):
        notes.append(told)
    if not resumed and config.transfer.head == "probe":
        workers = config.data_config.workers
        notes.append(solve_head(model, data.train, preprocess, ranks, config.precision, workers))
    return (*notes, *adapt(model, config.transfer))


def adapt(model: Model, config: TransferConfig) -> Iterator[str]:
    """Freeze and adapt as the settings say; yields what was done. Raises ConfigError for what this model does not have."""
    if config.freeze:
        yield freeze(model, config.freeze)
    if config.lora_rank:
        if config.freeze:
            raise ConfigError("lora_rank freezes everything but its own weights and the head; leave freeze out")
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        try:
            names = add_lora(model, config.lora_rank, alpha, config.lora_place)
        except ValueError as problem:
            raise ConfigError(f"{model.name or model.family}: {problem}") from None
        for name, parameter in model.named_parameters():
            if not name.startswith("head.") and not name.endswith((".weight.0.a", ".weight.0.b")):
                parameter.requires_grad_(False)
        # Batch normalisation is as frozen as the rest: its statistics belong to the weights.
        model.frozen = tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
        added = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head."))
        yield f"low-rank adaptation: rank {config.lora_rank} in {len(names)} layers, {added:,} trained weights beside the head"


def freeze(model: Model, what: str) -> str:
    """Freeze the backbone (all but the head), or the stem and the first blocks; says what.

    Modules of which everything is frozen also stay in eval mode while training: their batch normalisation keeps its
    statistics, their dropout is off. Raises ConfigError for another word, or more blocks than there are.
    """
    depths = model.layer_ids()
    blocks = max(depths.values()) - 1
    if what == BACKBONE:
        frozen = {name for name in depths if not name.startswith("head.")}
    elif what.isdigit() and int(what) <= blocks:
        frozen = {name for name, depth in depths.items() if depth <= int(what)}
    else:
        raise ConfigError(f"freeze is {what!r}; allowed: backbone, or a number of blocks from 0 (the stem alone) to {blocks}")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    model.frozen = tuple(_whole(model, frozen, everything=what == BACKBONE))
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    share = count / sum(p.numel() for p in model.parameters())
    named = "the backbone" if what == BACKBONE else "the stem" if what == "0" else f"the stem and {what} of {blocks} blocks"
    return f"frozen: {named}, {count:,} weights ({share:.0%})"


def _whole(model: nn.Module, frozen: set[str], everything: bool, prefix: str = "") -> Iterator[str]:
    """The largest modules of which all parameters are frozen; with `everything` also the head's siblings without any."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        names = [f"{path}.{inner}" for inner, _ in child.named_parameters()]
        if (names and all(inner in frozen for inner in names)) or (everything and not names):
            yield path
        elif names:
            yield from _whole(child, frozen, everything, f"{path}.")


@torch.no_grad()
def solve_head(model: Model, dataset: ImageDataset, preprocess: Preprocess, ranks: Ranks, precision: str, workers: int) -> str:
    """Set the head to the logistic regression on the frozen features of the training samples, as evaluation sees them.

    What linear probing arrives at, without its steps; fine-tuning from there keeps the features from being distorted by a
    random or zero head (Kumar et al., arXiv 2202.10054). Raises ConfigError for several labels per sample.
    """
    if dataset.multi_label:
        raise ConfigError("head is 'probe', which needs one class per sample; with several labels it starts from zero")
    found = ranks.gather(
        extract_features(
            model, dataset, dataclasses.replace(preprocess, clips=1, crops=1), device=ranks.device, precision=precision,
            workers=workers, rank=ranks.rank, world=ranks.world, progress="features for the head" if ranks.main else None,
        )
    )  # fmt: skip
    solved = None
    if ranks.main:
        parts = [part for part in found if len(part.targets)]
        x, y = (torch.cat(tensors) for tensors in zip(*((part.features, part.targets) for part in parts), strict=True))
        standardise = linear.Standardise(x)
        ((_, weight, bias),) = linear.logistic_sweep(standardise(x), y, len(dataset.classes), (PROBE_L2,))
        right = ((standardise(x) @ weight.T + bias).argmax(1) == y).float().mean()
        solved = (*standardise.undone(weight, bias), float(right))
    weight, bias, right = ranks.agree(solved)
    _set_head(model, weight, bias)
    return f"head: solved on the features of the training samples, {right:.1%} of which it gets right"


def _set_head(model: Model, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Into the head's linear layer. Raises ConfigError for two heads, and for one with a layer before the last."""
    layers = [module for module in model.head.modules() if isinstance(module, nn.Linear)]
    if len(layers) != 1 or layers[0].weight.shape != weight.shape:
        name = model.name or model.family
        raise ConfigError(f"head is 'probe', but the head of {name} is not one linear layer; let it start from zero")
    layers[0].weight.copy_(weight)
    layers[0].bias.copy_(bias)


def compare_sizes(model: Model, source: str, config: RunConfig, data: Data, preprocess: Preprocess, ranks: Ranks) -> str:
    """How good the weights were at their own size and are at the new one, before any training; "" where that says nothing.

    Only the size may differ: the same classes, and samples to judge on.
    """
    if not source or config.input.image_size is None or data.val is None or data.multi_label or not ranks.main:
        return ""
    before = load_model(source, quiet=True)
    theirs = before.card.preprocess if before.card else None
    size = preprocess.image_size
    if theirs is None or before.card.classes != data.classes or theirs.image_size == size:
        return ""
    if dataclasses.replace(theirs, image_size=size) != preprocess:
        return ""
    sides, top1 = (theirs.image_size, size), []
    for judged, seen in ((before, theirs), (model, preprocess)):
        outputs = predict_dataset(
            judged, data.val, seen, device=ranks.device, precision=config.precision, workers=config.data_config.workers
        )
        top1.append(float((outputs.logits.argmax(1) == outputs.targets).float().mean()))
    told = [f"{value:.1%} at {side[0]} x {side[1]}" for value, side in zip(top1, sides, strict=True)]
    return f"before training: top-1 {told[0]}, {told[1]} after resizing alone ({100 * (top1[1] - top1[0]):+.1f} points)"
