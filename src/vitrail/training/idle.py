"""Settings that were asked for and change nothing beside the others: the plan says so, and nobody waits for their effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitrail.config import RunConfig, flat

Settings = dict[str, Any]

# The settings, when they count, and what is missing otherwise.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Settings], bool], str], ...] = (
    (("distill", "distill_weight", "distill_temperature", "teacher_classes", "teacher_cache"),
     lambda s: bool(s["teacher"]), "without a teacher (--teacher)"),
    (("distill_temperature",), lambda s: not s["teacher"] or s["distill"] == "soft", "with --distill hard; soft uses it"),
    (("mask_ratio",), lambda s: s["objective"] != "classify", "without --objective masked or mae"),
    (("mask_target",), lambda s: s["objective"] == "masked", "without --objective masked"),
    (("patch_norm", "decoder_width", "decoder_depth", "decoder_heads"),
     lambda s: s["objective"] == "mae", "without --objective mae"),
    (("loss", "label_smoothing"), lambda s: s["objective"] == "classify", "where no labels are used (--objective masked, mae)"),
    (("lora_alpha", "lora_place"), lambda s: s["lora_rank"] > 0, "without --lora-rank"),
    (("balance_power",), lambda s: s["balance"] != "none", "without --balance"),
    (("momentum", "nesterov"), lambda s: s["optimizer"] == "sgd", "without --optimizer sgd"),
    (("beta1", "beta2"), lambda s: s["optimizer"] != "sgd", "with --optimizer sgd; --momentum is its own"),
    (("milestones", "step_factor"), lambda s: s["schedule"] == "step", "without --schedule step"),
    (("progressive_share",), lambda s: bool(s["progressive"]), "without --progressive"),
    (("crop_scale", "crop_ratio"), lambda s: s["crop"] == "random", "with --crop none"),
    (("crop_fraction",), lambda s: s["fit"] in (None, "crop"), "where --fit is not crop"),
    (("randaugment_magnitude", "randaugment_probability"), lambda s: s["randaugment_ops"] > 0, "without --randaugment-ops"),
    (("mix_probability",), lambda s: bool(s["mixup"] or s["cutmix"]), "without --mixup or --cutmix"),
    (("mix_switch",), lambda s: bool(s["mixup"] and s["cutmix"]), "unless both --mixup and --cutmix are on"),
    (("probe_every",), lambda s: bool(s["probe_shots"]), "without --probe-shots"),
)  # fmt: skip


def idle_settings(config: RunConfig, explicit: frozenset[str]) -> tuple[str, ...]:
    """One sentence for each reason why settings that were given explicitly have no effect."""
    settings, told = flat(config), []
    for names, counts, missing in _RULES:
        idle = [name for name in names if name in explicit]
        if idle and not counts(settings):
            told.append(f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect {missing}")
    return tuple(told)
