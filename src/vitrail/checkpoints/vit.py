"""ViT checkpoints: timm, transformers, torchvision, and Google's .npz (vision_transformer before and after linen, big_vision)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import PositionConfig, grid_side
from vitrail.models.vit import VARIANTS, ViTConfig

from .mapping import CheckpointError, Rule, convolution, drop, fuse, rename, transform, transpose
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


def _build(state: State, hints: Hints, patch_weight: Tensor, rows: int | None, **known: Any) -> tuple[ViTConfig, list[str]]:
    """A config from shapes; what shapes cannot tell comes from hints, then from the published variants, and is noted."""
    notes: list[str] = []
    width, channels, *patch = patch_weight.shape
    prefix = int(known["class_token"]) + known.get("registers", 0)
    position = known.get("position", PositionConfig())
    config: dict[str, Any] = {"width": width, "in_channels": channels, "patch": tuple(patch), **known}
    if rows is not None:
        count = rows - (prefix if position.prefix else 0)
        config["image_size"] = _image_size(count, tuple(patch), hints)
    if "heads" not in known:
        config["heads"] = int(hints.get("heads") or _guess_heads(width, notes))
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


def _guess_heads(width: int, notes: list[str]) -> int:
    published = {c.width: c.heads for c in VARIANTS.values()}
    heads = published.get(width) or max(1, width // 64)
    while width % heads:
        heads -= 1
    if width not in published:
        notes.append(f"guess: {heads} heads (the weights do not tell; heads=... decides)")
    return heads


# timm -----------------------------------------------------------------------------------------------------------------


def _timm_rules(config: ViTConfig) -> list[Rule]:
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


def _timm_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
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
    return _build(
        state, hints, state["patch_embed.proj.weight"], rows,
        class_token=token, registers=registers, depth=count_blocks(state, "blocks."),
        mlp_dim=state["blocks.0.mlp.fc1.weight"].shape[0], num_classes=_classes(state, "head.weight"),
        pool="cls" if token and not pooled else "mean", norm_after_pool=pooled,
        qkv_bias="blocks.0.attn.qkv.bias" in state, qk_norm="blocks.0.attn.q_norm.weight" in state,
        stem_norm="norm_pre.weight" in state, patch_bias="patch_embed.proj.bias" in state, layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else None,
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
    _plain(config, "timm", activation="gelu", norm_eps=1e-6)
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
    return timm_files("vit_base_patch16_224", config, card, args)


def _plain(config: ViTConfig, project: str, **needed: Any) -> None:
    """Raise CheckpointError when the model has parts that the project's ViT does not know."""
    needed = {"representation": None, "patch_bias": not config.stem_norm} | needed
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'")
    c = config.position
    if c.kind not in ("1d", "none") or (c.kind == "1d" and c.place != "stem") or config.pool == "attention":
        raise CheckpointError(
            f"{project} cannot hold position.kind={c.kind!r} at {c.place!r} with pool={config.pool!r}; nearest: format='vitrail'"
        )


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: ViTConfig) -> list[Rule]:
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


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    settings = files.get("config.json", {})
    activation = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
                  "quick_gelu": "quick_gelu"}.get(settings.get("hidden_act", "gelu"))  # fmt: skip
    if activation is None:
        raise CheckpointError(f"config.json: hidden_act {settings['hidden_act']!r} is not known here; allowed: gelu and its variants")
    known: dict[str, Any] = {}
    if settings.get("num_attention_heads"):
        known["heads"] = int(settings["num_attention_heads"])
    layer = "vit.encoder.layer.0."
    return _build(
        state, hints, state["vit.embeddings.patch_embeddings.projection.weight"],
        state["vit.embeddings.position_embeddings"].shape[1],
        class_token=True, depth=count_blocks(state, "vit.encoder.layer."),
        mlp_dim=state[layer + "intermediate.dense.weight"].shape[0], num_classes=_classes(state, "classifier.weight"),
        qkv_bias=layer + "attention.attention.query.bias" in state, norm_eps=float(settings.get("layer_norm_eps", 1e-12)),
        activation=activation, mask_token="vit.embeddings.mask_token" in state,
        position=PositionConfig(resize="bicubic_plain"),
        representation=state["vit.pooler.dense.weight"].shape[0] if "vit.pooler.dense.weight" in state else None, **known,
    )  # fmt: skip


def _hf_card(config: ViTConfig, files: Files) -> ModelCard:
    return transformers_card(config.image_size, files, Preprocess(channels=config.in_channels))


def _hf_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(config, "transformers", registers=0, class_token=True, pool="cls", qk_norm=False, stem_norm=False,
           layer_scale=None, norm_after_pool=False, position=dataclasses.replace(config.position, kind="1d", prefix=True))  # fmt: skip
    square = config.patch[0] == config.patch[1] and config.image_size[0] == config.image_size[1]
    settings = {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "intermediate_size": config.mlp_dim,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}[config.activation],
        "layer_norm_eps": config.norm_eps, "num_channels": config.in_channels, "qkv_bias": config.qkv_bias,
        "image_size": config.image_size[0] if square else list(config.image_size),
        "patch_size": config.patch[0] if square else list(config.patch),
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
    }  # fmt: skip
    return transformers_files(config, card, settings, "ViTImageProcessor")


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
    return _build(
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
    _plain(config, "torchvision", registers=0, class_token=True, pool="cls", qk_norm=False, stem_norm=False, qkv_bias=True,
           layer_scale=None, norm_after_pool=False, norm_eps=1e-6, activation="gelu", mask_token=False,
           position=dataclasses.replace(config.position, kind="1d", prefix=True))  # fmt: skip
    return {}


# Google ---------------------------------------------------------------------------------------------------------------


def _google_rules(config: ViTConfig) -> list[Rule]:
    ours, theirs = "blocks.{i}.", "Transformer/encoderblock_{i}/"
    attention, d = theirs + "MultiHeadDotProductAttention_1/", config.width // config.heads
    heads, width = config.heads, config.width
    return [
        *rename("class_token", "cls"),
        *rename("positions.0.table", "Transformer/posembed_input/pos_embedding" if config.position.prefix else "pos_embedding"),
        *convolution("embed.proj.weight", "embedding/kernel"),
        *rename("embed.proj.bias", "embedding/bias"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{LayerNorm_0,LayerNorm_2}/{scale,bias}"),
        *fuse(
            ours + "attn.qkv.weight", *(f"{attention}{name}/kernel" for name in ("query", "key", "value")),
            read=lambda t: t.reshape(width, width).T, write=lambda t: t.T.reshape(width, heads, d),
        ),
        *fuse(
            ours + "attn.qkv.bias", *(f"{attention}{name}/bias" for name in ("query", "key", "value")),
            read=lambda t: t.reshape(width), write=lambda t: t.reshape(heads, d),
        ),
        *transform(
            ours + "attn.proj.weight", attention + "out/kernel",
            lambda t: t.reshape(width, width).T, lambda t: t.T.reshape(heads, d, width),
        ),
        *rename(ours + "attn.proj.bias", attention + "out/bias"),
        *transpose(ours + "mlp.{fc1,fc2}.weight", theirs + "MlpBlock_3/{Dense_0,Dense_1}/kernel"),
        *rename(ours + "mlp.{fc1,fc2}.bias", theirs + "MlpBlock_3/{Dense_0,Dense_1}/bias"),
        *rename("norm.{weight,bias}", "Transformer/encoder_norm/{scale,bias}"),
        *transpose("head.representation.weight", "pre_logits/kernel"),
        *rename("head.representation.bias", "pre_logits/bias"),
        *transpose("head.linear.weight", "head/kernel"),
        *rename("head.linear.bias", "head/bias"),
        *_google_pool_rules(config),
    ]  # fmt: skip


def _google_pool_rules(config: ViTConfig) -> list[Rule]:
    ours, theirs, width, heads = "attention_pool.", "MAPHead_0/", config.width, config.heads
    attention, d = theirs + "MultiHeadDotProductAttention_0/", config.width // config.heads
    kernel = {"read": lambda t: t.reshape(width, width).T, "write": lambda t: t.T.reshape(width, heads, d)}
    bias = {"read": lambda t: t.reshape(width), "write": lambda t: t.reshape(heads, d)}
    return [
        *rename(ours + "probe", theirs + "probe"),
        *transform(ours + "q.weight", attention + "query/kernel", **kernel),
        *transform(ours + "q.bias", attention + "query/bias", **bias),
        *fuse(ours + "kv.weight", attention + "key/kernel", attention + "value/kernel", **kernel),
        *fuse(ours + "kv.bias", attention + "key/bias", attention + "value/bias", **bias),
        *transform(
            ours + "proj.weight", attention + "out/kernel",
            lambda t: t.reshape(width, width).T, lambda t: t.T.reshape(heads, d, width),
        ),
        *rename(ours + "proj.bias", attention + "out/bias"),
        *rename(ours + "norm.{weight,bias}", theirs + "LayerNorm_0/{scale,bias}"),
        *transpose(ours + "mlp.{fc1,fc2}.weight", theirs + "MlpBlock_0/{Dense_0,Dense_1}/kernel"),
        *rename(ours + "mlp.{fc1,fc2}.bias", theirs + "MlpBlock_0/{Dense_0,Dense_1}/bias"),
    ]  # fmt: skip


_LINEN = ((r"MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"), (r"LayerNorm_1", "LayerNorm_2"), (r"MlpBlock_0", "MlpBlock_3"))
_ROOTS = ("params/", "opt/target/", "target/", "img/")


def _google_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published pre-linen names: subtrees opened, layers under a scan unstacked, old places of the position table."""
    for root in _ROOTS:
        if any(key.startswith(root + "Transformer/") for key in state):
            state = {key.removeprefix(root): value for key, value in state.items() if key.startswith(root)}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("Transformer/encoderblock/"):  # big_vision's scan=True: one leading axis of layers
            for i, part in enumerate(value):
                out[key.replace("encoderblock/", f"encoderblock_{i}/")] = part
        else:
            out[key] = value
    for pattern, name in _LINEN:
        block = re.compile(r"(Transformer/encoderblock_\d+/)" + pattern + r"\b")
        out = {block.sub(rf"\g<1>{name}", key): value for key, value in out.items()}
    out = {("pos_embedding" if key == "Transformer/pos_embedding" else key): value for key, value in out.items()}
    if "probe" in out:  # a MAP head inlined at the top level
        inlined = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
        out = {f"MAPHead_0/{key}" if key.startswith(inlined) else key: value for key, value in out.items()}
    return out


def _google_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    own = "Transformer/posembed_input/pos_embedding"
    table = state.get(own, state.get("pos_embedding"))
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    token, pool = "cls" in state, "cls" if "cls" in state else "mean"
    return _build(
        state, hints, state["embedding/kernel"].permute(3, 2, 0, 1), None if table is None else table.shape[1],
        class_token=token, pool="attention" if "MAPHead_0/probe" in state else pool,
        depth=count_blocks(state, "Transformer/encoderblock_", "/"), heads=state[attention].shape[1],
        mlp_dim=state["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[1],
        num_classes=state["head/kernel"].shape[1] if "head/kernel" in state else 0, activation="gelu_tanh",
        position=PositionConfig(
            kind="sincos" if table is None else "1d", prefix=own in state, resize="bilinear_corners"
        ),
        representation=state["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in state else None,
    )  # fmt: skip


def _google_card(config: ViTConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=Preprocess(config.image_size, config.in_channels, "stretch", 1.0, "bilinear"))


def _google_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    for name, value in (("registers", 0), ("qk_norm", False), ("stem_norm", False), ("layer_scale", None), ("qkv_bias", True), ("patch_bias", True),
                        ("activation", "gelu_tanh"), ("norm_eps", 1e-6), ("norm_after_pool", False), ("mask_token", False)):  # fmt: skip
        if getattr(config, name) != value:
            raise CheckpointError(f"Google's npz cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'")
    if config.position.place != "stem" or config.position.kind not in ("1d", "sincos"):
        raise CheckpointError(f"Google's npz holds position kinds 1d and sincos at the stem, not {config.position}; nearest: format='vitrail'")
    return {}


SOURCES = (
    Source("timm", "vit", lambda s: "patch_embed.proj.weight" in s and "blocks.0.attn.qkv.weight" in s and s["patch_embed.proj.weight"].ndim == 4,
           _timm_infer, _timm_rules, _timm_card, _timm_export),
    Source("transformers", "vit", lambda s: any(k.endswith("embeddings.patch_embeddings.projection.weight") and k.count(".") <= 4 for k in s)
           and any("encoder.layer.0.layernorm_before.weight" in k for k in s),
           _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean),
    Source("torchvision", "vit", lambda s: "conv_proj.weight" in s and "encoder.pos_embedding" in s,
           _tv_infer, _tv_rules, _tv_card, _tv_export, _tv_clean),
    Source("google", "vit", lambda s: any(k.endswith("embedding/kernel") and "conv_root" not in k for k in s)
           and any("Transformer/encoder_norm/scale" in k for k in s) and not any("conv_root" in k for k in s),
           _google_infer, _google_rules, _google_card, _google_export, _google_clean, "model.npz"),
)  # fmt: skip

