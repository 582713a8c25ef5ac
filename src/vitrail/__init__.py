"""Vitrail: Vision Transformers on images and video.

The public page: models and checkpoints here, the verbs `train`, `evaluate` and `Predictor` loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitrail.checkpoints import create_model, load_model, save_model
    from vitrail.evaluation.classify import evaluate
    from vitrail.inference.predictor import Predictor
    from vitrail.layers.attention import record_attention
    from vitrail.models import list_models
    from vitrail.runs import train

_PUBLIC = {
    "create_model": "vitrail.checkpoints",
    "list_models": "vitrail.models",
    "load_model": "vitrail.checkpoints",
    "save_model": "vitrail.checkpoints",
    "record_attention": "vitrail.layers.attention",
    "train": "vitrail.runs",
    "evaluate": "vitrail.evaluation.classify",
    "Predictor": "vitrail.inference.predictor",
}

__all__ = [
    "Predictor",
    "__version__",
    "create_model",
    "evaluate",
    "list_models",
    "load_model",
    "record_attention",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name's room when it is first used: `import vitrail` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}; it has: {', '.join(_PUBLIC)}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
