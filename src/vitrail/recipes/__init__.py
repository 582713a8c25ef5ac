"""Recipes: typed functions, one per measured result; the docstring is the command and the number it gave."""

from __future__ import annotations

from collections.abc import Callable

from vitrail.config import RunConfig

from .digits import digits

RECIPES: dict[str, Callable[[], RunConfig]] = {"digits": digits}

__all__ = ["RECIPES", "digits"]
