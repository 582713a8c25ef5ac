"""ResNet checkpoints: torchvision and timm share one naming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitrail.config import ModelCard, Preprocess
from vitrail.models.resnet import VARIANTS, ResNetConfig

from .mapping import CheckpointError, Rule, rename
from .sources import IMAGENET_MEAN, IMAGENET_STD, Files, Source, count_blocks, timm_card, timm_files

_NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def _rules(config: ResNetConfig) -> list[Rule]:
    rules = [*rename("stem.conv.weight", "conv1.weight"), *rename(f"stem.norm.{_NORM}", f"bn1.{_NORM}")]
    for stage in range(len(config.depths)):
        ours, theirs = f"stages.{stage}." + "{i}.", f"layer{stage + 1}." + "{i}."
        for conv in ("1", "2", "3"):
            rules += rename(ours + f"conv{conv}.conv.weight", theirs + f"conv{conv}.weight")
            rules += rename(ours + f"conv{conv}.norm.{_NORM}", theirs + f"bn{conv}.{_NORM}")
        rules += rename(ours + "shortcut.conv.weight", theirs + "downsample.0.weight")
        rules += rename(ours + f"shortcut.norm.{_NORM}", theirs + f"downsample.1.{_NORM}")
    return rules + rename("head.linear.{weight,bias}", "fc.{weight,bias}")


def _infer(state: Mapping[str, Tensor], files: Files, hints: Mapping[str, Any]) -> tuple[ResNetConfig, list[str]]:
    stages = count_blocks(state, "layer")
    width, channels, side, _ = state["conv1.weight"].shape
    config = ResNetConfig(
        in_channels=channels,
        num_classes=state["fc.weight"].shape[0] if "fc.weight" in state else 0,
        depths=tuple(count_blocks(state, f"layer{s + 1}.") for s in range(stages - 1)),
        width=width,
        bottleneck="layer1.0.conv3.weight" in state,
        small_input=side == 3,
    )
    inner = state["layer1.0.conv2.weight"].shape
    if inner[0] != inner[1] or inner[0] != width:
        raise CheckpointError(
            f"a ResNet with {inner[0]} inner channels in groups of {inner[1]} (a wide or grouped variant) has no model here; "
            "plain ResNet-18 to -152 do"
        )
    return config, []


def _card(config: ResNetConfig, files: Files) -> ModelCard:
    default = Preprocess(config.image_size, config.in_channels, "crop", 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    return timm_card(config.image_size, files, default) if "config.json" in files else ModelCard(preprocess=default)


def _known(config: ResNetConfig) -> str:
    shape = (config.depths, config.bottleneck, config.width, config.small_input)
    for name, row in VARIANTS.items():
        if shape == (row.depths, row.bottleneck, row.width, row.small_input) and "micro" not in name:
            return name
    raise CheckpointError(
        f"torchvision and timm have no ResNet of depths {config.depths} and width {config.width}; use format='vitrail'"
    )


def _tv_export(config: ResNetConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    _known(config)
    return {}


def _tv_peer(config: ResNetConfig) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(_known(config), weights=None, num_classes=config.num_classes)
    return model


def _timm_export(config: ResNetConfig, card: ModelCard) -> dict[str, dict[str, Any]]:
    args = {"in_chans": config.in_channels} if config.in_channels != 3 else {}
    return timm_files(_known(config), config, card, args, fixed_size=False)


def _recognise(state: Mapping[str, Tensor]) -> bool:
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state and "bn1.running_mean" in state


SOURCES = (
    Source("torchvision", "resnet", _recognise, _infer, _rules, _card, _tv_export, peer=_tv_peer),
    Source("timm", "resnet", _recognise, _infer, _rules, _card, _timm_export),
)
