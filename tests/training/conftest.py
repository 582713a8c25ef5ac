"""A run small enough to be trained in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.cost import Memory
from vitrail.training import plan
from vitrail.training.loop import Run, train

Samples = list[tuple[torch.Tensor, int]]

SETTINGS: dict[str, Any] = {
    "model": "vit_micro_patch4_16", "overrides": {"depth": 1}, "batch_size": 16, "steps": 6, "device": "cpu",
    "precision": "fp32", "tensorboard": False, "workers": 0, "crop": "none", "hflip": 0.0, "warmup_epochs": 0,
    "save_every_minutes": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def samples() -> Samples:
    """96 pictures of three classes that differ in which channel is bright; about a quarter validates."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (96, 3, 16, 16), dtype=torch.uint8, generator=draws)
    for i, image in enumerate(images):
        image[i % 3] += 100
    return [(image, i % 3) for i, image in enumerate(images)]


@pytest.fixture
def fit(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """fit(**settings): a run of a few steps in tmp_path/run, unless `out` says otherwise; its costs are not counted."""
    monkeypatch.setattr(plan, "count_flops", lambda model: 1_000_000)
    monkeypatch.setattr(plan, "forecast_memory", lambda *_, **__: Memory(1, 2, 3, 4, 5))
    monkeypatch.setattr(plan, "matmul_peak", lambda device, precision: 1e9)

    def run(data: Any = None, **settings: Any) -> Run:
        return train(data=samples if data is None else data, **{"out": str(tmp_path / "run"), **SETTINGS, **settings})

    return run
