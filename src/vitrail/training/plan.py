"""What a run is going to do, found out and shown before its first step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vitrail.cost import (
    Memory,
    autocast,
    count_flops,
    count_parameters,
    forecast_memory,
    matmul_peak,
    slow_precision,
    synchronise,
)
from vitrail.data import Batch, Data, ImageDataset
from vitrail.models.deit import DeiT
from vitrail.models.pretext import Pretext

from .log import duration
from .setup import Job
from .step import micro_step
from .teacher import Teacher

REHEARSED_SECONDS = 2.0  # measure about this long, or REHEARSED_STEPS if that is shorter
REHEARSED_STEPS = 4
NAMED_CLASSES = 12


@dataclass(frozen=True)
class Rehearsal:
    """Measured seconds: a micro-step, waiting for its batch, the update after all micro-steps, evaluating one picture."""

    micro: float
    wait: float
    update: float
    picture: float

    def step(self, accumulate: int) -> float:
        """One optimiser step."""
        return accumulate * (self.micro + self.wait) + self.update


def rehearse(job: Job, stream: Iterator[Batch]) -> tuple[Rehearsal, Generator[Batch]]:
    """Run a few micro-steps, an update and a forward pass with the clock on, and put everything back as it was.

    The batches seen are handed out again by the returned stream, so the run itself starts with the first one.
    """
    state, device = job.state, job.ranks.device
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in state.trained.state_dict().items()}
    average = None if state.ema is None else {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    held = [next(stream)]
    micro_step(job, held[0], 0)  # the first one allocates, compiles and warms up
    micro: list[float] = []
    wait: list[float] = []
    while len(micro) < REHEARSED_STEPS and job.ranks.agree(sum(micro) + sum(wait) < REHEARSED_SECONDS):
        held.append(next(stream))
        wait.append(held[-1].wait)
        micro.append(_timed(job, lambda: micro_step(job, held[-1], len(held) - 1)))
    _timed(job, state.optimizer.step)
    update = _timed(job, state.optimizer.step)
    if state.ema is not None:
        update += _timed(job, lambda: state.ema.update_parameters(state.model))  # type: ignore[union-attr]
    picture = _timed(job, lambda: _evaluate(job, held[-1])) / len(held[-1].images)
    state.trained.load_state_dict(weights)
    if state.ema is not None and average is not None:
        state.ema.load_state_dict(average)
    state.optimizer.state.clear()
    state.optimizer.zero_grad(set_to_none=True)
    measured = job.ranks.agree(Rehearsal(float(np.median(micro)), float(np.median(wait)), update, picture))
    synchronise(device)
    return measured, hand_out([batch._replace(wait=0.0) for batch in held], stream)  # no step waits for these any more


def hand_out(held: list[Batch], stream: Iterator[Batch]) -> Generator[Batch]:
    """The batches held back, then the stream; closing it closes the stream."""
    yield from held
    held.clear()
    yield from stream


def _timed(job: Job, work: Callable[[], object]) -> float:
    synchronise(job.ranks.device)
    start = time.perf_counter()
    work()
    synchronise(job.ranks.device)
    return time.perf_counter() - start


@torch.no_grad()
def _evaluate(job: Job, batch: Batch) -> None:
    device, model = job.ranks.device, job.state.trained
    model.eval()
    with autocast(device, job.config.precision):
        model(job.inputs.normalise(batch.images.to(device)))
    model.train()


def steps_within(job: Job, rehearsal: Rehearsal, seconds: float) -> int:
    """How many optimiser steps, with their evaluations, fit into a time; at least one."""
    every = job.evaluation_steps
    judged, final = (len(dataset or ()) / job.ranks.world for dataset in (job.data.val, job.data.test or job.data.val))
    left = seconds - final * rehearsal.picture
    step = rehearsal.step(job.config.accumulate) * job.progressive.mean_cost
    return max(math.floor(left / (step + judged * rehearsal.picture / every)), 1)


@dataclass(frozen=True)
class Plan:
    """The figures of a run before it starts, and the lines that say them. `flops` are those of one picture forward."""

    lines: tuple[str, ...]
    flops: int
    memory: Memory
    peak: float  # FLOP/s of matrix products on this device, in this precision

    def utilisation(self, pictures_per_second: float, world: int = 1, cost: float = 1.0) -> float:
        """Model FLOP utilisation: three forward passes' FLOPs a picture, against the measured peak of `world` devices.

        cost: of a picture at the size it is trained at, relative to one at the input size.
        """
        return 3 * cost * self.flops * pictures_per_second / (self.peak * world)


def make_plan(job: Job) -> Plan:
    """What can be known without running anything: counted, forecast, and put into words."""
    c, model = job.config, job.state.trained
    flops = count_flops(model)
    memory = forecast_memory(model, job.micro_batch, precision=c.precision, optimizer=c.optim.optimizer, ema=bool(c.optim.ema))
    peak = matmul_peak(job.ranks.device, c.precision)
    rows = {
        "data": _describe_data(job.data),
        "classes": _describe_classes(job.loader.dataset) if job.state.pretext is None else "labels are not used",
        "input": _describe_input(job),
        "model": _describe_model(job, flops),
        "batch": _describe_batch(job),
        "lr": _describe_lr(job),
        "machine": f"{job.ranks.device} ({c.precision}), matrix products measured at {peak / 1e12:.3g} TFLOP/s, "
                   f"{job.loader.workers} loader processes",
        "memory": _describe_memory(memory, available_memory(job.ranks.device)),
    }  # fmt: skip
    if job.state.pretext is not None:
        rows["learned"] = _describe_pretext(job.state.pretext)
    if job.inputs.teacher is not None:
        rows["teacher"] = _describe_teacher(job, job.inputs.teacher)
    if job.progressive.sizes:
        rows["sizes"] = str(job.progressive)
    notes = [("note", note) for note in (*job.notes, slow_precision(job.ranks.device, c.precision)) if note]
    return Plan(tuple(_row(name, text) for name, text in [*rows.items(), *notes]), flops, memory, peak)


def length_lines(job: Job, rehearsal: Rehearsal | None) -> tuple[str, ...]:
    """How many steps, and after a rehearsal how long they will take."""
    total, epoch, every = job.state.progress.total, job.loader.steps_per_epoch, job.evaluation_steps
    lines = [_row("length", f"{total:,} steps, {total / epoch:.4g} epochs of {epoch:,}; evaluated every {every:,}")]
    if rehearsal is not None:
        step = rehearsal.step(job.config.accumulate) * job.progressive.mean_cost
        judging = total / every * len(job.data.val or ()) / job.ranks.world * rehearsal.picture
        what = "clips" if job.state.model.takes_clips else "images"
        speed = f"{1000 * step:.3g} ms a step, {job.config.batch_size / step:,.0f} {what}/s"
        lines.append(_row("time", f"about {duration(total * step + judging)}: {speed}"))
    return tuple(lines)


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device, 0 where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else 0
    except (ValueError, OSError, AttributeError):
        return 0


def _row(name: str, text: str) -> str:
    return f"{name:<9}{text}"


def _describe_data(data: Data) -> str:
    counts = ", ".join(f"{len(dataset):,} {name}" for name, dataset in data.splits().items())
    return f"{data.name}: {counts}" + ("" if data.val is not None else "; nothing to validate on")


def _describe_classes(dataset: ImageDataset) -> str:
    counts = dataset.class_counts()
    if len(counts) <= NAMED_CLASSES:
        named = ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts, strict=True))
    else:
        named = f"{counts.min():,} to {counts.max():,} training samples each"
    return f"{len(counts)}{' labels, several a picture' if dataset.multi_label else ''} ({named})"


def _describe_input(job: Job) -> str:
    p = job.card.preprocess
    assert p is not None
    sizes = job.loader.dataset.sizes()
    noun = job.loader.dataset.noun
    side = " x ".join(f"{median:.0f}" for median in np.median(sizes, 0)) if len(sizes) else ""
    seen = f"; {noun}s of about {side} (height x width)" if side else ""
    if p.frames:
        pace = f"{p.fps:g} a second" if p.fps else f"every {p.stride}." if p.stride > 1 else "each"
        taken = f"{p.frames} frames, {p.sampling}" + (f" ({pace})" if p.sampling == "dense" else "")
        seen += f"; clips of {taken}; {p.clips} x {p.crops} views in evaluation"
    return f"{p.image_size[0]} x {p.image_size[1]} pixels, {p.channels} channels, fit {p.fit}{seen}"


def _describe_model(job: Job, flops: int) -> str:
    model, changed = job.state.model, job.config.overrides
    settings = f" ({', '.join(f'{name} {value}' for name, value in changed.items())})" if changed else ""
    size = f"{count_parameters(model) / 1e6:.3g} M parameters"
    what = "clip" if model.takes_clips else "picture"
    return f"{model.name or model.family}{settings}: {size}, {flops / 2e9:.3g} GMACs ({flops / 1e9:.3g} GFLOPs) a {what}"


def _describe_pretext(pretext: Pretext) -> str:
    own = count_parameters(pretext) - count_parameters(pretext.model)
    whole = count_flops(pretext.model)
    return f"{pretext.describe()}; {own / 1e6:.3g} M parameters beside the model, whose own pass costs {whole / 1e9:.3g} GFLOPs"


def _describe_teacher(job: Job, teacher: Teacher) -> str:
    d = job.config.distillation
    kind = "its answers" if d.distill == "hard" else f"its probabilities at temperature {d.distill_temperature:g}"
    head = "the distillation head" if isinstance(job.state.model, DeiT) else "the head that learns the labels"
    return f"{teacher.describe()}; {kind} ({d.distill}) weigh {d.distill_weight:g} of the loss, learned by {head}"


def _describe_memory(memory: Memory, available: int) -> str:
    parts = {
        "weights": memory.parameters, "gradients": memory.gradients, "optimiser": memory.optimiser + memory.averaged,
        "activations": memory.activations,
    }  # fmt: skip
    told = f"about {_size(memory.total)}: {', '.join(f'{name} {_size(size)}' for name, size in parts.items())}"
    if available and memory.total > available:
        told += f"; only {_size(available)} are free: --accumulate 2 halves the activations, --checkpointing saves more"
    return told


def _describe_batch(job: Job) -> str:
    c, world = job.config, job.ranks.world
    if c.accumulate * world == 1:
        return f"{c.batch_size}"
    processes = f" x {world} processes" if world > 1 else ""
    return f"{c.batch_size} = {job.micro_batch} x {c.accumulate} micro-steps{processes}"


def _describe_lr(job: Job) -> str:
    c, optim = job.config, job.config.optim
    scaled = f" ({optim.lr:g} x {c.batch_size} / {optim.lr_batch})" if optim.lr_batch else ""
    return f"{job.peak_lr:.4g}{scaled}, {optim.optimizer}, {c.schedule.schedule} after {job.warmup:,} steps of warm-up"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
