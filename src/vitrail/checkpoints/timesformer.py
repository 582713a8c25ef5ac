"""TimeSformer checkpoints: the authors' .pyth files and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import grid_side
from vitrail.models.timesformer import SCHEMES, VARIANTS, TimeSformerConfig

from .mapping import CheckpointError, Rule, rename
from .sources import Files, Source, count_blocks, guess_heads, transformers_clip_card, transformers_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]
_KINDS = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}


def _table(config: TimeSformerConfig, names: Mapping[str, str], blocks: str, root: str) -> list[Rule]:
    """The table of a naming that differs from ours in words alone."""
    ours = "blocks.{i}."
    parts = {"attn": ours + f"attn.{SCHEMES[config.attention][-1]}.", "time": ours + "steps.time."}
    return [
        *rename("class_token", root + names["token"]),
        *rename("position.{table,time}", f"{root}{{{names['places']},{names['times']}}}"),
        *rename("embed.proj.{weight,bias}", f"{root}{names['patch']}.{{weight,bias}}"),
        *rename(parts["attn"] + "{qkv,proj}.{weight,bias}", f"{blocks}{{{names['qkv']},{names['proj']}}}.{{weight,bias}}"),
        *rename(
            parts["time"] + "attn.{qkv,proj}.{weight,bias}",
            f"{blocks}{{{names['time_qkv']},{names['time_proj']}}}.{{weight,bias}}",
        ),
        *rename(parts["time"] + "{norm,fc}.{weight,bias}", f"{blocks}{{{names['time_norm']},{names['fc']}}}.{{weight,bias}}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", f"{blocks}{{{names['norm1']},{names['norm2']}}}.{{weight,bias}}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", f"{blocks}{{{names['fc1']},{names['fc2']}}}.{{weight,bias}}"),
        *rename("norm.{weight,bias}", f"{root}{names['norm']}.{{weight,bias}}"),
        *rename("head.linear.{weight,bias}", names["head"] + ".{weight,bias}"),
    ]


_ORIGINAL = {
    "token": "cls_token", "places": "pos_embed", "times": "time_embed", "patch": "patch_embed.proj",
    "qkv": "attn.qkv", "proj": "attn.proj", "time_qkv": "temporal_attn.qkv", "time_proj": "temporal_attn.proj",
    "time_norm": "temporal_norm1", "fc": "temporal_fc", "norm1": "norm1", "norm2": "norm2",
    "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm": "norm", "head": "model.head",
}  # fmt: skip
_TRANSFORMERS = {
    "token": "embeddings.cls_token", "places": "embeddings.position_embeddings", "times": "embeddings.time_embeddings",
    "patch": "embeddings.patch_embeddings.projection", "qkv": "attention.attention.qkv", "proj": "attention.output.dense",
    "time_qkv": "temporal_attention.attention.qkv", "time_proj": "temporal_attention.output.dense",
    "time_norm": "temporal_layernorm", "fc": "temporal_dense", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "fc1": "intermediate.dense", "fc2": "output.dense", "norm": "layernorm", "head": "classifier",
}  # fmt: skip


def _original_rules(config: TimeSformerConfig) -> list[Rule]:
    return _table(config, _ORIGINAL, "model.blocks.{i}.", "model.")


def _hf_rules(config: TimeSformerConfig) -> list[Rule]:
    return _table(config, _TRANSFORMERS, "timesformer.encoder.layer.{i}.", "timesformer.")


def _infer(
    state: State, names: Mapping[str, str], blocks: str, root: str, settings: Mapping[str, Any], hints: Hints
) -> tuple[TimeSformerConfig, list[str]]:
    notes: list[str] = []
    width, channels, *patch = state[f"{root}{names['patch']}.weight"].shape
    rows, times = state[root + names["places"]].shape[1] - 1, state.get(root + names["times"])
    asked = hints.get("built_size") or settings.get("image_size")
    size = None if asked is None else (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])
    if size is None or size[0] // patch[0] * (size[1] // patch[1]) != rows:
        try:
            side = grid_side(rows)
        except ValueError as problem:
            raise CheckpointError(f"{problem}; name the size the weights were built for: built_size=(height, width)") from None
        size = (side * patch[0], side * patch[1])
    first, head = blocks.replace("{i}", "0"), state.get(names["head"] + ".weight")
    divided = f"{first}{names['fc']}.weight" in state
    frames = hints.get("frames") or settings.get("num_frames") or TimeSformerConfig.frames
    return TimeSformerConfig(
        image_size=size, frames=times.shape[1] if times is not None else int(frames), patch=(patch[0], patch[1]),
        in_channels=channels, num_classes=0 if head is None else head.shape[0], width=width,
        depth=count_blocks(state, blocks.split("{i}")[0]),
        heads=int(hints.get("heads") or settings.get("num_attention_heads") or guess_heads(width, VARIANTS, notes)),
        mlp_dim=state[f"{first}{names['fc1']}.weight"].shape[0],
        attention="divided" if divided else "joint" if times is not None else "space",
        norm_eps=float(settings.get("layer_norm_eps", 1e-6)), qkv_bias=f"{first}{names['qkv']}.bias" in state,
    ), notes  # fmt: skip


def _original_infer(state: State, files: Files, hints: Hints) -> tuple[TimeSformerConfig, list[str]]:
    return _infer(state, _ORIGINAL, "model.blocks.{i}.", "model.", {}, hints)


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[TimeSformerConfig, list[str]]:
    settings = files.get("config.json", {})
    if settings.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"config.json: hidden_act {settings['hidden_act']!r} is not TimeSformer's; allowed: gelu")
    return _infer(state, _TRANSFORMERS, "timesformer.encoder.layer.{i}.", "timesformer.", settings, hints)


def _original_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files keep everything under "model."; some passed-on ones do not."""
    return {key if key.startswith("model.") else f"model.{key}": value for key, value in state.items()}


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (TimesformerModel) are saved without the "timesformer." prefix."""
    known = ("timesformer.", "classifier.")
    return {key if key.startswith(known) else f"timesformer.{key}": value for key, value in state.items()}


def _card(config: TimeSformerConfig, files: Files) -> ModelCard:
    stride = {8: 32, 16: 16, 96: 4}.get(config.frames, 32)  # the published base, HR and L
    default = Preprocess(
        config.image_size, config.in_channels, "crop", 1.0, "bilinear", (0.45,), (0.225,), frames=config.frames, stride=stride
    )
    return transformers_clip_card(config.image_size, files, default)


def _check(config: TimeSformerConfig, project: str) -> None:
    needed = {"position": "separate", "activation": "gelu"}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )
    if config.attention not in _KINDS:
        raise CheckpointError(f"{project} has attention {', '.join(_KINDS)}, not {config.attention}; nearest: format='vitrail'")


def _original_export(config: TimeSformerConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "the authors' code")
    return {}


def _hf_export(config: TimeSformerConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "transformers")
    if config.image_size[0] != config.image_size[1] or config.patch[0] != config.patch[1]:
        raise CheckpointError(
            f"transformers' TimeSformer is square, this one is {config.image_size}; nearest: format='vitrail'"
        )
    settings = {
        "architectures": ["TimesformerForVideoClassification"], "model_type": "timesformer", "hidden_size": config.width,
        "num_hidden_layers": config.depth, "num_attention_heads": config.heads, "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu", "layer_norm_eps": config.norm_eps, "num_channels": config.in_channels,
        "qkv_bias": config.qkv_bias, "image_size": config.image_size[0], "patch_size": config.patch[0],
        "num_frames": config.frames, "attention_type": _KINDS[config.attention],
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.attention_dropout,
    }  # fmt: skip
    return transformers_files(config, card, settings, "VideoMAEImageProcessor")


def _is_original(state: State) -> bool:
    bare = "time_embed" in state and "blocks.0.attn.qkv.weight" in state
    return bare or ("model.patch_embed.proj.weight" in state and "model.blocks.0.attn.qkv.weight" in state)


def _is_hf(state: State) -> bool:
    return any(key.endswith("encoder.layer.0.attention.attention.qkv.weight") for key in state)


SOURCES = (
    Source("timesformer", "timesformer", _is_original, _original_infer, _original_rules, _card, _original_export,
           _original_clean, "model.pyth", one_preprocess=True, inside="model_state"),
    Source("transformers", "timesformer", _is_hf, _hf_infer, _hf_rules, _card, _hf_export, _hf_clean, one_preprocess=True),
)  # fmt: skip
