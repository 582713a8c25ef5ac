"""Recipes: typed functions, one per measured result; the docstring is the command and the number it gave."""

from __future__ import annotations

from collections.abc import Callable

from vitrail.config import RunConfig

from .digits import digits
from .motion import motion, motion_mvit, motion_slowfast, motion_timesformer, motion_x3d
from .small import bit, cvt, deit_hard, deit_soft, hybrid, resnet, swin, vit, vit_finetune

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        *(digits, vit, hybrid, deit_hard, deit_soft, swin, cvt, resnet, bit, vit_finetune),
        *(motion, motion_mvit, motion_slowfast, motion_timesformer, motion_x3d),
    )
}

__all__ = [
    "RECIPES",
    "bit",
    "cvt",
    "deit_hard",
    "deit_soft",
    "digits",
    "hybrid",
    "motion",
    "motion_mvit",
    "motion_slowfast",
    "motion_timesformer",
    "motion_x3d",
    "resnet",
    "swin",
    "vit",
    "vit_finetune",
]
