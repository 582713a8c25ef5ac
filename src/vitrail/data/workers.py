"""How many loader processes pay off on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vitrail.config import ConfigError, Preprocess
from vitrail.data.samples import ImageDataset

PREFETCH = 2  # batches that each process prepares ahead
MAX_WORKERS = 16
_SHARED_MEMORY = Path("/dev/shm")


def sample_cost(dataset: ImageDataset, preprocess: Preprocess, decoded: bool) -> float:
    """Seconds of one core, roughly, to read, decode and fit one sample: enough to choose a number of processes."""
    if dataset.store.random:  # its own code runs: unknown, and looking would draw random numbers
        return 1e-3
    sizes = dataset.sizes()
    area = float(sizes.prod(1).mean()) if len(sizes) else 0.0
    if dataset.video:  # more frames are decoded than taken: those between them, and those from where decoding may begin
        each = 50e-6 + 10e-9 * preprocess.image_size[0] * preprocess.image_size[1] + 10e-9 * area
        return 5e-3 + preprocess.frames * preprocess.clips * preprocess.stride * each
    fit = 80e-6 + 10e-9 * preprocess.image_size[0] * preprocess.image_size[1] + 2e-9 * area
    return fit if decoded else fit + 50e-6 + 8e-9 * area


def choose_workers(asked: int, cost: float, world: int, batch_bytes: int) -> int:
    """How many loader processes: as many as asked for, or for -1 what pays off on this machine.

    cost: seconds per picture. None when pictures cost next to nothing; else the cores of this rank but one, as far as the
    shared memory through which batches travel has room. Raises ConfigError below -1.
    """
    if asked < -1:
        raise ConfigError(f"workers: {asked} is less than -1 (which chooses)")
    if asked >= 0:
        return asked
    if cost < 100e-6:
        return 0
    workers = min(available_cores() // world - 1, MAX_WORKERS)
    if _SHARED_MEMORY.is_dir():
        workers = min(workers, shutil.disk_usage(_SHARED_MEMORY).free // 2 // max(1, batch_bytes * (PREFETCH + 1)))
    return max(0, workers)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
