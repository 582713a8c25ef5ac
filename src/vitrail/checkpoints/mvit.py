"""MViT checkpoints: torchvision, timm (pictures), pytorchvideo, and the authors' own repositories (PySlowFast, mvit)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.models.mvit import VARIANTS, MViTConfig

from .mapping import CheckpointError, Rule, fuse, rename, transform
from .mvit_shapes import flat, read_config
from .sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Files,
    Source,
    clip_card,
    count_blocks,
    timm_card,
    timm_files,
)

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def _block(ours: str, theirs: str, pool: str, norm: str) -> list[Rule]:
    """What all sources name alike but for the places of pools ("attn.pool_q") and their norms."""
    rules = [
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{norm1,norm2}.{weight,bias}"),
        *rename(ours + "attn.relative.{rows,columns,frames}", theirs + "attn.{rel_pos_h,rel_pos_w,rel_pos_t}"),
    ]
    for part in "qkv":
        rules += rename(f"{ours}attn.pool_{part}.weight", theirs + pool.replace("*", part))
        rules += rename(f"{ours}attn.pool_{part}.norm.{{weight,bias}}", theirs + norm.replace("*", part) + ".{weight,bias}")
    return rules


def _qkv_and_mlp(ours: str, theirs: str) -> list[Rule]:
    return [
        *rename(ours + "attn.{qkv,proj}.{weight,bias}", theirs + "attn.{qkv,proj}.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{fc1,fc2}.{weight,bias}"),
    ]


def _clip_card(config: MViTConfig, files: Files) -> ModelCard:
    """The published models take every fourth frame for 16, every third for more."""
    return clip_card(config, 4 if (config.frames or 0) <= 16 else 3)


# torchvision ----------------------------------------------------------------------------------------------------------

_TV_NAMES = [
    (r"^conv_proj\.", "patch_embed.proj."), (r"^pos_encoding\.class_token$", "cls_token"),
    (r"^pos_encoding\.(spatial|temporal)_pos$", r"pos_embed_\1"), (r"\.pool_([qkv])\.pool\.", r".pool_\1."),
    (r"\.pool_([qkv])\.norm_act\.0\.", r".norm_\1."), (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.1\.", "head.projection."),
]  # fmt: skip


def _tv_rules(config: MViTConfig) -> list[Rule]:
    ours = theirs = "blocks.{i}."

    def bare(name: str, key: str, axes: int) -> list[Rule]:
        return transform(name, key, lambda t: t[(None,) * axes], lambda t: t[(0,) * axes])

    return [
        *rename("embed.{weight,bias}", "conv_proj.{weight,bias}"),
        *bare("class_token", "pos_encoding.class_token", 2),
        *bare("positions.prefix_table", "pos_encoding.class_pos", 2),
        *bare("positions.places", "pos_encoding.spatial_pos", 1),
        *bare("positions.frames", "pos_encoding.temporal_pos", 1),
        *_block(ours, theirs, "attn.pool_*.pool.weight", "attn.pool_*.norm_act.0"),
        *rename(ours + "attn.qkv.{weight,bias}", theirs + "attn.qkv.{weight,bias}"),
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attn.project.0.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{0,3}.{weight,bias}"),
        *rename(ours + "proj.{weight,bias}", theirs + "project.{weight,bias}"),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.1.{weight,bias}"),
    ]


def _tv_infer(state: State, files: Files, hints: Hints) -> tuple[MViTConfig, list[str]]:
    return read_config(flat(state, _TV_NAMES), hints)


def _tv_export(config: MViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(
        config, "torchvision", frames=config.frames or 16, class_token=True, pool_mode="conv", mlp_ratio=4.0, qkv_bias=True,
        patch_kernel=(3, 7, 7), patch_stride=(2, 4, 4), norm_eps=1e-6, pool_norm_eps=1e-6,
        position="none" if config.relative else "separable", image_size=(config.image_size[0],) * 2,
    )  # fmt: skip
    return {}


def _plain(config: MViTConfig, project: str, **needed: Any) -> None:
    """Raise CheckpointError when the model has parts that the project's MViT does not know."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )


# timm -----------------------------------------------------------------------------------------------------------------


def _timm_rules(config: MViTConfig) -> list[Rule]:
    shortcut = "shortcut_proj_attn" if config.grow == "attention" else "shortcut_proj_mlp"
    rules, i = [], 0
    for stage, depth in enumerate(config.depths):
        for b in range(depth):
            ours, theirs = f"blocks.{i}.", f"stages.{stage}.blocks.{b}."
            rules += _block(ours, theirs, "attn.pool_*.weight", "attn.norm_*") + _qkv_and_mlp(ours, theirs)
            rules += rename(ours + "proj.{weight,bias}", theirs + shortcut + ".{weight,bias}")
            i += 1
    return [
        *rename("embed.{weight,bias}", "patch_embed.proj.{weight,bias}"),
        *rename("{class_token,positions.table}", "{cls_token,pos_embed}"),
        *rules,
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.fc.{weight,bias}"),
    ]


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[MViTConfig, list[str]]:
    starts, total = {}, 0
    for stage in range(count_blocks(state, "stages.")):
        starts[stage] = total
        total += count_blocks(state, f"stages.{stage}.blocks.")
    plain = {}
    for key, value in flat(state, [(r"^head\.fc\.", "head.projection.")]).items():
        hit = re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", key)
        plain[f"blocks.{starts[int(hit[1])] + int(hit[2])}.{hit[3]}" if hit else key] = value
    return read_config(plain, hints, residual_class="cls_token" in state)


def _timm_card(config: MViTConfig, files: Files) -> ModelCard:
    default = Preprocess(config.image_size, config.in_channels, "crop", 0.9, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    return timm_card(config.image_size, files, default)


def _timm_export(config: MViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    row = next((n for n, v in VARIANTS.items() if v.frames is None and "micro" not in n and v.depths == config.depths), None)
    if row is None or VARIANTS[row].widths != config.widths:
        raise CheckpointError(f"timm has no picture MViT of depths {config.depths} and widths {config.widths}; "
                              "nearest: format='vitrail'")  # fmt: skip
    same = ("frames", "class_token", "pool", "pool_mode", "pool_kernel", "pool_queries", "query_strides", "key_strides", "grow",
            "position", "relative", "residual_pool", "patch_kernel", "patch_stride", "mlp_ratio", "qkv_bias", "norm_eps",
            "pool_norm_eps", "heads")  # fmt: skip
    _plain(config, "timm", image_size=(config.image_size[0],) * 2, **{name: getattr(VARIANTS[row], name) for name in same})
    args: dict[str, Any] = {"img_size": list(config.image_size)}
    if config.in_channels != 3:
        args["in_chans"] = config.in_channels
    return timm_files(row, config, card, args)


# pytorchvideo ---------------------------------------------------------------------------------------------------------

_PTV_NAMES = [
    (r"^patch_embed\.patch_model\.", "patch_embed.proj."), (r"^cls_positional_encoding\.", ""),
    (r"^head\.proj\.", "head.projection."), (r"^norm_embed\.", "norm."),
]  # fmt: skip


def _ptv_rules(config: MViTConfig) -> list[Rule]:
    ours = theirs = "blocks.{i}."
    place = "cls_positional_encoding."
    fused = [
        rule
        for kind in ("weight", "bias")
        for rule in fuse(f"{ours}attn.qkv.{kind}", *(f"{theirs}attn.{part}.{kind}" for part in "qkv"))
    ]
    return [
        *rename("embed.{weight,bias}", "patch_embed.patch_model.{weight,bias}"),
        *rename("{class_token,positions.table}", place + "{cls_token,pos_embed}"),
        *rename("positions.{places,frames,prefix_table}", place + "pos_embed_{spatial,temporal,class}"),
        *_block(ours, theirs, "attn.pool_*.weight", "attn.norm_*"),
        *fused,
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attn.proj.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{fc1,fc2}.{weight,bias}"),
        *rename(ours + "proj.{weight,bias}", theirs + "proj.{weight,bias}"),
        *rename("norm.{weight,bias}", "norm_embed.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.proj.{weight,bias}"),
    ]


def _ptv_infer(state: State, files: Files, hints: Hints) -> tuple[MViTConfig, list[str]]:
    return read_config(flat(state, _PTV_NAMES), hints, pool_norm_eps=1e-5, qkv_bias="blocks.0.attn.q.bias" in state)


def _ptv_export(config: MViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(config, "pytorchvideo", relative=False, residual_pool=False, grow="mlp", pool_queries=False, norm_eps=1e-6)
    if config.pool_mode == "conv":
        _plain(config, "pytorchvideo", pool_norm_eps=1e-5)
    return {}


# PySlowFast, and mvit for pictures ------------------------------------------------------------------------------------


def _own_rules(config: MViTConfig) -> list[Rule]:
    ours = theirs = "blocks.{i}."
    return [
        *rename("embed.{weight,bias}", "patch_embed.proj.{weight,bias}"),
        *rename("{class_token,positions.table}", "{cls_token,pos_embed}"),
        *rename("positions.{places,frames,prefix_table}", "pos_embed_{spatial,temporal,class}"),
        *_block(ours, theirs, "attn.pool_*.weight", "attn.norm_*"),
        *_qkv_and_mlp(ours, theirs),
        *rename(ours + "proj.{weight,bias}", theirs + "proj.{weight,bias}"),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.projection.{weight,bias}"),
    ]


def _own_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some files of picture models hold convolutions over a single frame."""
    if state["patch_embed.proj.weight"].ndim == 5 and all(t.shape[2] == 1 for t in state.values() if t.ndim == 5):
        return {key: torch.squeeze(t, 2) if t.ndim == 5 else t for key, t in state.items()}
    return state


def _own_infer(state: State, files: Files, hints: Hints) -> tuple[MViTConfig, list[str]]:
    return read_config(state, hints)


def _own_card(config: MViTConfig, files: Files) -> ModelCard:
    return _timm_card(config, {}) if config.frames is None else _clip_card(config, files)


def _own_export(config: MViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(config, "PySlowFast", residual_class=False, norm_eps=1e-6, pool_norm_eps=1e-6)
    return {}


def _is_tv(state: State) -> bool:
    return "conv_proj.weight" in state and "pos_encoding.class_token" in state


def _is_timm(state: State) -> bool:
    return "patch_embed.proj.weight" in state and "stages.0.blocks.0.attn.norm_k.weight" in state


def _is_ptv(state: State) -> bool:
    return "patch_embed.patch_model.weight" in state


def _is_own(state: State) -> bool:
    return "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state and "head.projection.weight" in state


SOURCES = (
    Source("torchvision", "mvit", _is_tv, _tv_infer, _tv_rules, _clip_card, _tv_export,
           one_preprocess=True),
    Source("timm", "mvit", _is_timm, _timm_infer, _timm_rules, _timm_card, _timm_export, one_preprocess=True),
    Source("pytorchvideo", "mvit", _is_ptv, _ptv_infer, _ptv_rules, _clip_card, _ptv_export,
           container="model.pyth", inside="model_state", one_preprocess=True),
    Source("pyslowfast", "mvit", _is_own, _own_infer, _own_rules, _own_card, _own_export, _own_clean, "model.pyth",
           inside="model_state", one_preprocess=True),
)  # fmt: skip
