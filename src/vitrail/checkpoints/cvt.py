"""CvT checkpoints: the authors' code (Microsoft) and transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.models.cvt import VARIANTS, CvTConfig

from .mapping import CheckpointError, Rule, rename, write
from .sources import IMAGENET_MEAN, IMAGENET_STD, Files, Source, transformers_card, transformers_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]

_NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def _microsoft_rules(config: Any = None) -> list[Rule]:
    ours, theirs = "stages.{s}.blocks.{i}.", "stage{s}.blocks.{i}."
    rules = [
        *rename("stages.{s}.embed.{proj,norm}.{weight,bias}", "stage{s}.patch_embed.{proj,norm}.{weight,bias}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{norm1,norm2}.{weight,bias}"),
        *rename(ours + "attn.{q,k,v,proj}.{weight,bias}", theirs + "attn.{proj_q,proj_k,proj_v,proj}.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "mlp.{fc1,fc2}.{weight,bias}"),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "head.{weight,bias}"),
    ]
    for part in ("q", "k", "v"):
        rules += rename(ours + f"attn.conv_{part}.conv.weight", theirs + f"attn.conv_proj_{part}.conv.weight")
        rules += rename(ours + f"attn.conv_{part}.norm.{_NORM}", theirs + f"attn.conv_proj_{part}.bn.{_NORM}")
    return rules


def _hf_rules(config: Any = None) -> list[Rule]:
    ours, theirs = "stages.{s}.blocks.{i}.", "cvt.encoder.stages.{s}.layers.{i}."
    embedding, attention = "cvt.encoder.stages.{s}.embedding.convolution_embeddings.", theirs + "attention.attention."
    rules = [
        *rename("stages.{s}.embed.{proj,norm}.{weight,bias}", embedding + "{projection,normalization}.{weight,bias}"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", theirs + "{layernorm_before,layernorm_after}.{weight,bias}"),
        *rename(ours + "attn.proj.{weight,bias}", theirs + "attention.output.dense.{weight,bias}"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", theirs + "{intermediate,output}.dense.{weight,bias}"),
        *rename("norm.{weight,bias}", "layernorm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.{weight,bias}"),
    ]
    for part, word in (("q", "query"), ("k", "key"), ("v", "value")):
        convolution = attention + f"convolution_projection_{word}.convolution_projection."
        rules += rename(ours + f"attn.conv_{part}.conv.weight", convolution + "convolution.weight")
        rules += rename(ours + f"attn.conv_{part}.norm.{_NORM}", convolution + f"normalization.{_NORM}")
        rules += rename(ours + f"attn.{part}." + "{weight,bias}", attention + f"projection_{word}." + "{weight,bias}")
    return rules


def _with_token(rules: Callable[[Any], list[Rule]], theirs: str) -> Callable[[CvTConfig], list[Rule]]:
    """The rules and the class token, whose key counts the stages."""
    return lambda config: [*rules(config), *rename("class_token", theirs.format(last=len(config.widths) - 1))]


def _infer(state: State, hints: Hints, rules: list[Rule], **known: Any) -> tuple[CvTConfig, list[str]]:
    """A config from shapes; what shapes cannot tell comes from `known` and hints, then from the published variants."""

    def theirs(ours: str) -> str:
        return next(iter(write(rules, {ours: torch.empty(0)})))

    def count(before: str, after: str) -> int:
        numbers = 0
        while theirs(f"{before}{numbers}{after}") in state:
            numbers += 1
        return numbers

    stages = range(count("stages.", ".embed.proj.weight"))
    kernels = [state[theirs(f"stages.{s}.embed.proj.weight")] for s in stages]
    widths, sides = tuple(k.shape[0] for k in kernels), tuple(k.shape[2] for k in kernels)
    notes: list[str] = []
    heads = known.pop("heads", None) or hints.get("heads") or _guess_heads(widths, notes)
    config = CvTConfig(
        in_channels=kernels[0].shape[1],
        num_classes=state[key].shape[0] if (key := theirs("head.linear.weight")) in state else 0,
        widths=widths,
        depths=tuple(count(f"stages.{s}.blocks.", ".norm1.weight") for s in stages),
        heads=tuple(heads),
        mlp_ratio=state[theirs("stages.0.blocks.0.mlp.fc1.weight")].shape[0] / widths[0],
        kernels=sides,
        class_token=any(key.endswith("cls_token") for key in state),
        qkv_bias=theirs("stages.0.blocks.0.attn.q.bias") in state,
        **({"strides": tuple((side + 1) // 2 for side in sides), "paddings": tuple(side // 3 for side in sides)} | known),
    )
    return config, notes


def _guess_heads(widths: tuple[int, ...], notes: list[str]) -> tuple[int, ...]:
    published = {c.widths: c.heads for name, c in VARIANTS.items() if "micro" not in name}
    if widths in published:
        return published[widths]
    heads = tuple(max(1, width // 64) for width in widths)
    notes.append(f"guess: {heads} heads (the weights do not tell; heads=... decides)")
    return heads


# the authors' ---------------------------------------------------------------------------------------------------------


def _microsoft_infer(state: State, files: Files, hints: Hints) -> tuple[CvTConfig, list[str]]:
    asked = hints.get("image_size") or 224
    return _infer(state, hints, _microsoft_rules(), image_size=(asked, asked) if isinstance(asked, int) else tuple(asked))


def _preprocess(config: CvTConfig) -> Preprocess:
    """At 224 the authors crop the centre, at 384 they stretch."""
    fit, fraction = ("crop", 0.875) if config.image_size[0] < 384 else ("stretch", 1.0)
    return Preprocess(config.image_size, config.in_channels, fit, fraction, "bicubic", IMAGENET_MEAN, IMAGENET_STD)  # type: ignore[arg-type]


def _microsoft_card(config: CvTConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=_preprocess(config))


def _microsoft_export(config: CvTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(config, "the authors' code", activation="quick_gelu")
    return {}


def _plain(config: CvTConfig, project: str, **more: Any) -> None:
    """Refuse what the project computes otherwise, whatever the weights."""
    for name, value in {"norm_eps": 1e-5, "attention_scale": "width", **more}.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bare encoders (CvtModel) are saved without the "cvt." prefix and without the last LayerNorm: it gets a fresh one."""
    outside = ("cvt.", "layernorm.", "classifier.")
    state = {key if key.startswith(outside) else f"cvt.{key}": value for key, value in state.items()}
    token = next((value for key, value in state.items() if key.endswith("cls_token")), None)
    if "layernorm.weight" not in state and token is not None:
        width = token.shape[-1]
        state |= {"layernorm.weight": torch.ones(width), "layernorm.bias": torch.zeros(width)}
    return state


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[CvTConfig, list[str]]:
    settings = files.get("config.json", {})
    methods, tokens = settings.get("qkv_projection_method") or ["dw_bn"], settings.get("cls_token") or [False]
    if set(methods) != {"dw_bn"} or any(tokens[:-1]):
        raise CheckpointError(
            f"config.json: qkv_projection_method {methods} with cls_token {tokens} has no model here; allowed: 'dw_bn' in "
            "every stage, and a class token in the last stage only"
        )
    theirs = {"heads": "num_heads", "strides": "patch_stride", "paddings": "patch_padding"}
    known: dict[str, Any] = {ours: tuple(settings[key]) for ours, key in theirs.items() if key in settings}
    if settings.get("stride_kv"):
        known["kv_stride"] = int(settings["stride_kv"][0])
    return _infer(state, hints, _hf_rules(), activation="gelu", image_size=_hf_size(files), **known)


def _hf_size(files: Files) -> tuple[int, int]:
    """The input size, which only the preprocessing tells."""
    settings = files.get("preprocessor_config.json", {})
    size: Any = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size") or 224
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        return (int(side), int(side)) if side else (int(size["height"]), int(size["width"]))
    return int(size), int(size)


def _hf_card(config: CvTConfig, files: Files) -> ModelCard:
    card = transformers_card(config.image_size, files, _preprocess(config))
    settings = files.get("preprocessor_config.json", {})
    if not settings:
        return dataclasses.replace(card, preprocess=_preprocess(config))
    if "crop_pct" in settings and config.image_size[0] >= 384:  # ConvNext's processor crops below 384 only
        made = dataclasses.replace(card.preprocess or Preprocess(), fit="stretch", crop_fraction=1.0)
        return dataclasses.replace(card, preprocess=made)
    return card


def _hf_export(config: CvTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _plain(config, "transformers", activation="gelu", class_token=True)
    stages = len(config.widths)
    if any(depth <= s for s, depth in enumerate(config.depths)):  # it looks up a block's rate by the number of its stage
        raise CheckpointError(
            f"transformers cannot hold depths={config.depths}: stage i, counted from 1, needs at least i blocks; "
            "nearest: format='vitrail'"
        )
    settings = {
        "architectures": ["CvtForImageClassification"], "model_type": "cvt", "num_channels": config.in_channels,
        "embed_dim": list(config.widths), "depth": list(config.depths), "num_heads": list(config.heads),
        "patch_sizes": list(config.kernels), "patch_stride": list(config.strides), "patch_padding": list(config.paddings),
        "mlp_ratio": [config.mlp_ratio] * stages, "qkv_bias": [config.qkv_bias] * stages,
        "cls_token": [False] * (stages - 1) + [config.class_token], "qkv_projection_method": ["dw_bn"] * stages,
        "kernel_qkv": [3] * stages, "padding_q": [1] * stages, "padding_kv": [1] * stages, "stride_q": [1] * stages,
        "stride_kv": [config.kv_stride] * stages, "drop_rate": [config.dropout] * stages,
        "attention_drop_rate": [config.attention_dropout] * stages,
        "drop_path_rate": [0.0] * (stages - 1) + [config.drop_path],
    }  # fmt: skip
    files = transformers_files(config, card, settings, "ViTImageProcessor")
    p = card.preprocess or _preprocess(config)
    side = p.image_size[0]
    if p.image_size == (side, side) and p.fit == ("crop" if side < 384 else "stretch"):
        processor = files["preprocessor_config.json"]  # the one that transformers uses for CvT can say this
        kept = {key: value for key, value in processor.items() if key not in ("do_center_crop", "crop_size")}
        kind = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": side}}
        files["preprocessor_config.json"] = kept | kind | {"crop_pct": p.crop_fraction}
    return files


def _is_microsoft(state: State) -> bool:
    return "stage0.patch_embed.proj.weight" in state and "stage0.blocks.0.attn.conv_proj_q.conv.weight" in state


def _is_hf(state: State) -> bool:
    return any(key.endswith("encoder.stages.0.embedding.convolution_embeddings.projection.weight") for key in state)


SOURCES = (
    Source(
        "microsoft", "cvt", _is_microsoft, _microsoft_infer, _with_token(_microsoft_rules, "stage{last}.cls_token"),
        _microsoft_card, _microsoft_export, container="model.pth",
    ),
    Source(
        "transformers", "cvt", _is_hf, _hf_infer, _with_token(_hf_rules, "cvt.encoder.stages.{last}.cls_token"),
        _hf_card, _hf_export, _hf_clean,
    ),
)  # fmt: skip
