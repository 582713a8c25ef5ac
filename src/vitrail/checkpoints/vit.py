"""ViT checkpoints: timm, transformers, torchvision; Google's own are in `vit_google`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import PositionConfig, grid_side
from vitrail.models.vit import VARIANTS, ViTConfig

from .mapping import CheckpointError, Rule, drop, fuse, rename
from .sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Files,
    Source,
    count_blocks,
    guess_heads,
    timm_card,
    timm_files,
    transformers_card,
    transformers_files,
)

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def build_config(
    state: State, hints: Hints, patch_weight: Tensor, rows: int | None, **known: Any
) -> tuple[ViTConfig, list[str]]:
    """A config from shapes; what shapes cannot tell comes from hints, then from the published variants, and is noted."""
    notes: list[str] = []
    width, channels, *_ = patch_weight.shape
    patch = (patch_weight.shape[2], patch_weight.shape[3])
    position = known.get("position", PositionConfig())
    prefix = int(known["class_token"]) + (known.get("registers", 0) if position.registers else 0)
    config: dict[str, Any] = {"width": width, "in_channels": channels, "patch": patch, **known}
    if rows is not None:
        count = rows - (prefix if position.prefix else 0)
        config["image_size"] = _image_size(count, patch, hints)
    if "heads" not in known:
        config["heads"] = int(hints.get("heads") or guess_heads(width, VARIANTS, notes))
    return ViTConfig(**config), notes


def _image_size(count: int, patch: tuple[int, int], hints: Hints) -> tuple[int, int]:
    asked = hints.get("built_size") or hints.get("image_size")
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else tuple(asked)
        if size[0] // patch[0] * (size[1] // patch[1]) == count:
            return size[0], size[1]
    try:
        side = grid_side(count)
    except ValueError as problem:
        raise CheckpointError(f"{problem}; name the size the weights were built for: built_size=(height, width)") from None
    return side * patch[0], side * patch[1]


# timm -----------------------------------------------------------------------------------------------------------------


def timm_rules(config: ViTConfig) -> list[Rule]:
    """The table of timm's ViT."""
    norm = "fc_norm" if config.norm_after_pool else "norm"
    block = "blocks.{i}."
    return [
        *rename("class_token", "cls_token"),
        *rename("registers", "reg_token"),
        *rename("positions.0.table", "pos_embed"),
        *rename("embed.proj.{weight,bias}", "patch_embed.proj.{weight,bias}"),
        *rename("stem_norm.{weight,bias}", "norm_pre.{weight,bias}"),
        *rename(block + "{norm1,norm2}.{weight,bias}", block + "{norm1,norm2}.{weight,bias}"),
        *rename(block + "attn.{qkv,proj}.{weight,bias}", block + "attn.{qkv,proj}.{weight,bias}"),
        *rename(block + "attn.{q_norm,k_norm}.{weight,bias}", block + "attn.{q_norm,k_norm}.{weight,bias}"),
        *rename(block + "mlp.{fc1,fc2}.{weight,bias}", block + "mlp.{fc1,fc2}.{weight,bias}"),
        *rename(block + "{scale1,scale2}.gain", block + "{ls1,ls2}.gamma"),
        *rename("norm.{weight,bias}", norm + ".{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.{weight,bias}"),
        *rename("head.representation.{weight,bias}", "pre_logits.fc.{weight,bias}"),
    ]


def timm_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    """The config of a file in timm's names."""
    token, registers = "cls_token" in state, state["reg_token"].shape[1] if "reg_token" in state else 0
    rows = state["pos_embed"].shape[1] if "pos_embed" in state else None
    args = files.get("config.json", {}).get("model_args", {}) or {}
    patch = state["patch_embed.proj.weight"].shape[2:]
    known: dict[str, Any] = {}
    if args.get("num_heads"):
        known["heads"] = int(args["num_heads"])
    if registers or args.get("no_embed_class"):  # the published register models give positions to patches only
        covered = rows is not None and _is_grid(rows - token - registers, patch, hints) and not args.get("no_embed_class")
        known["position"] = PositionConfig(prefix=bool(covered and not _is_grid(rows or 0, patch, hints)))
    if rows is None:
        known["position"] = PositionConfig(kind="none")
    pooled = "fc_norm.weight" in state
    hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * hidden
    return build_config(
        state, hints, state["patch_embed.proj.weight"], rows,
        class_token=token, registers=registers, depth=count_blocks(state, "blocks."),
        mlp_dim=hidden, mlp="swiglu" if gated else "plain", num_classes=_classes(state, "head.weight"),
        pool="cls" if token and not pooled else "mean", norm_after_pool=pooled,
        qkv_bias="blocks.0.attn.qkv.bias" in state, qk_norm="blocks.0.attn.q_norm.weight" in state,
        stem_norm="norm_pre.weight" in state, patch_bias="patch_embed.proj.bias" in state,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else None,
        representation=state["pre_logits.fc.weight"].shape[0] if "pre_logits.fc.weight" in state else None, **known,
    )  # fmt: skip


def _is_grid(count: int, patch: Any, hints: Hints) -> bool:
    try:
        _image_size(count, tuple(patch), hints)
    except CheckpointError:
        return False
    return True


def _classes(state: State, key: str) -> int:
    return state[key].shape[0] if key in state else 0


def _timm_card(config: ViTConfig, files: Files) -> ModelCard:
    fraction = 0.9 if config.image_size[0] < 384 else 1.0
    return timm_card(config.image_size, files, Preprocess(channels=config.in_channels, crop_fraction=fraction))


def _timm_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    check_plain(config, "timm", activation="gelu", norm_eps=1e-6)
    args = timm_args(config)
    if config.mlp == "swiglu":  # timm's configurations cannot say it, but this architecture has it; one layer makes both halves
        return timm_files("vit_giant_patch14_dinov2", config, card, args | {"mlp_ratio": 2 * config.mlp_dim / config.width})
    return timm_files("vit_base_patch16_224", config, card, args)


def timm_args(config: ViTConfig) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer."""
    args: dict[str, Any] = {
        "img_size": list(config.image_size), "patch_size": config.patch[0], "embed_dim": config.width, "depth": config.depth,
        "num_heads": config.heads, "mlp_ratio": config.mlp_dim / config.width, "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm, "init_values": config.layer_scale, "class_token": config.class_token,
        "reg_tokens": config.registers, "no_embed_class": not config.position.prefix, "pre_norm": config.stem_norm,
        "global_pool": "token" if config.pool == "cls" else "avg", "fc_norm": config.norm_after_pool,
        "pos_embed": "none" if config.position.kind == "none" else "learn",
    }  # fmt: skip
    if config.patch[0] != config.patch[1]:
        args["patch_size"] = list(config.patch)
    if config.in_channels != 3:
        args["in_chans"] = config.in_channels
    return args


def check_plain(config: ViTConfig, project: str, **needed: Any) -> None:
    """Raise CheckpointError when the model has parts that the project's ViT does not know."""
    needed = {"representation": None, "patch_bias": not config.stem_norm} | needed
    if project != "timm":
        needed["mlp"] = "plain"
    if config.position.kind == "1d" and config.registers and config.position.prefix:
        needed["position"] = dataclasses.replace(needed.get("position", config.position), registers=True)
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )
    c = config.position
    if c.kind not in ("1d", "none") or (c.kind == "1d" and c.place != "stem") or config.pool in ("attention", "cls_mean"):
        raise CheckpointError(
            f"{project} cannot hold position.kind={c.kind!r} at {c.place!r}, pool={config.pool!r}; nearest: format='vitrail'"
        )


# transformers ---------------------------------------------------------------------------------------------------------


def hf_rules(config: ViTConfig) -> list[Rule]:
    """The table of transformers' ViT, in the names of its files."""
    ours, theirs = "blocks.{i}.", "vit.encoder.layer.{i}."
    part = theirs + "attention.attention.{name}.{kind}"
    return [
        *rename("class_token", "vit.embeddings.cls_token"),
        *rename("mask_token", "vit.embeddings.mask_token"),
        *rename("positions.0.table", "vit.embeddings.position_embeddings"),
        *rename("embed.proj.{weight,bias}", "vit.embeddings.patch_embeddings.projection.{weight,bias}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{layernorm_before,layernorm_after}.{weight,bias}"),
        *[
            rule
            for kind in ("weight", "bias")
            for rule in fuse(
                ours + f"attn.qkv.{kind}",
                *(part.replace("{name}", name).replace("{kind}", kind) for name in ("query", "key", "value")),
            )
        ],
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attention.output.dense.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "{intermediate,output}.dense.{weight,bias}"),
        *rename("norm.{weight,bias}", "vit.layernorm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.{weight,bias}"),
        *rename("head.representation.{weight,bias}", "vit.pooler.dense.{weight,bias}"),
        *drop("decoder.0.{weight,bias}"),
    ]


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (ViTModel) are saved without the "vit." prefix."""
    outside = ("vit.", "classifier.", "decoder.")
    return {key if key.startswith(outside) else f"vit.{key}": value for key, value in state.items()}


def hf_settings(files: Files) -> dict[str, Any]:
    """What transformers' config.json tells beyond shapes: activation, epsilon and heads. Raises CheckpointError if unknown."""
    settings = files.get("config.json", {})
    activation = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
                  "quick_gelu": "quick_gelu"}.get(settings.get("hidden_act", "gelu"))  # fmt: skip
    if activation is None:
        raise CheckpointError(
            f"config.json: hidden_act {settings['hidden_act']!r} is not known here; allowed: gelu and its variants"
        )
    known = {"activation": activation, "norm_eps": float(settings.get("layer_norm_eps", 1e-12))}
    if settings.get("num_attention_heads"):
        known["heads"] = int(settings["num_attention_heads"])
    return known


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    layer = "vit.encoder.layer.0."
    return build_config(
        state, hints, state["vit.embeddings.patch_embeddings.projection.weight"],
        state["vit.embeddings.position_embeddings"].shape[1],
        class_token=True, depth=count_blocks(state, "vit.encoder.layer."),
        mlp_dim=state[layer + "intermediate.dense.weight"].shape[0], num_classes=_classes(state, "classifier.weight"),
        qkv_bias=layer + "attention.attention.query.bias" in state, mask_token="vit.embeddings.mask_token" in state,
        position=PositionConfig(resize="bicubic_plain"),
        representation=state["vit.pooler.dense.weight"].shape[0] if "vit.pooler.dense.weight" in state else None,
        **hf_settings(files),
    )  # fmt: skip


def _hf_card(config: ViTConfig, files: Files) -> ModelCard:
    return transformers_card(config.image_size, files, Preprocess(channels=config.in_channels))


def _hf_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    check_plain(
        config, "transformers", registers=0, class_token=True, pool="cls", qk_norm=False, stem_norm=False, layer_scale=None,
        norm_after_pool=False, position=dataclasses.replace(config.position, kind="1d", prefix=True),
    )  # fmt: skip
    return transformers_files(config, card, hf_config(config, "ViTForImageClassification", "vit"), "ViTImageProcessor")


def hf_config(config: ViTConfig, architecture: str, kind: str) -> dict[str, Any]:
    """The settings of transformers' config.json."""
    square = config.patch[0] == config.patch[1] and config.image_size[0] == config.image_size[1]
    return {
        "architectures": [architecture], "model_type": kind, "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "intermediate_size": config.mlp_dim,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}[config.activation],
        "layer_norm_eps": config.norm_eps, "num_channels": config.in_channels, "qkv_bias": config.qkv_bias,
        "image_size": config.image_size[0] if square else list(config.image_size),
        "patch_size": config.patch[0] if square else list(config.patch),
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
    }  # fmt: skip


# torchvision ----------------------------------------------------------------------------------------------------------


def _tv_rules(config: ViTConfig) -> list[Rule]:
    ours, theirs = "blocks.{i}.", "encoder.layers.encoder_layer_{i}."
    return [
        *rename("class_token", "class_token"),
        *rename("positions.0.table", "encoder.pos_embedding"),
        *rename("embed.proj.{weight,bias}", "conv_proj.{weight,bias}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{ln_1,ln_2}.{weight,bias}"),
        *rename(ours + "attn.qkv.{weight,bias}", theirs + "self_attention.{in_proj_weight,in_proj_bias}"),
        *rename(ours + "attn.proj.{weight,bias}", theirs + "self_attention.out_proj.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{0,3}.{weight,bias}"),
        *rename("norm.{weight,bias}", "encoder.ln.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "heads.head.{weight,bias}"),
        *rename("head.representation.{weight,bias}", "heads.pre_logits.{weight,bias}"),
    ]


def _tv_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights published before the MLP was a Sequential call its layers linear_1 and linear_2."""
    return {key.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3."): value for key, value in state.items()}


def _tv_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    return build_config(
        state, hints, state["conv_proj.weight"], state["encoder.pos_embedding"].shape[1],
        class_token=True, depth=count_blocks(state, "encoder.layers.encoder_layer_"),
        mlp_dim=state["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0],
        num_classes=_classes(state, "heads.head.weight"), position=PositionConfig(resize="bicubic_plain"),
        representation=state["heads.pre_logits.weight"].shape[0] if "heads.pre_logits.weight" in state else None,
    )  # fmt: skip


def _tv_card(config: ViTConfig, files: Files) -> ModelCard:
    made = Preprocess(config.image_size, config.in_channels, "crop", 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    return ModelCard(preprocess=made)


def _tv_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    check_plain(config, "torchvision", registers=0, class_token=True, pool="cls", qk_norm=False, stem_norm=False, qkv_bias=True,
           layer_scale=None, norm_after_pool=False, norm_eps=1e-6, activation="gelu", mask_token=False,
           position=dataclasses.replace(config.position, kind="1d", prefix=True))  # fmt: skip
    return {}


def _tv_peer(config: ViTConfig) -> nn.Module:
    from torchvision.models import VisionTransformer

    if config.image_size[0] != config.image_size[1] or config.patch[0] != config.patch[1]:
        raise CheckpointError(f"torchvision's ViT takes squares, not {config.image_size} in patches of {config.patch}")
    return VisionTransformer(
        config.image_size[0], config.patch[0], config.depth, config.heads, config.width, config.mlp_dim,
        num_classes=config.num_classes, representation_size=config.representation,
    )  # fmt: skip


def _is_timm(state: State) -> bool:
    patch = state.get("patch_embed.proj.weight")
    vit = patch is not None and patch.ndim == 4 and "blocks.0.attn.qkv.weight" in state
    hybrid = any(key.startswith("patch_embed.backbone.") for key in state)
    dinov2 = "mask_token" in state and "blocks.0.ls1.gamma" in state
    return vit and not hybrid and not dinov2 and "dist_token" not in state and "time_embed" not in state  # DeiT, TimeSformer


def _is_hf(state: State) -> bool:
    patch = any(key.endswith("embeddings.patch_embeddings.projection.weight") and t.ndim == 4 for key, t in state.items())
    others = ("embeddings.distillation_token", "encoder.layer.0.layer_scale1.lambda1")  # a DeiT, a DINOv2
    other = any(key.endswith(others) for key in state)
    return patch and not other and any(key.endswith("encoder.layer.0.attention.attention.query.weight") for key in state)


def _is_tv(state: State) -> bool:
    return "conv_proj.weight" in state and "encoder.pos_embedding" in state


_GUESS = (
    "guess: preprocessing of AugReg (mean and std 0.5, bicubic); a plain DeiT has the same names and shapes and wants "
    "ImageNet's mean and std: preprocess=Preprocess(...) decides"
)

SOURCES = (
    Source("timm", "vit", _is_timm, timm_infer, timm_rules, _timm_card, _timm_export, guess=_GUESS),
    Source("transformers", "vit", _is_hf, _hf_infer, hf_rules, _hf_card, _hf_export, _hf_clean),
    Source("torchvision", "vit", _is_tv, _tv_infer, _tv_rules, _tv_card, _tv_export, _tv_clean, peer=_tv_peer),
)
