"""Comparisons over many runs, and the registry of the studies that `vitrail study` offers.

A study is one module with `EXAMPLES`, a frozen `Config(StudyConfig)`, `measure(config)`, which gives rows of plain values and
goes on where it was stopped, and `conclude(config, rows)`, which makes `Findings` of them. Such a module imports no torch
before it measures, so that its settings can be explained at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vitrail.studies.grid import Cell, Grid, run_grid
    from vitrail.studies.study import run_study

__all__ = ["STUDIES", "Cell", "Grid", "run_grid", "run_study"]


class Entry(NamedTuple):
    """A row of the registry: the module in this room, and one line of what the study answers."""

    module: str
    summary: str


STUDIES: dict[str, Entry] = {
    "breakeven": Entry("breakeven", "which family to use for this data, and when a plain ViT would overtake"),
    "distillation": Entry("distillation", "soft, hard or token, from a CNN or a transformer; who agrees with whom"),
    "families": Entry("families", "ViT, hybrid, Swin, CvT, distilled DeiT and ResNet at equal size and cost"),
    "pooling": Entry("pooling", "class token or mean of the patches, each with its own learning rate"),
    "positions": Entry("positions", "none, 1-D, 2-D and relative positions, at the stem or in every layer"),
    "resolution": Entry("resolution", "what a trained model gives at other picture and patch sizes, and what that costs"),
    "robustness": Entry("robustness", "trained models on corrupted, moved, covered and shuffled pictures"),
    "scaling": Entry("scaling", "error by data size, model size and compute, and who still gains from data"),
    "shapes": Entry("shapes", "depth, width or patch size: which to scale"),
    "video": Entry("video", "ViViT 1 to 4, TimeSformer's five schemes, MViT, X3D and SlowFast at equal cost"),
}

_PUBLIC = {"Cell": "grid", "Grid": "grid", "run_grid": "grid", "run_study": "study"}


def __getattr__(name: str) -> Any:
    """Load a name's module when it is first used: the registry is read without torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitrail.studies' has no attribute {name!r}; it has: {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(f"vitrail.studies.{_PUBLIC[name]}"), name)
