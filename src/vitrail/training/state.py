"""Exact resume: everything a run needs to go on, written as one directory or not at all.

Two things make it exact. The order and augmentation of samples are pure functions of (seed, epoch, step, sample), and torch's
own randomness (dropout, stochastic depth, mixing) is re-seeded before every micro-step by `reseed`, so that no generator's
state has to be kept: what is saved here (weights, optimiser, averages, loss scale, counters) decides the rest of the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vitrail.checkpoints import save_model
from vitrail.checkpoints.io import read_json, read_state, write_folder, write_safetensors, write_text
from vitrail.config import ConfigError, ModelCard, from_dict
from vitrail.layers.lora import adapted
from vitrail.models import Model
from vitrail.models.pretext import Pretext

from .optim import optimizer_tensors, restore_optimizer

FORMAT = 1
FOLDER = "checkpoints"
MODEL, TENSORS, COUNTERS = "model.safetensors", "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class SaveError(OSError):
    """A file of the run could not be written; what was saved before is untouched."""


@dataclass
class Progress:
    """The counters of a run. Steps are optimiser steps done; a refused one counts, it only changes no weights."""

    step: int = 0
    total: int = 0
    evaluated: int = 0  # the step of the last evaluation
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    refused: int = 0  # steps refused in a row
    refused_total: int = 0
    seconds: float = 0.0  # spent so far, over all sessions
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of the log
    data: str = ""  # fingerprint of the training samples
    teacher: str = ""  # identity of the teacher
    probed: int = 0  # the step of the last few-shot probe


@dataclass
class TrainState:
    """All that changes while training. `pretext` holds the model and what guesses hidden patches, where there are no labels."""

    model: Model
    optimizer: Optimizer
    ema: AveragedModel | None
    scaler: GradScaler
    progress: Progress
    pretext: Pretext | None = None

    @property
    def trained(self) -> Model | Pretext:
        """All that has trained parameters."""
        return self.model if self.pretext is None else self.pretext

    @property
    def averaged(self) -> Model:
        """The weights to evaluate and keep: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]


def reseed(seed: int, micro_step: int, rank: int = 0) -> int:
    """Seed torch on all devices for one micro-step, and return the number used."""
    number = int(np.random.SeedSequence((seed, micro_step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # the same, without noting for every device that there might be from where it was called: half a millisecond
        torch.default_generator.manual_seed(number)
    return number


def save_checkpoint(run: Path, state: TrainState, card: ModelCard, keep: int) -> Path:
    """Write checkpoints/step-N as a whole (synced, then renamed) and remove all but the newest `keep`.

    Raises SaveError when the disk is full or cannot be written: the checkpoints saved before are then still there.
    """
    folder = run / FOLDER / f"step-{state.progress.step:08}"
    if folder.exists():  # a resumed run that is already at its end
        return folder
    tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(state.optimizer).items()}
    if any(adapted(state.model)):  # the model's own file holds them merged, which cannot be undone exactly
        tensors |= {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.ema is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in state.ema.state_dict().items()}
    if state.pretext is not None:
        tensors |= {f"pretext/{name}": tensor for name, tensor in state.pretext.own_state().items()}

    def fill(temporary: Path) -> None:
        save_model(state.model, temporary / MODEL, card=card)
        write_safetensors(temporary / TENSORS, tensors)
        counters = {
            "format": FORMAT,
            "progress": dataclasses.asdict(state.progress),
            "scaler": state.scaler.state_dict(),
            "bytes": {name: (temporary / name).stat().st_size for name in (MODEL, TENSORS)},
        }
        write_text(temporary / COUNTERS, json.dumps(counters))
        sync_folder(temporary)

    try:
        write_folder(folder, fill)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as problem:
        kept = newest_checkpoint(run)
        survivor = f"the run can be resumed from {kept}" if kept else "no checkpoint was saved before"
        raise SaveError(f"could not save step {state.progress.step}, is the disk full? ({problem}); {survivor}") from None
    for old in saved_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def restore(checkpoint: Path, state: TrainState) -> None:
    """Put a checkpoint's tensors and counters into `state`.

    Raises ConfigError if it was built from other settings or is going to see other training samples or another teacher.
    """
    counters = read_json(checkpoint / COUNTERS)
    weights, _ = read_state(checkpoint / MODEL)
    tensors, _ = read_state(checkpoint / TENSORS)
    try:
        state.model.load_state_dict(_under("model/", tensors) or weights)
        restore_optimizer(state.optimizer, _under("optimizer/", tensors))
        if state.ema is not None:
            state.ema.load_state_dict(_under("ema/", tensors))
        if state.pretext is not None:
            state.pretext.load_own_state(_under("pretext/", tensors))
        if counters["scaler"]:
            state.scaler.load_state_dict(counters["scaler"])
    except (RuntimeError, KeyError, ValueError) as problem:
        raise ConfigError(f"{checkpoint} does not belong to the settings of this run: {problem}") from None
    before, state.progress = state.progress, from_dict(Progress, counters["progress"])
    if before.teacher != state.progress.teacher:
        named = [f"the teacher {p.teacher}" if p.teacher else "no teacher" for p in (state.progress, before)]
        raise ConfigError(f"{checkpoint} was made with {named[0]}, the run would go on with {named[1]}: give it the same one")
    if before.data != state.progress.data:
        raise ConfigError(
            f"the training samples are not those that {checkpoint} was made with, so it cannot be gone on with exactly"
        )


def _under(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def saved_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / FOLDER).glob("step-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run directory, None if there is none."""
    return next(reversed(saved_checkpoints(run)), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there at their full length."""
    try:
        counters = read_json(checkpoint / COUNTERS)
        return bool(counters) and all((checkpoint / n).stat().st_size == size for n, size in counters["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False


def remove_unfinished(run: Path) -> list[Path]:
    """Delete what a killed process left half-written in a run directory, and say what it was."""
    checkpoints = list((run / FOLDER).glob("step-*"))
    unfinished = [path for path in checkpoints if _NAME.fullmatch(path.name) and not is_complete(path)]
    unfinished += [*(run / FOLDER).glob(".step-*"), *run.glob(".config.yaml.*"), *run.glob(".metrics.*")]
    unfinished += [file for folder in ("best", "model") for file in (run / folder).glob(f".{MODEL}.*")]
    for path in unfinished:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return unfinished


def sync_folder(folder: Path) -> None:
    """Make a folder's entries (new and renamed files) survive a power cut, where the system has a way to."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
