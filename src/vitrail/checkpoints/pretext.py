"""What a model was pre-trained with, beside it: the head or decoder that guesses hidden patches."""

from __future__ import annotations

from pathlib import Path

from vitrail.config import ConfigError, ObjectiveConfig, Preprocess, RunConfig, SelfSupervisionConfig
from vitrail.models import Model
from vitrail.models.mae import RATIO as MAE_RATIO
from vitrail.models.mae import MaskedAutoencoder
from vitrail.models.masked import RATIO as MASKED_RATIO
from vitrail.models.masked import MaskedPatches
from vitrail.models.pretext import Pretext

from .io import read_state, write_safetensors
from .mapping import CheckpointError

PRETEXT = "pretext.safetensors"  # in a run directory


def needs_labels(objective: ObjectiveConfig) -> bool:
    """Whether what is minimised compares with labels."""
    return objective.objective == "classify"


def build_pretext(name: str, config: SelfSupervisionConfig, model: Model, preprocess: Preprocess) -> Pretext:
    """The model inside the task of objective `name`, whose own parts have random weights.

    Raises ConfigError for a family that cannot be trained so and for settings that do not fit.
    """
    mean, std = preprocess.mean, preprocess.std
    try:
        if name == "masked":
            return MaskedPatches(model, mean, std, config.mask_target, config.mask_ratio or MASKED_RATIO)
        return MaskedAutoencoder(
            model, mean, std, config.mask_ratio or MAE_RATIO, width=config.decoder_width, depth=config.decoder_depth,
            heads=config.decoder_heads, patch_norm=config.patch_norm,
        )  # fmt: skip
    except ValueError as problem:
        raise ConfigError(str(problem)) from None


def save_pretext(pretext: Pretext, run: Path) -> Path:
    """Write what is not part of the model into a run directory."""
    file = run / PRETEXT
    write_safetensors(file, pretext.own_state(), {"format": "pt", "objective": pretext.NAME})
    return file


def load_pretext(run: Path, config: RunConfig, model: Model, preprocess: Preprocess) -> Pretext:
    """The task of a finished run around its model. Raises CheckpointError where its parts are missing or of other settings."""
    file = run / PRETEXT
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it is written at the end of a run with --objective masked or mae")
    pretext = build_pretext(config.objective.objective, config.self_supervision, model, preprocess)
    try:
        pretext.load_own_state(read_state(file)[0])
    except RuntimeError as problem:
        raise CheckpointError(f"{file} does not belong to the settings of the run: {problem}") from None
    return pretext
