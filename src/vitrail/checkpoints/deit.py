"""Checkpoints of distilled DeiTs: timm (and the original repository, whose names are the same), transformers.

A plain DeiT has the names of a ViT and is read as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import PositionConfig
from vitrail.models.deit import DeiTConfig
from vitrail.models.vit import ViTConfig

from . import vit
from .mapping import CheckpointError, Rule, drop, leave, rename
from .sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Files,
    Source,
    count_blocks,
    timm_card,
    timm_files,
    transformers_card,
    transformers_files,
)

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def _config(backbone: ViTConfig, num_classes: int, prediction: str) -> DeiTConfig:
    names = {f.name for f in dataclasses.fields(DeiTConfig)} & {f.name for f in dataclasses.fields(ViTConfig)}
    shared = {name: getattr(backbone, name) for name in names}
    return DeiTConfig(**{**shared, "num_classes": num_classes, "prediction": prediction})


def _of_backbone(rules: list[Rule]) -> list[Rule]:
    """The rules of a ViT's encoder, for the ViT inside a DeiT; tokens and heads have rules of their own."""
    own = ("head.", "registers")
    return [
        dataclasses.replace(rule, ours=f"backbone.{rule.ours}") for rule in rules if rule.ours and not rule.ours.startswith(own)
    ]


def _default(config: DeiTConfig) -> Preprocess:
    """The evaluation of the original repository."""
    return Preprocess(config.image_size, config.in_channels, "crop", 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


# timm -----------------------------------------------------------------------------------------------------------------


def _timm_rules(config: DeiTConfig) -> list[Rule]:
    return [
        *_of_backbone(vit.timm_rules(config.backbone)),
        *rename("backbone.registers", "dist_token"),
        *rename("head.{linear,distilled}.{weight,bias}", "{head,head_dist}.{weight,bias}"),
    ]


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[DeiTConfig, list[str]]:
    args = files.get("config.json", {}).get("model_args", {}) or {}
    known = {"heads": int(args["num_heads"])} if args.get("num_heads") else {}
    backbone, notes = vit.build_config(
        state, hints, state["patch_embed.proj.weight"], state["pos_embed"].shape[1], class_token=True, registers=1,
        depth=count_blocks(state, "blocks."), mlp_dim=state["blocks.0.mlp.fc1.weight"].shape[0],
        qkv_bias="blocks.0.attn.qkv.bias" in state, **known,
    )  # fmt: skip
    return _config(backbone, state["head.weight"].shape[0] if "head.weight" in state else 0, "joint"), notes


def _timm_card(config: DeiTConfig, files: Files) -> ModelCard:
    return timm_card(config.image_size, files, _default(config))


def _timm_export(config: DeiTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "timm", activation="gelu", norm_eps=1e-6)
    if config.prediction != "joint":
        raise CheckpointError(
            f"timm's distilled model answers with the mean of both heads, not prediction={config.prediction!r}; "
            "load with prediction='joint' to write it, or format='vitrail'"
        )
    args = {name: value for name, value in vit.timm_args(config.backbone).items() if name in _TIMM_ARGS}
    files = timm_files("deit_base_distilled_patch16_224", config, card, args)
    files["config.json"]["pretrained_cfg"]["classifier"] = ["head", "head_dist"]
    return files


_TIMM_ARGS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "in_chans")


def _check(config: DeiTConfig, project: str, **needed: Any) -> None:
    position = dataclasses.replace(config.position, kind="1d", prefix=True)
    vit.check_plain(config.backbone, project, position=position, **needed)


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: DeiTConfig) -> list[Rule]:
    """DeiTForImageClassificationWithTeacher; with prediction "class" DeiTForImageClassification, which has one head."""
    encoder = _of_backbone(vit.hf_rules(config.backbone))
    if config.prediction == "class":
        heads = rename("head.linear.{weight,bias}", "classifier.{weight,bias}") + leave("head.distilled.{weight,bias}")
    else:
        names = "{cls_classifier,distillation_classifier}.{weight,bias}"
        heads = rename("head.{linear,distilled}.{weight,bias}", names)
    return [
        *(dataclasses.replace(r, theirs=tuple(t.replace("vit.", "deit.", 1) for t in r.theirs)) for r in encoder),
        *rename("backbone.registers", "deit.embeddings.distillation_token"),
        *heads,
        *drop("deit.pooler.dense.{weight,bias}", "deit.embeddings.mask_token"),
    ]


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (DeiTModel) are saved without the "deit." prefix."""
    outside = ("deit.", "classifier.", "cls_classifier.", "distillation_classifier.")
    return {key if key.startswith(outside) else f"deit.{key}": value for key, value in state.items()}


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[DeiTConfig, list[str]]:
    layer, one = "deit.encoder.layer.0.", "classifier.weight" in state
    backbone, notes = vit.build_config(
        state, hints, state["deit.embeddings.patch_embeddings.projection.weight"],
        state["deit.embeddings.position_embeddings"].shape[1], class_token=True, registers=1,
        depth=count_blocks(state, "deit.encoder.layer."), mlp_dim=state[layer + "intermediate.dense.weight"].shape[0],
        qkv_bias=layer + "attention.attention.query.bias" in state, position=PositionConfig(resize="bicubic_plain"),
        **vit.hf_settings(files),
    )  # fmt: skip
    if one:
        notes.append("the file has no distillation head: it is left at zero, and the class head alone answers")
    head = state.get("classifier.weight", state.get("cls_classifier.weight"))
    return _config(backbone, 0 if head is None else head.shape[0], "class" if one else "joint"), notes


def _hf_card(config: DeiTConfig, files: Files) -> ModelCard:
    card = transformers_card(config.image_size, files, _default(config))
    return card if "preprocessor_config.json" in files else dataclasses.replace(card, preprocess=_default(config))


def _hf_export(config: DeiTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "transformers")
    if config.prediction == "distillation":
        raise CheckpointError(
            "transformers has no DeiT that answers with the distillation head alone; "
            "load with prediction='joint' (or 'class') to write it, or format='vitrail'"
        )
    name = "DeiTForImageClassification" + ("WithTeacher" if config.prediction == "joint" else "")
    return transformers_files(config, card, vit.hf_config(config.backbone, name, "deit"), "DeiTImageProcessor")


def _is_timm(state: State) -> bool:
    return "dist_token" in state and "patch_embed.proj.weight" in state and "blocks.0.attn.qkv.weight" in state


def _is_hf(state: State) -> bool:
    return any(key.endswith("embeddings.distillation_token") for key in state)


SOURCES = (
    Source("timm", "deit", _is_timm, _timm_infer, _timm_rules, _timm_card, _timm_export),
    Source("transformers", "deit", _is_hf, _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean),
)
