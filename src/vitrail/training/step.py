"""One optimiser step: micro-steps that add up gradients, then an update, unless something in it is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.checkpoints.io import write_safetensors
from vitrail.cost import autocast
from vitrail.data import Batch

from .distributed import unsynchronised
from .optim import gradient_norm
from .progressive import Size
from .state import reseed

if TYPE_CHECKING:
    from .setup import Job

MAX_KEPT = 10  # refused batches kept in one run directory


class NonFiniteError(ValueError):
    """Training stopped because too many steps in a row gave a loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured over all processes: means of the objective's values, the gradient's norm, what became of it."""

    values: dict[str, float]
    norm: float
    outcome: str  # done; refused; rescaled (fp16: the gradient overflowed, the loss scale was lowered)
    stopping: bool  # some process was asked to stop


def micro_step(job: Job, batch: Batch, number: int, *, last: bool = True, size: Size | None = None) -> dict[str, Tensor]:
    """Forward and backward of global micro-step `number`; gradients are added to those there are, processes meet at the last.

    Returns the objective's values as their share of the step's mean: all micro-batches are equally large, so shares add up
    to the mean over the whole batch, and so do the gradients. size: smaller height and width to train at.
    """
    config, device = job.config, job.ranks.device
    draw = reseed(config.seed, number, job.ranks.rank)
    images, targets = job.inputs(batch, device, draw, size)
    with unsynchronised(job.runner, not last):
        with autocast(device, config.precision):
            values = job.objective(job.runner, images, targets)
        job.state.scaler.scale(values["loss"] / config.accumulate).backward()
    return {name: value.detach() / config.accumulate for name, value in values.items()}


def optimiser_step(job: Job, batches: Sequence[Batch], first: int, stopping: bool = False) -> StepResult:
    """One step over its micro-batches, the first of which is global micro-step `first`; learning rates are already set.

    A step whose loss or gradient is not finite changes nothing: not the weights, the optimiser, their average, nor the
    running statistics of batch normalisation.
    """
    state = job.state
    statistics = batch_statistics(state.model)
    sums: dict[str, Tensor] = {}
    size = job.progressive.size(state.progress.step, state.progress.total)
    for i, batch in enumerate(batches):
        values = micro_step(job, batch, first + i, last=i == len(batches) - 1, size=size)
        sums = {name: sums.get(name, 0) + value.float() for name, value in values.items()}
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(job.parameters)
    *means, length = torch.stack([*sums.values(), norm.float()]).tolist()  # the step's only wait for the device
    *means, stop = job.ranks.total([*(mean / job.ranks.world for mean in means), float(stopping)])
    measured = dict(zip(sums, means, strict=True))
    finite = math.isfinite(measured["loss"]) and math.isfinite(length)
    outcome = _update(job, norm) if finite else _refuse(job, measured["loss"], statistics)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return StepResult(measured, length, outcome, stop > 0)


def _update(job: Job, norm: Tensor) -> str:
    state, limit = job.state, job.config.optim.clip_norm
    if limit:
        nn.utils.clip_grads_with_norm_(job.parameters, limit, norm)
    state.scaler.step(state.optimizer)
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    return "done"


def _refuse(job: Job, loss: float, statistics: list[tuple[Tensor, Tensor]]) -> str:
    for buffer, before in statistics:
        buffer.copy_(before)
    scaler = job.state.scaler
    overflow = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1
    return "rescaled" if overflow else "refused"


def batch_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(buffer, copy) of the running statistics that a forward pass changes."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]


def keep_refused(job: Job, batches: Sequence[Batch], result: StepResult) -> Path | None:
    """Save the batches of the step just refused for replay, one file per process; None when enough were kept already.

    nonfinite-step-N.safetensors holds images, targets, indices and keys of every micro-batch ("0/images", ...) and, as
    metadata, the seed, the first global micro-step, the loss, the gradient's norm and the samples' names. With the weights
    of a checkpoint before it, `micro_step` on these batches repeats what happened.
    """
    step = job.state.progress.step
    path = job.path / f"nonfinite-step-{step}.safetensors"
    if not job.ranks.main:
        path = path.with_suffix(f".rank{job.ranks.rank}.safetensors")
    if len(list(job.path.glob("nonfinite-step-*"))) >= MAX_KEPT * job.ranks.world:
        return None
    fields = ("images", "targets", "indices", "keys")
    tensors = {f"{i}/{name}": getattr(batch, name) for i, batch in enumerate(batches) for name in fields}
    names = [job.loader.dataset.names(int(i)) for batch in batches for i in batch.indices]
    about = {
        "seed": job.config.seed, "micro_step": (step - 1) * job.config.accumulate, "loss": str(result.values["loss"]),
        "norm": str(result.norm), "samples": names,
    }  # fmt: skip
    write_safetensors(path, tensors, {"nonfinite": json.dumps(about, ensure_ascii=False)})
    return path
