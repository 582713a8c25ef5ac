"""`--preset auto`: model size, resolution and recipe from the data, with reasons in plain sentences.

The sizes follow what is known about training ViTs on little data: regularise more and train longer the fewer pictures there
are (arXiv 2106.10270), tokens of a few pixels for small pictures, layer-wise decay and short schedules when fine-tuning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vitrail.config import RunConfig, flat, replace_flat
from vitrail.data import Data
from vitrail.models import MODELS
from vitrail.recipes import RECIPES

SIDES = (32, 48, 64, 96, 128, 160, 192, 224)
CPU_SIDE = 96  # the largest side chosen for a CPU
IMBALANCE = 5  # largest class over smallest from which on the loss is adjusted


@dataclass
class Choice:
    """Settings chosen so far, and why."""

    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str, **settings: Any) -> None:
        """Choose some settings for one reason."""
        self.settings |= settings
        self.reasons.append(reason)


@dataclass(frozen=True)
class Facts:
    """What the choice depends on."""

    pictures: int
    classes: int
    side: int  # median of the shorter sides, in pixels
    cpu: bool
    tuned: bool  # starts from trained weights


def choose(config: RunConfig, explicit: frozenset[str], data: Data, device: torch.device) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings with everything that was not set explicitly chosen from the data, and one sentence per choice."""
    assert data.train is not None
    recipe = RECIPES[data.name]() if data.name in RECIPES else None
    if recipe is not None and recipe.data == data.name:
        choice = Choice()
        chosen = {name: value for name, value in flat(recipe).items() if name not in ("data", "out", "overrides", "seed")}
        choice.overrides = dict(recipe.overrides)
        choice.add(f"{data.name} is embedded and has a measured recipe: vitrail.recipes.{data.name}", **chosen)
    else:
        sizes = data.train.sizes()
        side = int(np.median(sizes.min(1))) if len(sizes) else 224
        facts = Facts(
            len(data.train), len(data.classes), side, device.type == "cpu", bool(config.init_from or config.pretrained)
        )
        choice = Choice()
        if not facts.tuned:
            _choose_model(choice, config, explicit, facts)
        _choose_length(choice, facts)
        _choose_augmentation(choice, facts, data)
        _choose_balance(choice, data)
    if "image_size" in config.overrides:
        explicit |= {"image_size"}  # --set image_size=32 says it as well as --image-size 32
    kept = {name: value for name, value in choice.settings.items() if name not in explicit}
    if "model" not in explicit:
        kept["overrides"] = {**choice.overrides, **config.overrides}
    overruled = sorted(name for name, value in choice.settings.items() if name in explicit and flat(config)[name] != value)
    if overruled:
        choice.reasons.append(f"set by you, so left alone: {', '.join(overruled)}")
    return replace_flat(config, kept), tuple(f"preset: {reason}" for reason in choice.reasons)


def _choose_model(choice: Choice, config: RunConfig, explicit: frozenset[str], facts: Facts) -> None:
    limit = CPU_SIDE if facts.cpu else SIDES[-1]
    side = max((s for s in SIDES if s <= min(1.1 * facts.side, limit)), default=SIDES[0])
    if "model" in explicit and config.model in MODELS:
        patch = getattr(MODELS[config.model], "patch", (1, 1))[0]
        side = max(side // patch, 2) * patch
    bound = f"no more than {limit} on a CPU" if facts.cpu and facts.side > limit else "no more detail than they have"
    choice.add(f"pictures of about {facts.side} pixels: input {side} x {side}, {bound}", image_size=(side, side))
    patch = 4 if side <= 48 else 8 if side <= 128 else 16
    small = facts.pictures < 20_000
    size = "tiny" if facts.cpu or facts.pictures < 100_000 else "small" if facts.pictures < 1_000_000 else "base"
    choice.overrides = {"patch": (patch, patch), "pool": "mean", "class_token": False, "drop_path": 0.1}
    if small:
        choice.overrides["depth"] = 6
    depth = "6 layers of it" if small else "all its layers"
    choice.add(
        f"{facts.pictures:,} training pictures: ViT {size}, {depth}, patches of {patch} ({(side // patch) ** 2} tokens)",
        model=f"vit_{size}_patch16_224",
    )
    if facts.pictures < 100_000:
        choice.reasons.append("few pictures and no trained weights: a convolution may do better, compare --model resnet18")


def _choose_length(choice: Choice, facts: Facts) -> None:
    batch = 64 if facts.pictures < 5_000 else 128 if facts.pictures < 100_000 else 512
    if facts.tuned:
        epochs = int(np.clip(200_000 / facts.pictures, 3, 30))
        choice.add(
            f"starting from trained weights: {epochs} epochs, a small learning rate, smaller still in the first layers",
            epochs=epochs, batch_size=batch, lr=2e-4, lr_batch=128, warmup_epochs=epochs / 10, layer_decay=0.75, ema=0.0,
        )  # fmt: skip
        return
    seen = 300_000 if facts.cpu else 3_000_000
    epochs = int(np.clip(seen / facts.pictures, 20 if facts.cpu else 90, 300))
    where = "a CPU (--time-budget fits it to your time)" if facts.cpu else "an accelerator"
    choice.add(
        f"{epochs} epochs, about {seen:,} pictures seen, as suits {where}; averaged weights",
        epochs=epochs, batch_size=batch, lr=1e-3, lr_batch=256 if batch > 128 else 0, warmup_epochs=max(epochs / 20, 1),
        weight_decay=0.05, ema=0.999,
    )  # fmt: skip


def _choose_augmentation(choice: Choice, facts: Facts, data: Data) -> None:
    if reason := _why_not_to_flip(data.classes):
        choice.add(f"no mirrored pictures, because {reason}; turned and shifted a little instead", hflip=0.0,
                   crop_scale=(0.6, 1.0), affine_degrees=10.0, affine_translate=0.1)  # fmt: skip
    else:
        choice.add("mirrored and randomly cropped pictures", hflip=0.5, crop_scale=(0.35, 1.0))
    if facts.tuned:
        choice.add("little further augmentation, as the weights have seen much", randaugment_ops=0, label_smoothing=0.1)
    elif facts.pictures < 1_000_000:
        mixing = {} if data.multi_label else {"mixup": 0.2, "cutmix": 0.5, "mix_probability": 0.5}
        choice.add(
            f"{facts.pictures:,} pictures overfit soon: RandAugment, erasing{', mixing' if mixing else ''}, label smoothing",
            randaugment_ops=2, randaugment_magnitude=9.0, randaugment_probability=0.5, erasing=0.1, label_smoothing=0.1,
            **mixing,
        )  # fmt: skip


def _why_not_to_flip(classes: tuple[str, ...]) -> str:
    """Mirroring changes what a sign, a letter or a side is."""
    if all(re.fullmatch(r"\d+|.", name) for name in classes):
        return "the classes are digits or single characters"
    sided = side_in_names(classes)
    return f"the class {sided!r} names a side" if sided else ""


def side_in_names(classes: tuple[str, ...]) -> str:
    """The first class that is called after a side, left or right; "" if none is."""
    return next((name for name in classes if re.search(r"(?i)\b(left|right)\b", name.replace("_", " "))), "")


def _choose_balance(choice: Choice, data: Data) -> None:
    assert data.train is not None
    counts = data.train.class_counts()
    if counts.max() > IMBALANCE * max(counts.min(), 1):
        method = "weights" if data.multi_label else "logit-adjustment"
        choice.add(
            f"classes have {counts.min():,} to {counts.max():,} pictures: rare ones count for more ({method})", balance=method
        )
