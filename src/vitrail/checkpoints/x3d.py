"""X3D checkpoints: pytorchvideo and the authors' own repository (PySlowFast)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard
from vitrail.models.x3d import VARIANTS, X3DConfig

from .mapping import CheckpointError, Rule, rename, transform
from .sources import Files, Source, clip_card, count_blocks

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]
NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def conv_norm(ours: str, conv: str, norm: str) -> list[Rule]:
    """A `ConvNorm` whose two parts have names of their own."""
    return [*rename(f"{ours}.conv.weight", f"{conv}.weight"), *rename(f"{ours}.norm.{NORM}", f"{norm}.{NORM}")]


def _pointwise(ours: str, theirs: str) -> list[Rule]:
    """A matrix stored as a convolution of one position."""
    return transform(f"{ours}.weight", f"{theirs}.weight", lambda t: t[:, :, 0, 0, 0], lambda t: t[:, :, None, None, None])


def _gate(ours: str, first: str, second: str) -> list[Rule]:
    pairs = (("fc1", first), ("fc2", second))
    return [
        rule
        for fc, theirs in pairs
        for rule in (*_pointwise(f"{ours}.{fc}", theirs), *rename(f"{ours}.{fc}.bias", f"{theirs}.bias"))
    ]


def _build(
    state: State, hints: Hints, convs: list[list[str]], head: tuple[str, str], **known: Any
) -> tuple[X3DConfig, list[str]]:
    """A config from shapes; convs: names of every stage's last convolutions, head: names of the hidden and last layer."""
    depths, last = tuple(map(len, convs)), state.get(head[1])
    published = next((v for v in VARIANTS.values() if v.depths == depths), None)
    large = published is not None and max(depths) > 11
    notes = []
    frames, side = (16, 312) if large else (16, 224)
    if "frames" not in hints or not {"image_size", "built_size"} & set(hints):
        notes.append(f"guess: made for {frames} frames of {side}x{side} (the weights do not tell; "
                     "frames=... and image_size=... decide)")  # fmt: skip
    size = hints.get("built_size") or hints.get("image_size") or (side, side)
    config = X3DConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        frames=int(hints.get("frames") or frames),
        num_classes=0 if last is None else last.shape[0],
        depths=depths,
        widths=tuple(state[stage[0]].shape[0] for stage in convs),
        bottleneck=state[convs[0][0]].shape[1] / state[convs[0][0]].shape[0],
        head_width=state[head[0]].shape[0],
        **known,
    )
    inner = tuple(state[stage[0]].shape[1] for stage in convs)
    if config.inner != inner:
        raise CheckpointError(f"an X3D with {inner} channels inside its blocks has no model here; with {config.inner} it has")
    return config, notes


def _clip_card(config: X3DConfig, files: Files) -> ModelCard:
    return clip_card(config, {4: 12, 13: 6}.get(config.frames, 5))  # X3D-XS, X3D-S, the larger ones


# pytorchvideo ---------------------------------------------------------------------------------------------------------


def _ptv_rules(config: X3DConfig) -> list[Rule]:
    last = len(config.depths) + 1
    rules = [
        *rename("stem_space.conv.weight", "blocks.0.conv.conv_t.weight"),
        *conv_norm("stem_time", "blocks.0.conv.conv_xy", "blocks.0.norm"),
        *conv_norm("expand", f"blocks.{last}.pool.pre_conv", f"blocks.{last}.pool.pre_norm"),
        *_pointwise("squeeze", f"blocks.{last}.pool.post_conv"),
        *rename("head.linear.{weight,bias}", f"blocks.{last}.proj." + "{weight,bias}"),
    ]
    for stage in range(len(config.depths)):
        ours, theirs = f"stages.{stage}." + "{i}", f"blocks.{stage + 1}.res_blocks." + "{i}"
        inside = theirs + ".branch2"
        rules += conv_norm(ours + ".conv1", inside + ".conv_a", inside + ".norm_a")
        rules += conv_norm(ours + ".conv2", inside + ".conv_b", inside + ".norm_b.0")
        rules += conv_norm(ours + ".conv3", inside + ".conv_c", inside + ".norm_c")
        rules += conv_norm(ours + ".shortcut", theirs + ".branch1_conv", theirs + ".branch1_norm")
        rules += _gate(ours + ".gate", inside + ".norm_b.1.block.0", inside + ".norm_b.1.block.2")
    return rules


def _ptv_infer(state: State, files: Files, hints: Hints) -> tuple[X3DConfig, list[str]]:
    last = count_blocks(state, "blocks.") - 1
    convs = [
        [f"blocks.{s}.res_blocks.{i}.branch2.conv_c.weight" for i in range(count_blocks(state, f"blocks.{s}.res_blocks."))]
        for s in range(1, last)
    ]
    plain = any(
        f"blocks.{s}.res_blocks.0.branch1_conv.weight" in state and f"blocks.{s}.res_blocks.0.branch1_norm.weight" not in state
        for s in range(1, last)
    )
    head = (f"blocks.{last}.pool.post_conv.weight", f"blocks.{last}.proj.weight")
    stem = state["blocks.0.conv.conv_t.weight"]
    return _build(state, hints, convs, head, in_channels=stem.shape[1], plain_shortcut=plain)


def _ptv_export(config: X3DConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    if not config.plain_shortcut:
        raise CheckpointError(
            "pytorchvideo cannot hold the first shortcut's normalisation (plain_shortcut=False); nearest: format='pyslowfast'"
        )
    return {}


# PySlowFast -----------------------------------------------------------------------------------------------------------


def _own_rules(config: X3DConfig) -> list[Rule]:
    rules = [
        *rename("stem_space.conv.weight", "s1.pathway0_stem.conv_xy.weight"),
        *conv_norm("stem_time", "s1.pathway0_stem.conv", "s1.pathway0_stem.bn"),
        *conv_norm("expand", "head.conv_5", "head.conv_5_bn"),
        *_pointwise("squeeze", "head.lin_5"),
        *rename("head.linear.{weight,bias}", "head.projection.{weight,bias}"),
    ]
    for stage in range(len(config.depths)):
        ours, theirs = f"stages.{stage}." + "{i}", f"s{stage + 2}.pathway0_res" + "{i}"
        for conv, name in (("conv1", "a"), ("conv2", "b"), ("conv3", "c")):
            rules += conv_norm(f"{ours}.{conv}", f"{theirs}.branch2.{name}", f"{theirs}.branch2.{name}_bn")
        rules += conv_norm(ours + ".shortcut", theirs + ".branch1", theirs + ".branch1_bn")
        rules += _gate(ours + ".gate", theirs + ".branch2.se.fc1", theirs + ".branch2.se.fc2")
    return rules


def _own_infer(state: State, files: Files, hints: Hints) -> tuple[X3DConfig, list[str]]:
    stages = [s for s in range(2, 10) if f"s{s}.pathway0_res0.branch2.c.weight" in state]
    convs = [
        [f"s{s}.pathway0_res{i}.branch2.c.weight" for i in range(count_blocks(state, f"s{s}.pathway0_res"))] for s in stages
    ]
    stem = state["s1.pathway0_stem.conv_xy.weight"]
    return _build(state, hints, convs, ("head.lin_5.weight", "head.projection.weight"), in_channels=stem.shape[1])


def _own_export(config: X3DConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    if config.plain_shortcut:
        raise CheckpointError(
            "PySlowFast cannot hold a first shortcut without one (plain_shortcut=True); nearest: format='pytorchvideo'"
        )
    return {}


SOURCES = (
    Source("pytorchvideo", "x3d", lambda state: "blocks.0.conv.conv_t.weight" in state, _ptv_infer, _ptv_rules,
           _clip_card, _ptv_export, container="model.pyth", inside="model_state", one_preprocess=True),
    Source("pyslowfast", "x3d", lambda state: "s1.pathway0_stem.conv_xy.weight" in state, _own_infer, _own_rules,
           _clip_card, _own_export, container="model.pyth", inside="model_state", one_preprocess=True),
)  # fmt: skip
