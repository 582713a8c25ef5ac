"""How good the model is by now. An evaluator is called with a model and yields (name, value)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vitrail.config import ConfigError, Preprocess
from vitrail.data import ImageDataset
from vitrail.evaluation import fewshot
from vitrail.evaluation.classify import predict_dataset
from vitrail.evaluation.features import extract_features
from vitrail.evaluation.metrics import Outputs, Report, classification_report
from vitrail.models import Model

from .distributed import Ranks
from .selfsupervision import PretextEvaluator

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


class FewShotEvaluator:
    """The ViT paper's few-shot measure of the features while they are learned: no head, a few training samples per class.

    Yields ("fewshot_5", accuracy on the validation samples), for every number of shots, the mean over `seeds` subsets, at the
    authors' l2. Every process embeds its share, the main one solves. Raises ConfigError for several labels per sample, for
    nothing to validate on, and for a class without training samples.
    """

    def __init__(
        self, train: ImageDataset, judge: SplitEvaluator | PretextEvaluator | None, shots: tuple[int, ...], seeds: int = 3
    ):
        if judge is None or train.multi_label:
            missing = "validation samples" if judge is None else "one class per sample"
            raise ConfigError(f"probe_shots needs {missing}; leave it out")
        self.judge, self.shots = judge, shots
        draws = [
            fewshot.draw_shots(np.asarray(train.targets, np.int64), train.classes, max(shots), seed) for seed in range(seeds)
        ]
        self.shown = train.subset(np.unique(np.concatenate(draws)))
        self.seeds = seeds

    def __call__(self, model: Model) -> Iterator[tuple[str, float]]:
        """Yield ("fewshot_<shots>", accuracy)."""
        shown, judged = (self._features(model, dataset) for dataset in (self.shown, self.judge.dataset))
        values: dict[str, float] = {}
        if shown is not None and judged is not None:
            (x, y), (queries, truth) = shown, judged
            classes = self.shown.classes
            for shots in self.shots:
                right = []
                for seed in range(self.seeds):
                    rows = torch.from_numpy(fewshot.draw_shots(y.numpy(), classes, shots, seed))
                    answers = fewshot.Ridge(x[rows], y[rows], len(classes)).scores(queries, fewshot.L2).argmax(1)
                    right.append(float((answers == truth).float().mean()))
                values[f"fewshot_{shots}"] = sum(right) / len(right)
        yield from self.judge.ranks.agree(values).items()

    def _features(self, model: Model, dataset: ImageDataset) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(embeddings, classes) of all readable samples on the main process, None on the others."""
        judge, ranks = self.judge, self.judge.ranks
        mine = extract_features(
            model, dataset, judge.preprocess, device=ranks.device, precision=judge.precision, batch_size=judge.batch_size,
            workers=judge.workers, rank=ranks.rank, world=ranks.world,
        )  # fmt: skip
        parts = [part for part in ranks.gather(mine) if len(part.indices)]
        if not ranks.main:
            return None
        order = torch.cat([part.indices for part in parts]).argsort(stable=True)
        return torch.cat([part.features for part in parts])[order], torch.cat([part.targets for part in parts])[order]
