"""Checkpoints in and out: ours, and those of other projects through invertible tables."""

from .inflate import inflate
from .mapping import CheckpointError
from .pretrained import create_model
from .store import FORMATS, load_checkpoint_card, load_model, save_model

__all__ = ["FORMATS", "CheckpointError", "create_model", "inflate", "load_checkpoint_card", "load_model", "save_model"]
