"""Checkpoints of hybrid ViTs: timm, and Google's .npz (vision_transformer, before and after AugReg)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.models.bit import TrunkConfig
from vitrail.models.hybrid import VARIANTS, HybridConfig
from vitrail.models.vit import ViTConfig

from . import vit, vit_google
from .bit import find_stages, need, timm_trunk_rules, told
from .mapping import CheckpointError, Rule, convolution, rename, transform, transpose
from .sources import Files, Source, timm_card, timm_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]
# What the two sources have built in, and no weight tells.
_TIMM: dict[str, Any] = {"norm_eps": 1e-5, "std_rule": "variance", "std_eps": 1e-8}
_GOOGLE: dict[str, Any] = {"norm_eps": 1e-6, "std_rule": "deviation", "std_eps": 1e-5}
_BOTH: dict[str, Any] = {"groups": 32, "preactivation": False, "padding": "same", "stem_pool": "same"}


def _of_backbone(rules: list[Rule]) -> list[Rule]:
    """The rules of a ViT's encoder, for the ViT inside a hybrid."""
    return [dataclasses.replace(r, ours=f"backbone.{r.ours}") for r in rules if r.ours and not r.ours.startswith("head.")]


def _in_cells(hints: Hints, trunk: TrunkConfig) -> dict[str, Any]:
    """The user's sizes in cells of the feature map, which is what the ViT's table counts."""
    cells = {}
    for name in ("built_size", "image_size"):
        if hints.get(name) is not None:
            size = (hints[name], hints[name]) if isinstance(hints[name], int) else hints[name]
            cells[name] = tuple(-(-side // trunk.stride) for side in size)
    return {**hints, **cells}


def _config(backbone: ViTConfig, trunk: TrunkConfig, channels: int) -> HybridConfig:
    names = {f.name for f in dataclasses.fields(HybridConfig)}
    for f in dataclasses.fields(ViTConfig):
        found, plain = getattr(backbone, f.name), f.default
        if f.name not in names and found != plain:
            raise CheckpointError(f"a hybrid with {f.name}={found!r} has no model here; hybrids have {f.name}={plain!r}")
    shared = {f.name: getattr(backbone, f.name) for f in dataclasses.fields(ViTConfig) if f.name in names}
    size = (backbone.image_size[0] * trunk.stride, backbone.image_size[1] * trunk.stride)
    return HybridConfig(**{**shared, "image_size": size, "in_channels": channels, "trunk": trunk})


# timm -----------------------------------------------------------------------------------------------------------------

_TIMM_TRUNK = "patch_embed.backbone."


def _timm_rules(config: HybridConfig) -> list[Rule]:
    return [
        *timm_trunk_rules("", _TIMM_TRUNK, config.trunk.depths),
        *_of_backbone(vit.timm_rules(config.backbone)),
        *rename("head.linear.{weight,bias}", "head.{weight,bias}"),
        *rename("head.representation.{weight,bias}", "pre_logits.fc.{weight,bias}"),
    ]


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[HybridConfig, list[str]]:
    depths, widths = find_stages(state, lambda s, i: f"{_TIMM_TRUNK}stages.{s}.blocks.{i}.conv3.weight")
    stem = state[f"{_TIMM_TRUNK}stem.conv.weight" if depths else f"{_TIMM_TRUNK}conv.weight"]
    trunk = TrunkConfig(depths, widths, stem.shape[0], **_BOTH | _TIMM | told(hints))
    backbone, notes = vit.timm_infer(state, files, _in_cells(hints, trunk))
    return _config(backbone, trunk, stem.shape[1]), notes


def _timm_card(config: HybridConfig, files: Files) -> ModelCard:
    fraction = 0.9 if config.image_size[0] < 384 else 1.0
    return timm_card(config.image_size, files, Preprocess(channels=config.in_channels, crop_fraction=fraction))


def _timm_export(config: HybridConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    vit.check_plain(config.backbone, "timm", activation="gelu", norm_eps=1e-6)
    need(config, "timm", representation=None)
    need(config.trunk, "timm", **_BOTH | _TIMM)
    sizes = (config.trunk.depths, config.trunk.widths, config.trunk.stem_width)
    named = {(c.trunk.depths, c.trunk.widths, c.trunk.stem_width): name for name, c in VARIANTS.items()}
    if sizes not in named or "micro" in named[sizes]:
        raise CheckpointError(f"timm has no hybrid on {sizes[0]} blocks of {sizes[1]} channels; nearest: format='vitrail'")
    architecture = {(): "vit_tiny_r_s16_p8_224", (2, 2, 2, 2): "vit_small_r26_s32_224", (3, 4, 9): "vit_base_r50_s16_224"}
    args = {**vit.timm_args(config.backbone), "img_size": list(config.image_size), "in_chans": config.in_channels}
    return timm_files(architecture.get(sizes[0], "vit_large_r50_s32_224"), config, card, args)


# Google ---------------------------------------------------------------------------------------------------------------


def _google_rules(config: HybridConfig) -> list[Rule]:
    rules = [
        *convolution("stem.conv.weight", "conv_root/kernel"),
        *_norm("stem.norm", "gn_root"),
        *_of_backbone(vit_google.rules(config.backbone)),
        *transpose("head.{representation,linear}.weight", "{pre_logits,head}/kernel"),
        *rename("head.{representation,linear}.bias", "{pre_logits,head}/bias"),
    ]
    for s, depth in enumerate(config.trunk.depths):
        for i in range(depth):  # counted from 1
            ours, theirs = f"stages.{s}.{i}.", f"block{s + 1}/unit{i + 1}/"
            rules += convolution(ours + "{conv1,conv2,conv3,shortcut}.weight", theirs + "{conv1,conv2,conv3,conv_proj}/kernel")
            for norm, name in (("norm1", "gn1"), ("norm2", "gn2"), ("norm3", "gn3"), ("shortcut_norm", "gn_proj")):
                rules += _norm(ours + norm, theirs + name)
    return rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    """A group norm, (1, 1, 1, channels) in the published files; newer ones, which are flat, are read too."""
    return transform(
        ours + ".{weight,bias}", theirs + "/{scale,bias}", lambda t: t.reshape(-1), lambda t: t.reshape(1, 1, 1, -1)
    )


def _google_infer(state: State, files: Files, hints: Hints) -> tuple[HybridConfig, list[str]]:
    depths, widths = find_stages(state, lambda s, i: f"block{s + 1}/unit{i + 1}/conv3/kernel", axis=3)
    stem = state["conv_root/kernel"]
    trunk = TrunkConfig(depths, widths, stem.shape[3], **_BOTH | _GOOGLE | told(hints))
    backbone, notes = vit_google.infer(state, files, _in_cells(hints, trunk))
    return _config(backbone, trunk, stem.shape[2]), notes


def _google_card(config: HybridConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=Preprocess(config.image_size, config.in_channels, "stretch", 1.0, "bilinear"))


def _google_export(config: HybridConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    need(config.trunk, "Google's npz", **_BOTH | _GOOGLE)
    return vit_google.export(config.backbone, card)


def _is_timm(state: State) -> bool:
    stems = (f"{_TIMM_TRUNK}stem.conv.weight", f"{_TIMM_TRUNK}conv.weight")
    return any(stem in state for stem in stems) and "blocks.0.attn.qkv.weight" in state


def _is_google(state: State) -> bool:
    return any(key.endswith("conv_root/kernel") for key in state)


SOURCES = (
    Source("timm", "hybrid", _is_timm, _timm_infer, _timm_rules, _timm_card, _timm_export, one_preprocess=True),
    Source(
        "google", "hybrid", _is_google, _google_infer, _google_rules, _google_card, _google_export, vit_google.clean,
        container="model.npz", one_preprocess=True,
    ),
)  # fmt: skip
