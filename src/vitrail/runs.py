"""A training run from start to report: what `vitrail.train` and the `train` verb call."""

from __future__ import annotations

from typing import Any

from vitrail.config import RunConfig
from vitrail.inspection.report import write_report
from vitrail.training.loop import Run
from vitrail.training.loop import train as fit


def train(config: RunConfig | None = None, data: Any = None, **settings: Any) -> Run:
    """Train a classifier and write its report.

    Give a RunConfig, or any of its fields by name: `train(data="digits", model="vit_tiny_patch16_224", lr=1e-3, epochs=10)`.
    `data` may also be a torch Dataset or a list of (path, label). Returns the finished Run: `.path`, `.model`, `.metrics`.
    Raises ValueError for settings, data or checkpoints that cannot be used, naming the nearest valid choice.
    """
    run = fit(config, data=data, **settings)
    if run.config.report and run.is_main:
        write_report(run.path, model=run.model, data=data, report=run.report)
    return run
