"""What a published naming is: how to recognise it, read its configuration, and translate its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitrail.config import ModelCard, Preprocess

from .mapping import Rule

# JSON files found beside the weights, by name; under "" what is known of the weights' own file: {"name": its last two parts}
Files = Mapping[str, Mapping[str, Any]]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """One project's naming of one family.

    recognise(names) says whether a state dict is of this kind. infer(state, files, hints) gives the family's config (its
    `hints` are the user's overrides, which decide what shapes cannot tell, such as heads) and notes about guesses.
    rules(config) is the table. card(config, files) gives labels and preprocessing. export(config, card) gives the JSON files
    that the project's own loader wants beside the weights (None: the project cannot hold this model). `clean` brings older
    spellings of keys to the table's.
    """

    name: str
    family: str
    recognise: Callable[[Mapping[str, Tensor]], bool]
    infer: Callable[[Mapping[str, Tensor], Files, Mapping[str, Any]], tuple[Any, list[str]]]
    rules: Callable[[Any], list[Rule]]
    card: Callable[[Any, Files], ModelCard]
    export: Callable[[Any, ModelCard], dict[str, dict[str, Any]]]
    clean: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
    container: str = "model.safetensors"
    inside: str = ""  # the key that holds the weights in the project's torch files ("": the file is the bare state dict)
    guess: str = ""  # how `card` guesses the preprocessing, where other weights look the same; said when nothing tells it
    one_preprocess: bool = False  # all published weights of this naming take pictures alike, so that card() is no guess
    peer: Callable[[Any], nn.Module] | None = None  # the project's own model of a config, to check what was written


def count_blocks(state: Mapping[str, Tensor], before: str, after: str = ".") -> int:
    """How many consecutive numbers stand between `before` and `after` in the keys."""
    numbers = {
        int(key[len(before) :].split(after)[0]) for key in state if key.startswith(before) and _number(key, before, after)
    }
    return max(numbers, default=-1) + 1


def _number(key: str, before: str, after: str) -> bool:
    return key[len(before) :].split(after)[0].isdigit()


def timm_card(image_size: tuple[int, int], files: Files, default: Preprocess) -> ModelCard:
    """Labels and preprocessing from timm's config.json (hub layout), the family's default where it says nothing."""
    config = files.get("config.json", {})
    settings = {**config, **config.get("pretrained_cfg", {})}
    made = Preprocess(
        image_size=image_size,
        channels=default.channels,
        fit="crop" if settings.get("crop_mode", "center") != "squash" else "stretch",
        crop_fraction=float(settings.get("crop_pct", default.crop_fraction)),
        interpolation=_interpolation(settings.get("interpolation", default.interpolation)),
        mean=tuple(settings.get("mean", default.mean)),
        std=tuple(settings.get("std", default.std)),
    )
    return ModelCard(classes=_labels(config), preprocess=made, licence=str(settings.get("license", "") or ""))


def clip_card(config: Any, stride: int) -> ModelCard:
    """Kinetics preprocessing of PySlowFast, pytorchvideo and torchvision's video models: grey of 0.45, spread of 0.225."""
    made = Preprocess(config.image_size, config.in_channels, "crop", 0.875, "bilinear", (0.45,), (0.225,))
    return ModelCard(preprocess=dataclasses.replace(made, frames=config.frames or 0, stride=stride))


def timm_files(
    architecture: str, config: Any, card: ModelCard, model_args: dict[str, Any], fixed_size: bool = True
) -> dict[str, dict[str, Any]]:
    """The config.json of timm's hub layout; a convolutional network has no fixed input size."""
    p = card.preprocess or Preprocess(image_size=config.image_size)
    settings = {
        "tag": "vitrail",
        "input_size": [config.in_channels, *p.image_size],
        "fixed_input_size": fixed_size,
        "interpolation": p.interpolation,
        "crop_pct": p.crop_fraction,
        "crop_mode": {"crop": "center", "stretch": "squash", "pad": "border"}[p.fit],
        "mean": list(_per_channel(p.mean, config.in_channels)),
        "std": list(_per_channel(p.std, config.in_channels)),
        "num_classes": config.num_classes,
        "license": card.licence or None,
    }
    content = {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "model_args": model_args,
        "pretrained_cfg": settings,
    }
    if card.classes:
        content["label_names"] = list(card.classes)
    return {"config.json": content}


def transformers_card(image_size: tuple[int, int], files: Files, default: Preprocess) -> ModelCard:
    """Labels from config.json and preprocessing from preprocessor_config.json, as transformers writes them."""
    settings = files.get("preprocessor_config.json", {})
    size = settings.get("size", {})
    crops = bool(settings.get("do_center_crop"))
    resized = size.get("shortest_edge") or size.get("height") if isinstance(size, Mapping) else size
    fraction = image_size[0] / resized if crops and resized else settings.get("crop_pct") or 1.0
    made = Preprocess(
        image_size=image_size,
        channels=default.channels,
        fit="crop" if crops or settings.get("crop_pct") else "stretch",
        crop_fraction=min(1.0, float(fraction)),
        interpolation={0: "nearest", 2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 2), "bilinear"),  # type: ignore[arg-type]
        mean=tuple(settings.get("image_mean", default.mean)),
        std=tuple(settings.get("image_std", default.std)),
    )
    return ModelCard(classes=_labels(files.get("config.json", {})), preprocess=made)


def transformers_files(config: Any, card: ModelCard, settings: dict[str, Any], processor: str) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json as transformers reads them."""
    p = card.preprocess or Preprocess(image_size=config.image_size)
    classes = card.classes or tuple(f"LABEL_{i}" for i in range(config.num_classes))
    side = dict(zip(("height", "width"), p.image_size, strict=True))
    resized = {name: round(pixels / p.crop_fraction) for name, pixels in side.items()}
    crops = p.fit == "crop"
    return {
        "config.json": settings
        | {"id2label": {str(i): c for i, c in enumerate(classes)}, "label2id": {c: i for i, c in enumerate(classes)}},
        "preprocessor_config.json": {
            "image_processor_type": processor,
            "do_resize": True,
            "size": resized if crops else side,
            "resample": {"nearest": 0, "bilinear": 2, "bicubic": 3}[p.interpolation],
            "do_center_crop": crops,
            **({"crop_size": side} if crops else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(_per_channel(p.mean, config.in_channels)),
            "image_std": list(_per_channel(p.std, config.in_channels)),
        },
    }


def transformers_clip_card(image_size: tuple[int, int], files: Files, default: Preprocess) -> ModelCard:
    """Labels and preprocessing of a video model from transformers' files, `default` where they say nothing.

    Its video processors scale pixels by a factor of their own and may shift them by one before mean and std apply; here
    that is part of mean and std.
    """
    settings = files.get("preprocessor_config.json", {})
    card = transformers_card(image_size, files, default)
    if not settings or card.preprocess is None:
        return ModelCard(classes=card.classes, preprocess=replace(default, image_size=image_size))
    size = settings.get("size", {})
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    fit = card.preprocess
    if shortest:  # the shorter side, wherever a crop is not spelled out
        fit = replace(fit, fit="crop", crop_fraction=min(1.0, image_size[0] / shortest))
    unit = 255 * float(settings.get("rescale_factor", 1 / 255))
    shift = float(bool(settings.get("offset")))
    mean = tuple((shift + m) / unit for m in fit.mean) if settings.get("do_normalize", True) else (shift / unit,)
    std = tuple(s / unit for s in fit.std) if settings.get("do_normalize", True) else (1 / unit,)
    made = replace(fit, mean=mean, std=std, frames=default.frames, stride=default.stride)
    return ModelCard(classes=card.classes, preprocess=made)


def guess_heads(width: int, variants: Mapping[str, Any], notes: list[str]) -> int:
    """Heads that the published variants of this width have, or one per 64 channels, which is noted as a guess."""
    published = {c.width: c.heads for c in variants.values()}
    heads = published.get(width) or max(1, width // 64)
    while width % heads:
        heads -= 1
    if width not in published:
        notes.append(f"guess: {heads} heads (the weights do not tell; heads=... decides)")
    return heads


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values * channels if len(values) == 1 else values


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("label_names")
    if isinstance(names, list):
        return tuple(map(str, names))
    table = config.get("id2label")
    if isinstance(table, Mapping):
        ordered = [str(table[key]) for key in sorted(table, key=lambda k: int(k))]
        if not all(name == f"LABEL_{i}" for i, name in enumerate(ordered)):
            return tuple(ordered)
    return ()


def _interpolation(word: Any) -> Any:
    return word if word in ("bilinear", "bicubic", "nearest") else "bicubic"
