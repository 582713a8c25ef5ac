"""SlowFast and Slow checkpoints: pytorchvideo and the authors' own repository (PySlowFast)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard
from vitrail.models.slowfast import SlowFastConfig

from .mapping import CheckpointError, Rule, rename
from .sources import Files, Source, clip_card, count_blocks
from .x3d import NORM, conv_norm

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def _build(
    state: State, hints: Hints, first: Callable[[int, int, int], str], fusion: str, head: str, **known: Any
) -> tuple[SlowFastConfig, list[str]]:
    """A config from shapes; first(pathway, stage, block) names a block's first convolution, fusion the one after the stem."""
    notes: list[str] = []
    stages = next(s for s in range(20) if first(0, s, 0) not in state)
    depths = tuple(next(i for i in range(1000) if first(0, s, i) not in state) for s in range(stages))
    two = first(1, 0, 0) in state

    def kernel(pathway: int, stage: int, block: int) -> int:
        return state[first(pathway, stage, block)].shape[2]

    kernels = [tuple(kernel(p, s, 0) for s in range(stages)) for p in ((0, 1) if two else (0,))]
    seen = 1 if two else 0  # the fast pathway shows how many blocks see several frames, the slow one only in some stages
    temporal = tuple(
        sum(kernel(seen, s, i) > 1 for i in range(depth)) if kernels[seen][s] > 1 else depth for s, depth in enumerate(depths)
    )
    config: dict[str, Any] = {
        "num_classes": state[head].shape[0] if head in state else 0,
        "width": state[first(0, 0, 0)].shape[0], "depths": depths, "slow_kernels": kernels[0], "temporal_blocks": temporal,
        "fast_kernels": kernels[-1], "alpha": None, "frames": 8, "slow_frames": "linspace",
        "nonlocals": ((),) * stages, **known,
    }  # fmt: skip
    if two:
        size = state[fusion].shape[2]
        alpha = 8 if size == 5 and max(depths) < 23 else 4
        config |= {
            "beta_inv": config["width"] // state[first(1, 0, 0)].shape[0], "fusion_kernel": size, "alpha": alpha, "frames": 32,
        }  # fmt: skip
        if "alpha" not in hints:
            notes.append(f"guess: the slow pathway sees every {alpha}th frame (the weights do not tell; alpha=... decides)")
    if config["nonlocals"] != ((),) * stages and "nonlocal_kind" not in hints:
        notes.append("guess: non-local blocks with a softmax (the weights do not tell; nonlocal_kind='dot_product' decides)")
    config |= {name: hints[name] for name in ("alpha", "frames", "slow_frames", "nonlocal_kind") if name in hints}
    return SlowFastConfig(**config), notes


def _clip_card(config: SlowFastConfig, files: Files) -> ModelCard:
    return clip_card(config, 2 if config.alpha is not None else 64 // config.frames or 1)  # slow 4x16 and 8x8


def _blocks(ours: str, theirs: str, names: tuple[str, str, str], shortcut: tuple[str, str]) -> list[Rule]:
    """The rules of a stage's blocks; names say where the three convolutions and their norms are ("{conv,norm}_a")."""
    rules = []
    for conv, pattern in zip(("conv1", "conv2", "conv3"), names, strict=True):
        convolution, norm = pattern.split()
        rules += conv_norm(f"{ours}.{conv}", f"{theirs}.branch2.{convolution}", f"{theirs}.branch2.{norm}")
    return rules + conv_norm(f"{ours}.shortcut", f"{theirs}.{shortcut[0]}", f"{theirs}.{shortcut[1]}")


# pytorchvideo ---------------------------------------------------------------------------------------------------------


def _ptv_rules(config: SlowFastConfig) -> list[Rule]:
    stages, two = len(config.depths), config.alpha is not None
    rules = rename("head.linear.{weight,bias}", f"blocks.{stages + 1 + two}.proj." + "{weight,bias}")
    for p, ours in enumerate(("slow", "fast") if two else ("slow",)):
        inside = f".multipathway_blocks.{p}" if two else ""
        rules += conv_norm(f"{ours}.stem", f"blocks.0{inside}.conv", f"blocks.0{inside}.norm")
        for s in range(stages):
            rules += _blocks(
                f"{ours}.stages.{s}." + "{i}", f"blocks.{s + 1}{inside}.res_blocks." + "{i}",
                ("conv_a norm_a", "conv_b norm_b", "conv_c norm_c"), ("branch1_conv", "branch1_norm"),
            )  # fmt: skip
    for s in range(stages if two else 0):
        fusion = f"blocks.{s}.multipathway_fusion"
        rules += conv_norm(f"fusions.{s}", f"{fusion}.conv_fast_to_slow", f"{fusion}.norm")
    return rules


def _ptv_infer(state: State, files: Files, hints: Hints) -> tuple[SlowFastConfig, list[str]]:
    two = "blocks.0.multipathway_blocks.0.conv.weight" in state

    def first(pathway: int, stage: int, block: int) -> str:
        inside = f".multipathway_blocks.{pathway}" if two or pathway else ""
        return f"blocks.{stage + 1}{inside}.res_blocks.{block}.branch2.conv_a.weight"

    stem = state["blocks.0.multipathway_blocks.0.conv.weight" if two else "blocks.0.conv.weight"]
    stages = sum(first(0, s, 0) in state for s in range(20))
    head = f"blocks.{stages + 1 + two}.proj.weight"
    fusion = "blocks.0.multipathway_fusion.conv_fast_to_slow.weight"
    return _build(state, hints, first, fusion, head, in_channels=stem.shape[1])


def _ptv_export(config: SlowFastConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    if any(config.nonlocals):
        raise CheckpointError("pytorchvideo's SlowFast has no non-local blocks; nearest: format='pyslowfast'")
    return _linspace(config, "pytorchvideo")


def _linspace(config: SlowFastConfig, project: str) -> dict[str, dict[str, Any]]:
    """Both projects choose the slow frames outside the model, spread from the first to the last."""
    if config.alpha is not None and config.slow_frames != "linspace":
        raise CheckpointError(
            f"{project} takes other frames for the slow pathway than slow_frames={config.slow_frames!r}; load with "
            "slow_frames='linspace' to write it, or format='vitrail'"
        )
    return {}


# PySlowFast -----------------------------------------------------------------------------------------------------------


def _own_rules(config: SlowFastConfig) -> list[Rule]:
    rules = rename("head.linear.{weight,bias}", "head.projection.{weight,bias}")
    for p, ours in enumerate(("slow", "fast") if config.alpha is not None else ("slow",)):
        stem = f"s1.pathway{p}_stem"
        rules += conv_norm(f"{ours}.stem", f"{stem}.conv", f"{stem}.bn")
        for s in range(len(config.depths)):
            block, other = f"{ours}.stages.{s}." + "{i}", f"s{s + 2}.pathway{p}_"
            rules += _blocks(block, other + "res{i}", ("a a_bn", "b b_bn", "c c_bn"), ("branch1", "branch1_bn"))
            names = "{query,key,value,proj}.{weight,bias}", "{conv_theta,conv_phi,conv_g,conv_out}.{weight,bias}"
            rules += rename(f"{block}.nonlocal_block.{names[0]}", other + "nonlocal{i}." + names[1])
            rules += rename(f"{block}.nonlocal_block.norm.{NORM}", other + "nonlocal{i}.bn." + NORM)
    for s in range(len(config.depths) if config.alpha is not None else 0):
        rules += conv_norm(f"fusions.{s}", f"s{s + 1}_fuse.conv_f2s", f"s{s + 1}_fuse.bn")
    return rules


def _own_infer(state: State, files: Files, hints: Hints) -> tuple[SlowFastConfig, list[str]]:
    def first(pathway: int, stage: int, block: int) -> str:
        return f"s{stage + 2}.pathway{pathway}_res{block}.branch2.a.weight"

    stages = sum(first(0, s, 0) in state for s in range(20))
    behind = tuple(
        tuple(i for i in range(count_blocks(state, f"s{s}.pathway0_res")) if f"s{s}.pathway0_nonlocal{i}.bn.weight" in state)
        for s in range(2, stages + 2)
    )
    return _build(
        state, hints, first, "s1_fuse.conv_f2s.weight", "head.projection.weight",
        in_channels=state["s1.pathway0_stem.conv.weight"].shape[1], nonlocals=behind,
    )  # fmt: skip


def _is_ptv(state: State) -> bool:
    slow = "blocks.0.conv.weight" in state and "blocks.1.res_blocks.0.branch2.conv_a.weight" in state
    return slow or "blocks.0.multipathway_blocks.0.conv.weight" in state


def _is_own(state: State) -> bool:
    return "s1.pathway0_stem.conv.weight" in state and "s2.pathway0_res0.branch2.a.weight" in state


SOURCES = (
    Source("pytorchvideo", "slowfast", _is_ptv, _ptv_infer, _ptv_rules, _clip_card, _ptv_export,
           container="model.pyth", inside="model_state", one_preprocess=True),
    Source("pyslowfast", "slowfast", _is_own, _own_infer, _own_rules, _clip_card,
           lambda config, card: _linspace(config, "PySlowFast"), container="model.pyth", inside="model_state",
           one_preprocess=True),
)  # fmt: skip
