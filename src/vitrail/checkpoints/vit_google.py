"""ViT checkpoints of Google's JAX code: vision_transformer (before and after linen numbering) and big_vision, as .npz."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import PositionConfig
from vitrail.models.vit import ViTConfig

from .mapping import CheckpointError, Rule, convolution, fuse, rename, transform, transpose
from .sources import Files, Source, count_blocks
from .vit import build_config

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def rules(config: ViTConfig) -> list[Rule]:
    """The table of the encoder and its heads."""
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
        *_pool_rules(config),
    ]  # fmt: skip


def _pool_rules(config: ViTConfig) -> list[Rule]:
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


_LINEN = (
    (r"MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
    (r"LayerNorm_1", "LayerNorm_2"),
    (r"MlpBlock_0", "MlpBlock_3"),
)
_ROOTS = ("params/", "opt/target/", "target/", "img/")


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published pre-linen names: subtrees opened, layers under a scan unstacked, old places of the position table."""
    for root in _ROOTS:  # from the outside in: the image tower of SigLIP lies at params/img/
        if any(key.startswith((root + "Transformer/", root + "img/Transformer/")) for key in state):
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
    table = out.get("pos_embedding")
    if table is not None and _has_class_row(table.shape[1]):  # big_vision's oldest tables: the class token's row comes first
        out["pos_embedding"] = table[:, 1:]
        if "cls" in out:
            out["cls"] = out["cls"] + table[:, :1]
    if "probe" in out:  # a MAP head inlined at the top level
        inlined = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
        out = {f"MAPHead_0/{key}" if key.startswith(inlined) else key: value for key, value in out.items()}
    return out


def _has_class_row(rows: int) -> bool:
    """Whether a table has one row more than a square grid."""
    return math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1


def infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    """The config of cleaned names."""
    own = "Transformer/posembed_input/pos_embedding"
    table = state.get(own, state.get("pos_embedding"))
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    token, pool = "cls" in state, "cls" if "cls" in state else "mean"
    return build_config(
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


def _card(config: ViTConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=Preprocess(config.image_size, config.in_channels, "stretch", 1.0, "bilinear"))


def export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    """No files beside the weights. Raises CheckpointError for a model that the format cannot hold."""
    needed = {
        "registers": 0, "qk_norm": False, "stem_norm": False, "layer_scale": None, "qkv_bias": True, "patch_bias": True,
        "activation": "gelu_tanh", "norm_eps": 1e-6, "norm_after_pool": False, "mask_token": False,
    }  # fmt: skip
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"Google's npz cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )
    if config.position.place != "stem" or config.position.kind not in ("1d", "sincos"):
        raise CheckpointError(
            f"Google's npz holds position kinds 1d and sincos at the stem, not {config.position}; nearest: format='vitrail'"
        )
    return {}


def _recognise(state: State) -> bool:
    patches = any(key.endswith("embedding/kernel") and kernel.ndim == 4 for key, kernel in state.items())
    hybrid = any("conv_root" in key for key in state)
    return patches and not hybrid and any(key.endswith("Transformer/encoder_norm/scale") for key in state)


SOURCES = (Source("google", "vit", _recognise, infer, rules, _card, export, clean, "model.npz", one_preprocess=True),)
