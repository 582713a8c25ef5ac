"""ViViT checkpoints: transformers (model 1) and scenic, Google's JAX code (all four models), as a flax msgpack file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.models.vivit import VARIANTS, ViViTConfig

from .mapping import CheckpointError, Rule, fuse, rename, transform, transpose
from .sources import Files, Source, count_blocks, guess_heads, transformers_clip_card, transformers_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]
_PUBLISHED_FRAMES = 32  # of every published ViViT; decides what a joint table's length leaves open


def _clip(places: int, tubelet: tuple[int, int, int], hints: Hints, times: int | None = None) -> tuple[tuple[int, int], int]:
    """(image size, frames) behind a table of `places` places and times, or of places alone where `times` is known."""
    asked = hints.get("built_size")
    if asked is not None:
        size = (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])
        cells = size[0] // tubelet[1] * (size[1] // tubelet[2])
        if cells and places % cells == 0 and times in (None, places // cells):
            return size, (times or places // cells) * tubelet[0]
    t = times or max(_PUBLISHED_FRAMES // tubelet[0], 1)
    side = round((places / t) ** 0.5)
    if t * side * side != places:
        raise CheckpointError(
            f"{places} positions are no square of {t} moments; name the size the weights were built for: "
            "built_size=(height, width)"
        )
    return (side * tubelet[1], side * tubelet[2]), t * tubelet[0]


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: ViViTConfig) -> list[Rule]:
    ours, theirs = "blocks.{i}.", "vivit.encoder.layer.{i}."
    part = theirs + "attention.attention."
    return [
        *rename("class_token", "vivit.embeddings.cls_token"),
        *rename("position.table", "vivit.embeddings.position_embeddings"),
        *rename("embed.proj.{weight,bias}", "vivit.embeddings.patch_embeddings.projection.{weight,bias}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{layernorm_before,layernorm_after}.{weight,bias}"),
        *fuse(ours + "attn.qkv.weight", *(f"{part}{name}.weight" for name in ("query", "key", "value"))),
        *fuse(ours + "attn.qkv.bias", *(f"{part}{name}.bias" for name in ("query", "key", "value"))),
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attention.output.dense.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "{intermediate,output}.dense.{weight,bias}"),
        *rename("norm.{weight,bias}", "vivit.layernorm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.{weight,bias}"),
        *rename("head.representation.{weight,bias}", "vivit.pooler.dense.{weight,bias}"),
    ]


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (VivitModel) are saved without the "vivit." prefix."""
    return {key if key.startswith(("vivit.", "classifier.")) else f"vivit.{key}": value for key, value in state.items()}


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[ViViTConfig, list[str]]:
    settings, notes = files.get("config.json", {}), list[str]()
    weight = state["vivit.embeddings.patch_embeddings.projection.weight"]
    width, channels, *sides = weight.shape
    tubelet = (sides[0], sides[1], sides[2])
    known = dict(hints) if "image_size" not in settings else {"built_size": settings["image_size"], **hints}
    size, frames = _clip(state["vivit.embeddings.position_embeddings"].shape[1] - 1, tubelet, known)
    layer, activation = "vivit.encoder.layer.0.", settings.get("hidden_act", "gelu_fast")
    if activation not in ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"):
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not known here; allowed: gelu and its variants")
    head = state.get("classifier.weight")
    return ViViTConfig(
        image_size=size, frames=frames, tubelet=tubelet, in_channels=channels, width=width,
        num_classes=0 if head is None else head.shape[0], depth=count_blocks(state, "vivit.encoder.layer."),
        heads=int(hints.get("heads") or settings.get("num_attention_heads") or guess_heads(width, VARIANTS, notes)),
        mlp_dim=state[layer + "intermediate.dense.weight"].shape[0], norm_eps=float(settings.get("layer_norm_eps", 1e-6)),
        activation="gelu" if activation == "gelu" else "gelu_tanh",
        qkv_bias=layer + "attention.attention.query.bias" in state, resize="bicubic_plain",
        representation=state["vivit.pooler.dense.weight"].shape[0] if "vivit.pooler.dense.weight" in state else None,
    ), notes  # fmt: skip


def _hf_card(config: ViViTConfig, files: Files) -> ModelCard:
    return transformers_clip_card(
        config.image_size,
        files,
        Preprocess(channels=config.in_channels, crop_fraction=224 / 256, frames=config.frames, stride=2),
    )


def _hf_export(config: ViViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    needed = {"model": "joint", "pool": "cls", "position": "joint", "representation": None}
    _refuse_others(config, "transformers", needed)
    if config.image_size[0] != config.image_size[1]:
        raise CheckpointError(f"transformers' ViViT is square, this one is {config.image_size}; nearest: format='vitrail'")
    settings = {
        "architectures": ["VivitForVideoClassification"], "model_type": "vivit", "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "intermediate_size": config.mlp_dim,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_fast", "quick_gelu": "quick_gelu"}[config.activation],
        "layer_norm_eps": config.norm_eps, "num_channels": config.in_channels, "qkv_bias": config.qkv_bias,
        "image_size": config.image_size[0], "num_frames": config.frames, "tubelet_size": list(config.tubelet),
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
    }  # fmt: skip
    files = transformers_files(config, card, settings, "VivitImageProcessor")
    files["preprocessor_config.json"]["offset"] = False  # its default would shift pixels by one
    return files


def _refuse_others(config: ViViTConfig, project: str, needed: Mapping[str, Any]) -> None:
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )


# scenic ---------------------------------------------------------------------------------------------------------------


def _scenic_rules(config: ViViTConfig) -> list[Rule]:
    encoder = config.model == "factorised_encoder"
    first = "SpatialTransformer" if encoder else "Transformer"
    rules = [
        *transform(
            "embed.proj.weight", "embedding/kernel", lambda t: t.permute(4, 3, 0, 1, 2), lambda t: t.permute(2, 3, 4, 1, 0)
        ),
        *rename("embed.proj.bias", "embedding/bias"),
        *rename("class_token", "cls_SpatialTransformer" if encoder else "cls"),
        *rename("position.table", first + "/posembed_input/pos_embedding"),
        *rename("norm.{weight,bias}", first + "/encoder_norm/{scale,bias}"),
        *_mlp_rules(first, "blocks", "MlpBlock" if config.model == "factorised_self_attention" else "MlpBlock_0"),
        *transpose("head.linear.weight", "output_projection/kernel"),
        *rename("head.linear.bias", "output_projection/bias"),
        *transpose("head.representation.weight", "pre_logits/kernel"),
        *rename("head.representation.bias", "pre_logits/bias"),
    ]
    block = first + "/encoderblock_{i}/"
    if config.model == "factorised_self_attention":
        for axis in ("time", "space"):
            rules += _attention_rules(
                f"blocks.{{i}}.attn.{axis}.", f"{block}MultiHeadDotProductAttention_{axis}/", config.heads
            )
            rules += rename(f"blocks.{{i}}.norm.{axis}.{{weight,bias}}", f"{block}LayerNorm_{axis}/{{scale,bias}}")
        return rules + rename("blocks.{i}.norm2.{weight,bias}", block + "LayerNorm_mlp/{scale,bias}")
    rules += _block_rules("blocks", block, config.heads)
    if encoder:
        last = "TemporalTransformer"
        rules += rename("temporal_class_token", "cls_TemporalTransformer")
        rules += rename("temporal_position.table", last + "/posembed_input/pos_embedding")
        rules += rename("temporal_norm.{weight,bias}", last + "/encoder_norm/{scale,bias}")
        rules += _block_rules("temporal_blocks", last + "/encoderblock_{i}/", config.temporal_heads or config.heads)
        rules += _mlp_rules(last, "temporal_blocks", "MlpBlock_0")
    return rules


def _block_rules(ours: str, theirs: str, heads: int) -> list[Rule]:
    return [
        *_attention_rules(ours + ".{i}.attn.", theirs + "MultiHeadDotProductAttention_0/", heads),
        *rename(ours + ".{i}.{norm1,norm2}.{weight,bias}", theirs + "{LayerNorm_0,LayerNorm_1}/{scale,bias}"),
    ]


def _mlp_rules(root: str, ours: str, name: str) -> list[Rule]:
    theirs = f"{root}/encoderblock_{{i}}/{name}/"
    return [
        *transpose(ours + ".{i}.mlp.{fc1,fc2}.weight", theirs + "{Dense_0,Dense_1}/kernel"),
        *rename(ours + ".{i}.mlp.{fc1,fc2}.bias", theirs + "{Dense_0,Dense_1}/bias"),
    ]


def _attention_rules(ours: str, theirs: str, heads: int) -> list[Rule]:
    names = ("query", "key", "value")
    return [
        *fuse(
            ours + "qkv.weight", *(f"{theirs}{name}/kernel" for name in names),
            read=lambda t: t.flatten(1).T, write=lambda t: t.T.unflatten(1, (heads, -1)),
        ),
        *fuse(
            ours + "qkv.bias", *(f"{theirs}{name}/bias" for name in names),
            read=lambda t: t.flatten(), write=lambda t: t.unflatten(0, (heads, -1)),
        ),
        *transform(
            ours + "proj.weight", theirs + "out/kernel",
            lambda t: t.flatten(0, 1).T, lambda t: t.T.unflatten(0, (heads, -1)),
        ),
        *rename(ours + "proj.bias", theirs + "out/bias"),
    ]  # fmt: skip


# Names from before flax.linen numbered submodules by kind: one counter over all of a block's parts.
_OLD_NAMES = (
    ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
    ("LayerNorm_2", "LayerNorm_1"),
    ("MlpBlock_3", "MlpBlock_0"),
)
_ROOTS = ("optimizer/target/params/", "optimizer/target/", "params/")


def _scenic_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone out of a training state, under the names of today's flax."""
    for root in _ROOTS:
        if root + "embedding/kernel" in state:
            state = {key.removeprefix(root): value for key, value in state.items() if key.startswith(root)}
    if any("MlpBlock_3" in key for key in state):
        for old, new in _OLD_NAMES:
            state = {re.sub(rf"(encoderblock_\d+/){old}\b", rf"\g<1>{new}", key): value for key, value in state.items()}
    return state


def _scenic_infer(state: State, files: Files, hints: Hints) -> tuple[ViViTConfig, list[str]]:
    notes: list[str] = []
    kernel = state["embedding/kernel"]
    *sides, channels, width = kernel.shape
    tubelet = (sides[0], sides[1], sides[2])
    encoder = "SpatialTransformer/encoder_norm/scale" in state
    first = "SpatialTransformer" if encoder else "Transformer"
    block = first + "/encoderblock_0/"
    known: dict[str, Any] = {"model": "factorised_encoder" if encoder else "joint"}
    token = ("cls_SpatialTransformer" if encoder else "cls") in state
    places = state[first + "/posembed_input/pos_embedding"].shape[1] - token
    attention, mlp = block + "MultiHeadDotProductAttention_0/query/kernel", block + "MlpBlock_0/Dense_0/kernel"
    if block + "LayerNorm_time/scale" in state:
        known["model"] = "factorised_self_attention"
        attention, mlp = block + "MultiHeadDotProductAttention_space/query/kernel", block + "MlpBlock/Dense_0/kernel"
    elif not encoder and not token:
        known["model"] = hints.get("model", "joint")
        if "model" not in hints:
            notes.append('guess: joint attention (model="factorised_dot_product" has the same weights)')
    if encoder:
        last = "TemporalTransformer"
        times = state[last + "/posembed_input/pos_embedding"].shape[1] - token
        size, frames = _clip(places * times, tubelet, hints, times)
        known |= {
            "temporal_depth": count_blocks(state, last + "/encoderblock_", "/"),
            "temporal_heads": state[last + "/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"].shape[1],
            "temporal_mlp_dim": state[last + "/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1],
        }
    else:
        size, frames = _clip(places, tubelet, hints)
    return ViViTConfig(
        image_size=size, frames=frames, tubelet=tubelet, in_channels=channels, width=width,
        num_classes=state["output_projection/kernel"].shape[1] if "output_projection/kernel" in state else 0,
        depth=count_blocks(state, first + "/encoderblock_", "/"), heads=state[attention].shape[1],
        mlp_dim=state[mlp].shape[1], pool="cls" if token else "mean",
        representation=state["pre_logits/kernel"].shape[1] if "pre_logits/kernel" in state else None, **known,
    ), notes  # fmt: skip


def _scenic_card(config: ViViTConfig, files: Files) -> ModelCard:
    made = Preprocess(config.image_size, config.in_channels, "crop", 224 / 256, "bilinear", frames=config.frames, stride=2)
    return ModelCard(preprocess=made)


def _scenic_export(config: ViViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _refuse_others(config, "scenic", {"position": "joint", "activation": "gelu_tanh", "norm_eps": 1e-6, "qkv_bias": True})
    if config.model == "factorised_encoder" and not config.temporal_depth:
        raise CheckpointError("scenic cannot hold a factorised encoder with temporal_depth=0; nearest: format='vitrail'")
    return {}


def _is_hf(state: State) -> bool:
    patch = next((v for k, v in state.items() if k.endswith("embeddings.patch_embeddings.projection.weight")), None)
    return patch is not None and patch.ndim == 5 and any(k.endswith("encoder.layer.0.layernorm_before.weight") for k in state)


def _is_scenic(state: State) -> bool:
    kernel = next((v for k, v in state.items() if k.endswith("embedding/kernel")), None)
    return kernel is not None and kernel.ndim == 5


SOURCES = (
    Source("transformers", "vivit", _is_hf, _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean, one_preprocess=True),
    Source("scenic", "vivit", _is_scenic, _scenic_infer, _scenic_rules, _scenic_card, _scenic_export, _scenic_clean,
           "checkpoint", one_preprocess=True),
)  # fmt: skip
