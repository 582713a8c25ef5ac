"""The configuration of an MViT from the shapes of its weights, under PySlowFast's names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.layers.pool import Steps
from vitrail.models.mvit import VARIANTS, MViTConfig

from .mapping import CheckpointError
from .sources import count_blocks

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def flat(state: State, names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Keys under PySlowFast's names, which `_config` reads; a fused qkv is not needed there."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def read_config(state: State, hints: Hints, **known: Any) -> tuple[MViTConfig, list[str]]:
    """A config from shapes under PySlowFast's names; what they cannot tell comes from hints, then from published rows."""
    notes: list[str] = []
    patch = state["patch_embed.proj.weight"]
    clips, count = patch.ndim == 5, count_blocks(state, "blocks.")
    blocks = [f"blocks.{i}." for i in range(count)]
    inner = [state[b + "norm2.weight"].shape[0] for b in blocks]
    starts = [i for i in range(count) if i == 0 or inner[i] != inner[i - 1]]
    head_dim = _head_dim(state, hints, inner[0], starts, notes)
    kernel = tuple(patch.shape[2:])
    found: dict[str, Any] = {
        "in_channels": patch.shape[1],
        "num_classes": state["head.projection.weight"].shape[0] if "head.projection.weight" in state else 0,
        "depths": tuple(b - a for a, b in zip(starts, [*starts[1:], count], strict=True)),
        "widths": tuple(inner[i] for i in starts),
        "heads": tuple(inner[i] // head_dim for i in starts),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / inner[0],
        "patch_kernel": kernel,
        "patch_stride": tuple((k + 1) // 2 for k in kernel),
        "grow": "attention" if all(state[b + "mlp.fc2.weight"].shape[0] == n for b, n in zip(blocks, inner, strict=True))
        else "mlp",
        "class_token": "cls_token" in state,
        "pool": "cls" if "cls_token" in state else "mean",
        "relative": "blocks.0.attn.rel_pos_h" in state,
        "residual_pool": "blocks.0.attn.rel_pos_h" in state,
        "qkv_bias": known.pop("qkv_bias", "blocks.0.attn.qkv.bias" in state),
        "position": "none",
    }  # fmt: skip
    found |= _pools(state, hints, starts, clips, notes)
    found |= _built_size(state, hints, found, clips, notes)
    names = {"heads", "pool_mode", "pool_kernel", "pool_queries", "query_strides", "key_strides", "patch_stride", "frames"}
    config = MViTConfig(**{**found, **known, **{n: v for n, v in hints.items() if n in names - {"frames"}}})
    _note_strides(config, hints, notes)
    return config, notes


def _head_dim(state: State, hints: Hints, width: int, starts: list[int], notes: list[str]) -> int:
    for key in ("blocks.0.attn.norm_k.weight", "blocks.0.attn.rel_pos_h", f"blocks.{starts[-1]}.attn.norm_q.weight"):
        if key in state:
            return state[key].shape[-1]
    if "heads" in hints:
        return width // hints["heads"][0]
    notes.append(f"guess: {math.gcd(width, 96)} channels per head (the weights do not tell; heads=... decides)")
    return math.gcd(width, 96)


def _pools(state: State, hints: Hints, starts: list[int], clips: bool, notes: list[str]) -> dict[str, Any]:
    """Pooling kernels from the weights; strides from kernels that follow them, else as published."""
    axes = 3 if clips else 2
    one, two = (1,) * axes, (1, 2, 2)[3 - axes :]

    def kernel(i: int, part: str) -> Steps | None:
        weight = state.get(f"blocks.{i}.attn.pool_{part}.weight")
        return None if weight is None else tuple(weight.shape[2:])

    count = count_blocks(state, "blocks.")
    kernels = {kernel(i, "k") for i in range(count)}
    if kernels == {None} and not any(kernel(i, "q") for i in range(count)):  # no weights: max or avg
        if "pool_mode" not in hints:
            notes.append("guess: pooling by maximum (pool_mode=... and pool_kernel=... decide)")
        strided = tuple(two if i else one for i in range(len(starts)))
        return {
            "pool_mode": "max", "pool_kernel": (3,) * axes, "pool_queries": False, "query_strides": strided,
            "key_strides": _halved(strided, (1, 8, 8) if clips else (4, 4)),
        }  # fmt: skip
    between = [i for i in range(count) if i not in starts] + [0]
    queries = any(kernel(i, "q") for i in between)
    if len(kernels) == 1:
        strided = tuple(two if i and kernel(i, "q") else one for i in starts)
        return {
            "pool_mode": "conv", "pool_kernel": kernels.pop(), "pool_queries": queries, "query_strides": strided,
            "key_strides": _halved(strided, (1, 8, 8) if clips else (4, 4)),
        }  # fmt: skip
    steps = {part: tuple(tuple(max(k - 1, 1) for k in kernel(i, part) or one) for i in starts) for part in "qk"}
    return {
        "pool_mode": "conv", "pool_kernel": None, "pool_queries": queries, "query_strides": steps["q"],
        "key_strides": steps["k"],
    }  # fmt: skip


def _halved(query_strides: tuple[Steps, ...], first: Steps) -> tuple[Steps, ...]:
    """Key strides that keep the keys' grid: divided by every query stride ("adaptive" in the published configurations)."""
    strides, now = [], first
    for steps in query_strides:
        now = tuple(max(n // s, 1) for n, s in zip(now, steps, strict=True))
        strides.append(now)
    return tuple(strides)


def _built_size(state: State, hints: Hints, found: dict[str, Any], clips: bool, notes: list[str]) -> dict[str, Any]:
    """The position kind, and the size that its tables were made for."""
    stride, prefix = found["patch_stride"], int(found["class_token"])
    time, frames, side, position = stride[0] if clips else 1, None, 0, "none"
    if "pos_embed_spatial" in state:
        position = "separable"
        side, frames = _side(state["pos_embed_spatial"].shape[-2], hints), state["pos_embed_temporal"].shape[-2] * time
    elif "pos_embed" in state:
        position, rows = "joint", state["pos_embed"].shape[1] - prefix
        if clips:
            frames = int(hints.get("frames") or 16)
            if "frames" not in hints:
                notes.append("guess: built for 16 frames (the weights do not tell; frames=... decides)")
            rows //= -(-frames // time)
        side = _side(rows, hints)
    elif found["relative"]:
        side = (state["blocks.0.attn.rel_pos_h"].shape[0] + 1) // 2
        if clips:
            frames = (state["blocks.0.attn.rel_pos_t"].shape[0] + 1) // 2 * time
    asked = hints.get("built_size")
    size = (side * stride[-2], side * stride[-1]) if side else (224, 224)
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else tuple(asked)
    return {"position": position, "image_size": size, "frames": (frames or int(hints.get("frames") or 16)) if clips else None}


def _side(count: int, hints: Hints) -> int:
    side = math.isqrt(count)
    if side * side != count and "built_size" not in hints:
        raise CheckpointError(
            f"{count} positions per frame do not form a square; name the size the weights were built for: "
            "built_size=(height, width)"
        )
    return side


def _note_strides(config: MViTConfig, hints: Hints, notes: list[str]) -> None:
    published = {(v.depths, v.widths, v.frames is None) for v in VARIANTS.values()}
    told = config.pool_kernel is None or "key_strides" in hints
    if not told and (config.depths, config.widths, config.frames is None) not in published:
        strides = ", ".join("x".join(map(str, s)) for s in config.key_strides)
        notes.append(f"guess: keys are pooled by strides of {strides} (the weights do not tell; key_strides=... decides)")
