"""DINOv2 checkpoints (arXiv 2304.07193; with registers 2309.16588): the original .pth files and transformers.

They are ViTs with layer scale; the giant has gated MLPs. timm's files of them are read as any other ViT of timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitrail.config import ModelCard, Preprocess
from vitrail.layers.position import PositionConfig
from vitrail.models.vit import ViTConfig

from . import vit
from .mapping import CheckpointError, Rule, rename, transform
from .sources import IMAGENET_MEAN, IMAGENET_STD, Files, Source, count_blocks, transformers_card, transformers_files

State = Mapping[str, Tensor]
Hints = Mapping[str, Any]


def _position(registers: int, resize: str) -> PositionConfig:
    """The class token has a position, registers have none."""
    return PositionConfig(registers=not registers, resize=resize)


def _preprocess(config: ViTConfig) -> Preprocess:
    """Evaluation of the original repository: the picture's centre, 224 of 256."""
    return Preprocess(config.image_size, config.in_channels, "crop", 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


# The original files ----------------------------------------------------------------------------------------------------


def _rules(config: ViTConfig) -> list[Rule]:
    block, fc1, fc2 = "blocks.{i}.", *(("w12", "w3") if config.mlp == "swiglu" else ("fc1", "fc2"))
    return [
        *rename("class_token", "cls_token"),
        *rename("registers", "register_tokens"),
        *_mask_rule("mask_token"),
        *rename("positions.0.table", "pos_embed"),
        *rename("embed.proj.{weight,bias}", "patch_embed.proj.{weight,bias}"),
        *rename(block + "{norm1,norm2}.{weight,bias}", block + "{norm1,norm2}.{weight,bias}"),
        *rename(block + "attn.{qkv,proj}.{weight,bias}", block + "attn.{qkv,proj}.{weight,bias}"),
        *rename(block + "mlp.{fc1,fc2}.{weight,bias}", block + f"mlp.{{{fc1},{fc2}}}." + "{weight,bias}"),
        *rename(block + "{scale1,scale2}.gain", block + "{ls1,ls2}.gamma"),
        *rename("norm.{weight,bias}", "norm.{weight,bias}"),
    ]


def _mask_rule(theirs: str) -> list[Rule]:
    return transform("mask_token", theirs, lambda t: t[None], lambda t: t[0])


def _infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    gated = "blocks.0.mlp.w12.weight" in state
    return vit.build_config(
        state, hints, state["patch_embed.proj.weight"], state["pos_embed"].shape[1], class_token=True, registers=registers,
        depth=count_blocks(state, "blocks."), mlp_dim=state[f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"].shape[1],
        mlp="swiglu" if gated else "plain", num_classes=0, layer_scale=1e-5, mask_token="mask_token" in state,
        # The published models: with registers antialiased, without them by the factor with the offset (their hubconf.py).
        position=_position(registers, "bicubic" if registers else "bicubic_offset"),
    )  # fmt: skip


def _card(config: ViTConfig, files: Files) -> ModelCard:
    return ModelCard(preprocess=_preprocess(config))


def _check(config: ViTConfig, project: str, **needed: Any) -> None:
    built_in = {"class_token": True, "qk_norm": False, "stem_norm": False, "patch_bias": True, "norm_after_pool": False,
                "representation": None}  # fmt: skip
    for name, value in {**built_in, **needed}.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{project} cannot hold {name}={getattr(config, name)!r} (it has {value!r}); nearest: format='vitrail'"
            )
    c = config.position
    if config.layer_scale is None or c.kind != "1d" or c.place != "stem" or not c.prefix or (config.registers and c.registers):
        raise CheckpointError(
            f"{project} has layer scale, and positions of all but registers, not layer_scale={config.layer_scale} and {c}; "
            "nearest: format='vitrail'"
        )


def _export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "DINOv2's format", qkv_bias=True, activation="gelu", norm_eps=1e-6, num_classes=0)
    return {}


# transformers ---------------------------------------------------------------------------------------------------------


def _hf_rules(config: ViTConfig) -> list[Rule]:
    """Dinov2ForImageClassification and Dinov2WithRegistersForImageClassification, or their bare encoders."""
    theirs = "" if not config.num_classes else ("dinov2_with_registers." if config.registers else "dinov2.")
    ours, layer = "blocks.{i}.", theirs + "encoder.layer.{i}."
    shared = ("class_token", "positions.", "embed.", "blocks.{i}.attn.")
    encoder = [rule for rule in vit.hf_rules(config) if rule.ours.startswith(shared)]
    fc1, fc2 = ("weights_in", "weights_out") if config.mlp == "swiglu" else ("fc1", "fc2")
    return [
        *(Rule(r.ours, tuple(theirs + t.removeprefix("vit.") for t in r.theirs), r.read, r.write) for r in encoder),
        *_mask_rule(theirs + "embeddings.mask_token"),
        *rename("registers", theirs + "embeddings.register_tokens"),
        *rename(ours + "{norm1,norm2}.{weight,bias}", layer + "{norm1,norm2}.{weight,bias}"),
        *rename(ours + "{scale1,scale2}.gain", layer + "{layer_scale1,layer_scale2}.lambda1"),
        *rename(ours + "mlp.{fc1,fc2}.{weight,bias}", layer + f"mlp.{{{fc1},{fc2}}}." + "{weight,bias}"),
        *rename("norm.{weight,bias}", theirs + "layernorm.{weight,bias}"),
        *rename("head.linear.{weight,bias}", "classifier.{weight,bias}"),
    ]


def _hf_clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network without its classifier is named like a bare encoder."""
    if "classifier.weight" in state:
        return state
    return {key.removeprefix("dinov2.").removeprefix("dinov2_with_registers."): value for key, value in state.items()}


def _hf_infer(state: State, files: Files, hints: Hints) -> tuple[ViTConfig, list[str]]:
    classes = state["classifier.weight"].shape[0] if "classifier.weight" in state else 0
    before = "" if not classes else next(k for k in state if k.startswith("dinov2")).split(".")[0] + "."
    layer, tokens = f"{before}encoder.layer.0.", f"{before}embeddings."
    registers = state[f"{tokens}register_tokens"].shape[1] if f"{tokens}register_tokens" in state else 0
    gated = f"{layer}mlp.weights_in.weight" in state
    return vit.build_config(
        state, hints, state[f"{tokens}patch_embeddings.projection.weight"], state[f"{tokens}position_embeddings"].shape[1],
        class_token=True, registers=registers, depth=count_blocks(state, f"{before}encoder.layer."),
        mlp_dim=state[f"{layer}mlp.{'weights_out' if gated else 'fc2'}.weight"].shape[1], mlp="swiglu" if gated else "plain",
        num_classes=classes, pool="cls_mean" if classes else "cls", layer_scale=1.0, mask_token=f"{tokens}mask_token" in state,
        qkv_bias=f"{layer}attention.attention.query.bias" in state,
        position=_position(registers, "bicubic" if registers else "bicubic_plain"),
        **{"norm_eps": 1e-6, **(vit.hf_settings(files) if "config.json" in files else {})},
    )  # fmt: skip


def _hf_card(config: ViTConfig, files: Files) -> ModelCard:
    return transformers_card(config.image_size, files, _preprocess(config))


def _hf_export(config: ViTConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _check(config, "transformers", pool="cls_mean" if config.num_classes else "cls")
    ratio = config.mlp_dim / config.width
    if config.mlp == "swiglu":  # transformers keeps two thirds of its ratio, rounded up to a multiple of 8
        ratio = 1.5 * ratio
        made = (int(int(config.width * round(ratio)) * 2 / 3) + 7) // 8 * 8
    else:
        made = config.width * round(ratio)
    if made != config.mlp_dim:
        raise CheckpointError(
            f"transformers' DINOv2 has MLPs of a whole ratio of the width {config.width}, here {made}, not {config.mlp_dim}; "
            "nearest: format='vitrail'"
        )
    if config.registers:  # that architecture always has one
        _check(config, "transformers", mask_token=True)
    kind, name = ("dinov2_with_registers", "Dinov2WithRegisters") if config.registers else ("dinov2", "Dinov2")
    settings = vit.hf_config(config, name + ("ForImageClassification" if config.num_classes else "Model"), kind)
    del settings["intermediate_size"]
    settings |= {"mlp_ratio": round(ratio), "use_swiglu_ffn": config.mlp == "swiglu", "layerscale_value": config.layer_scale}
    settings |= {"num_register_tokens": config.registers} if config.registers else {"use_mask_token": config.mask_token}
    return transformers_files(config, card, settings, "BitImageProcessor")


def _is_original(state: State) -> bool:
    return "patch_embed.proj.weight" in state and "mask_token" in state and "blocks.0.ls1.gamma" in state


def _is_hf(state: State) -> bool:
    return any(key.endswith("encoder.layer.0.layer_scale1.lambda1") for key in state)


SOURCES = (
    Source("transformers", "vit", _is_hf, _hf_infer, _hf_rules, _hf_card, _hf_export, _hf_clean),
    Source("dinov2", "vit", _is_original, _infer, _rules, _card, _export),
)
