"""Swin checkpoints of torchvision, v1 and v2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitrail.config import ModelCard
from vitrail.layers.bias import log_offsets, window_offsets
from vitrail.models.swin import SwinConfig

from .mapping import Rule, constant, rename, transform
from .sources import Files, Source
from .swin import build_config, check_plan, classes, preprocess, stem

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def _rules(config: SwinConfig) -> list[Rule]:
    rules = [
        *rename("embed.proj.{weight,bias}", "features.0.0.{weight,bias}"),
        *rename("embed_norm.{weight,bias}", "features.0.2.{weight,bias}"),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.{weight,bias}"),
    ]
    for s, depth in enumerate(config.depths):
        ours, theirs = f"stages.{s}.blocks." + "{i}.", f"features.{2 * s + 1}." + "{i}."
        rules += [
            *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{norm1,norm2}.{weight,bias}"),
            *rename(ours + "attn.proj.{weight,bias}", theirs + "attn.proj.{weight,bias}"),
            *rename(ours + "attn.qkv.weight", theirs + "attn.qkv.weight"),
            *rename(ours + "attn.bias.table", theirs + "attn.relative_position_bias_table"),
            *rename(ours + "attn.logit_scale", theirs + "attn.logit_scale"),
            *rename(ours + "attn.bias.fc1.{weight,bias}", theirs + "attn.cpb_mlp.0.{weight,bias}"),
            *rename(ours + "attn.bias.fc2.weight", theirs + "attn.cpb_mlp.2.weight"),
            *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{0,3}.{weight,bias}"),
        ]
        if config.version == 1:
            rules += rename(ours + "attn.qkv.bias", theirs + "attn.qkv.bias")
        else:
            rules += transform(ours + "attn.qv_bias", theirs + "attn.qkv.bias", _without_keys, _with_keys)
        for i in range(depth):
            rules += _buffers(config, s, f"features.{2 * s + 1}.{i}.attn.")
        if s:
            merge = f"features.{2 * s}."
            rules += rename(f"stages.{s}.merge." + "norm.{weight,bias}", merge + "norm.{weight,bias}")
            rules += rename(f"stages.{s}.merge.reduction.weight", merge + "reduction.weight")
    return rules


def _without_keys(bias: Tensor) -> Tensor:
    """torchvision's v2 stores a bias of the keys too, which it replaces by zeros whenever it computes."""
    q, _, v = bias.chunk(3)
    return torch.cat([q, v])


def _with_keys(bias: Tensor) -> Tensor:
    q, v = bias.chunk(2)
    return torch.cat([q, torch.zeros_like(q), v])


def _buffers(config: SwinConfig, stage: int, name: str) -> list[Rule]:
    """What torchvision keeps in its state dicts although the window decides it."""
    window = config.windows[stage]
    shape = (1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
    rules = constant(name + "relative_position_index", lambda: window_offsets(window))
    if config.version == 2:
        rules += constant(name + "relative_coords_table", lambda: log_offsets(window, window).view(shape))
    return rules


def _infer(state: State, files: Files, hints: Hints) -> tuple[SwinConfig, list[str]]:
    blocks = {f"layers.{key}": value for key, value in _stages(state).items()}
    coordinates = state.get("features.1.0.attn.relative_coords_table")
    window = None if coordinates is None else tuple((side + 1) // 2 for side in coordinates.shape[1:3])
    return build_config(
        blocks, hints, "layers.{s}.", "attn.relative_position_bias_table", "attn.logit_scale", window=window, fit="call",
        num_classes=classes(state, "head.weight"), qkv_bias="features.1.0.attn.qkv.bias" in state,
        **stem(state["features.0.0.weight"], state["features.1.0.mlp.0.weight"]),
    )  # fmt: skip


def _stages(state: State) -> dict[str, Tensor]:
    """Tensors of blocks, with the stages counted through instead of at odd places."""
    found = {}
    for key, value in state.items():
        hit = re.match(r"features\.(\d+)\.(\d+\..*)", key)
        if hit and int(hit[1]) % 2:
            found[f"{int(hit[1]) // 2}.{hit[2]}"] = value
    return found


# Sides that torchvision's recipes resize to before the crop, by version and (width, depth of the third stage).
_TV_RESIZE = {(1, 96, 6): 232, (1, 96, 18): 246, (1, 128, 18): 238, (2, 96, 6): 260, (2, 96, 18): 260, (2, 128, 18): 272}


def _card(config: SwinConfig, files: Files) -> ModelCard:
    resized = _TV_RESIZE.get((config.version, config.width, max(config.depths)))
    fraction = config.image_size[0] / resized if resized and config.image_size[0] <= resized else 0.875
    return ModelCard(preprocess=preprocess(config, fraction))


def _export(config: SwinConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    check_plan(config, "torchvision", {"position_table": False, "in_channels": 3, "pretrained_windows": (), "qkv_bias": True},
          fit="call", pad_first=True)  # fmt: skip
    return {}


def _recognise(state: State) -> bool:
    return "features.0.2.weight" in state and "features.1.0.attn.qkv.weight" in state


SOURCES = (Source("torchvision", "swin", _recognise, _infer, _rules, _card, _export),)
