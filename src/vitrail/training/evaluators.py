"""How good the model is by now. An evaluator is called with a model and yields (name, value)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from vitrail.config import Preprocess
from vitrail.data import ImageDataset
from vitrail.evaluation.classify import predict_dataset
from vitrail.evaluation.metrics import Outputs, Report, classification_report
from vitrail.models import Model

from .distributed import Ranks

Evaluator = Callable[[Model], Iterable[tuple[str, float]]]


@dataclass(frozen=True)
class SplitEvaluator:
    """All metrics of one split; every process answers its share of the samples, the main one judges."""

    dataset: ImageDataset
    preprocess: Preprocess
    ranks: Ranks
    precision: str
    batch_size: int
    workers: int

    def __call__(self, model: Model) -> Iterator[tuple[str, float]]:
        """Yield (name, value) of every metric."""
        report = self.report(model)
        yield from self.ranks.agree(report.metrics if report else {}).items()

    def report(self, model: Model, precision: str = "", progress: str | None = None) -> Report | None:
        """The full report on the main process, None on the others."""
        ranks = self.ranks
        mine = predict_dataset(
            model, self.dataset, self.preprocess, device=ranks.device, precision=precision or self.precision,
            batch_size=self.batch_size, workers=self.workers, rank=ranks.rank, world=ranks.world,
            progress=progress if ranks.main else None,
        )  # fmt: skip
        parts = ranks.gather(mine)
        if not ranks.main:
            return None
        logits, targets, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = indices.argsort(stable=True)
        everything = Outputs(logits[order], targets[order], indices[order])
        report = classification_report(everything.logits, everything.targets, self.dataset.classes, self.dataset.multi_label)
        return dataclasses.replace(report, outputs=everything)
