"""How good a classifier is: every number of a report from its scores and the truth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.checkpoints.io import write_text
from vitrail.config import unknown
from vitrail.evaluation import bootstrap

CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks"
LABEL_THRESHOLD = 0.5  # a label of a multi-label model is given from this probability on


class Outputs(NamedTuple):
    """What a model answered to the readable samples of a data set: raw scores, the truth, and which samples they were."""

    logits: Float[Tensor, "n k"]
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"]
    indices: Int[Tensor, " n"]


@dataclass(frozen=True)
class CalibrationBin:
    """Answers whose confidence lies in (low, high]: how many, how sure on average, how often right."""

    low: float
    high: float
    count: int
    confidence: float  # nan where count is 0
    accuracy: float


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    metrics: n, top1, top5, balanced_accuracy, macro_f1, nll, ece; multi-label: n, map, micro_f1, macro_f1, nll, ece.
    `<name>_low` and `<name>_high` bound a 95 % bootstrap interval over samples. Rates are fractions, nll is in nats.
    confusion: (k, k) counts, rows are the truth and columns the answers; multi-label: (k, 2, 2) per label, `[truth][answer]`.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    confusion: NDArray[np.int64]
    calibration: list[CalibrationBin]
    classes: tuple[str, ...]
    multi_label: bool = False
    split: str = ""  # of the data set; "all" of one that has nothing else
    notes: tuple[str, ...] = field(default=())
    outputs: Outputs | None = field(default=None, repr=False, compare=False)  # not saved

    @property
    def headline(self) -> str:
        """The name of the metric that stands for the whole."""
        return "map" if self.multi_label else "top1"

    def top_confusions(self, count: int = 20) -> list[tuple[str, str, int, float]]:
        """The most frequent mistakes as (truth, answer, how often, share of the truth's samples), most frequent first."""
        if self.multi_label:
            return []
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        support = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [divmod(int(cell), len(self.classes)) for cell in order]
        return [
            (self.classes[t], self.classes[a], int(wrong[t, a]), float(wrong[t, a] / support[t]))
            for t, a in pairs
            if wrong[t, a]
        ]

    def between(self, first: str, second: str) -> tuple[int, int]:
        """(right, all) of the samples of two classes that were answered with one of the two: can it tell them apart?

        Raises ValueError for a class that it does not have, or where samples have several labels.
        """
        if self.multi_label:
            raise ValueError("classes of samples with several labels are not answered one instead of the other")
        for name in (first, second):
            if name not in self.classes:
                raise unknown("class", name, self.classes)
        at = [self.classes.index(first), self.classes.index(second)]
        cells = self.confusion[np.ix_(at, at)]
        return int(np.trace(cells)), int(cells.sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined numbers (nan) become None."""
        return {
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "per_class": [{key: _finite(value) for key, value in row.items()} for row in self.per_class],
            "confusion": self.confusion.tolist(),
            "calibration": [{key: _finite(value) for key, value in vars(part).items()} for part in self.calibration],
            "classes": list(self.classes),
            "multi_label": self.multi_label,
            "split": self.split,
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> Path:
        """Write as JSON, renamed into place when complete."""
        write_text(Path(path), json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(
            metrics={name: _nan(value) for name, value in values["metrics"].items()},
            per_class=[{key: _nan(value) for key, value in row.items()} for row in values["per_class"]],
            confusion=np.asarray(values["confusion"], dtype=np.int64),
            calibration=[CalibrationBin(**{key: _nan(value) for key, value in part.items()}) for part in values["calibration"]],
            classes=tuple(values["classes"]),
            multi_label=values["multi_label"],
            split=values["split"],
            notes=tuple(values["notes"]),
        )

    def __str__(self) -> str:
        """One line per metric, percentages with their interval."""
        lines = [f"{_TITLES.get(name, name):<20}{_shown(self.metrics, name)}" for name in self.metrics if not _is_bound(name)]
        return "\n".join([*lines, *self.notes])


_TITLES = {
    "n": "samples",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "map": "mean AP",
    "nll": "NLL (nats)",
    "ece": "calibration error",
}


def classification_report(
    logits: Float[Tensor, "n k"],
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"],
    classes: tuple[str, ...] | list[str],
    multi_label: bool = False,
    seed: int = 0,
) -> Report:
    """Every metric of `Report` from raw scores; `seed` decides the bootstrap.

    targets are class numbers (n,), or 0/1 per label (n, k) if multi_label. With fewer than five classes top5 counts the truth
    among all of them, so it is 1. A class that the samples lack has no recall (nan) and is left out of the means.
    Scores that are not finite count as no answer (equal scores for all classes) and are named in the notes.
    Raises ValueError for no samples, shapes that do not fit, or class numbers out of range.
    """
    logits, targets = logits.detach().float().cpu(), targets.detach().cpu()
    _check(logits, targets, classes, multi_label)
    broken = ~logits.isfinite().all(1)
    notes: tuple[str, ...] = ()
    if broken.any():
        logits = torch.where(broken[:, None], torch.zeros_like(logits), logits)
        notes = (f"{int(broken.sum())} of {len(logits)} samples got scores that are not finite; they count as no answer",)
    rng = np.random.default_rng(seed)
    judge = _multi_label if multi_label else _single_label
    return judge(logits, targets, tuple(classes), rng, notes)


def calibration_bins(
    confidence: Float[Tensor, " n"], right: Float[Tensor, " n"], bins: int = CALIBRATION_BINS
) -> tuple[list[CalibrationBin], float]:
    """Bins of equal width (low, high] and the expected calibration error, the mean |accuracy - confidence| over samples."""
    # A saturated softmax gives exactly 1.0, which belongs to the last bin; library versions differ there, and the diagram
    # and the number beside it have to come from the same bins.
    edges = torch.linspace(0, 1, bins + 1)
    which = torch.bucketize(confidence.float(), edges[1:-1])
    count = torch.bincount(which, minlength=bins).double()
    sure = torch.bincount(which, weights=confidence.double(), minlength=bins) / count
    hit = torch.bincount(which, weights=right.double(), minlength=bins) / count
    error = float((count * (sure - hit).abs().nan_to_num()).sum() / count.sum())
    columns = (edges[:-1].tolist(), edges[1:].tolist(), count.long().tolist(), sure.tolist(), hit.tolist())
    return [CalibrationBin(*row) for row in zip(*columns, strict=True)], error


def _single_label(
    logits: Tensor, targets: Tensor, classes: tuple[str, ...], rng: np.random.Generator, notes: tuple[str, ...]
) -> Report:
    n, k = logits.shape
    probabilities = logits.softmax(1)
    confidence, answers = probabilities.max(1)
    hits = {1: int((answers == targets).sum())}
    hits[5] = int((logits.topk(min(5, k)).indices == targets[:, None]).any(1).sum())
    metrics: dict[str, float] = {"n": float(n)}
    for rank, right in hits.items():
        low, high = bootstrap.rate_interval(right, n, rng)
        metrics |= {f"top{rank}": right / n, f"top{rank}_low": low, f"top{rank}_high": high}

    # Not by torchmetrics: it takes four seconds to import, which every run would wait for at its first evaluation.
    confusion = torch.bincount(targets * k + answers, minlength=k * k).view(k, k).numpy().astype(np.int64)
    counts = (np.diag(confusion).astype(float), confusion.sum(0).astype(float), confusion.sum(1).astype(float))
    resampled = list(bootstrap.confusion_resamples(confusion, rng))
    means = {"balanced_accuracy": 1, "macro_f1": 2}  # index into (precision, recall, f1)
    for name, index in means.items():
        spread = np.concatenate([_class_mean(bootstrap.f1_scores(*block)[index]) for block in resampled])
        low, high = bootstrap.percentiles(spread)
        metrics |= {name: float(_class_mean(bootstrap.f1_scores(*counts)[index])), f"{name}_low": low, f"{name}_high": high}
    calibration, ece = calibration_bins(confidence, (answers == targets).float())
    metrics |= {"nll": float(F.cross_entropy(logits.double(), targets)), "ece": ece}
    return Report(metrics, _per_class(classes, *counts), confusion, calibration, classes, False, notes=notes)


def _multi_label(
    logits: Tensor, targets: Tensor, classes: tuple[str, ...], rng: np.random.Generator, notes: tuple[str, ...]
) -> Report:
    # Imported when needed: it brings torchvision and torch's compiler along.
    from torchmetrics.functional.classification import binary_average_precision, binary_confusion_matrix

    n, k = logits.shape
    probabilities, truth = logits.sigmoid(), (targets > LABEL_THRESHOLD).long()
    given = (probabilities >= LABEL_THRESHOLD).long()
    confusion = np.stack([binary_confusion_matrix(given[:, c], truth[:, c]).numpy() for c in range(k)]).astype(np.int64)
    counts = tuple(t.sum(0).numpy().astype(float) for t in (given * truth, given, truth))
    precision_of = np.full(k, np.nan)  # a label without a positive sample has no average precision
    for label in truth.any(0).nonzero()[:, 0].tolist():
        precision_of[label] = float(binary_average_precision(probabilities[:, label], truth[:, label]))
    values = {"map": _class_mean(precision_of), "micro_f1": _micro_f1(*counts), "macro_f1": _macro_f1(*counts)}
    spread: dict[str, list[Any]] = {name: [] for name in values}
    for weights in bootstrap.sample_weights(n, rng, bootstrap.fitting_resamples(n * k)):
        drawn = tuple((weights @ t.float()).double().numpy() for t in (given * truth, given, truth))
        precisions = [bootstrap.weighted_average_precision(probabilities[:, c], truth[:, c], weights) for c in range(k)]
        spread["map"].append(_class_mean(torch.stack(precisions, 1).double().numpy()))
        spread["micro_f1"].append(_micro_f1(*drawn))
        spread["macro_f1"].append(_macro_f1(*drawn))
    metrics: dict[str, float] = {"n": float(n)}
    for name, value in values.items():
        low, high = bootstrap.percentiles(np.concatenate(spread[name]))
        metrics |= {name: float(value), f"{name}_low": low, f"{name}_high": high}
    calibration, ece = calibration_bins(probabilities.flatten(), truth.flatten().float())
    metrics |= {"nll": float(F.binary_cross_entropy_with_logits(logits.double(), truth.double())), "ece": ece}
    table = _per_class(classes, *counts)
    for row, value in zip(table, precision_of, strict=True):
        row["average_precision"] = float(value)
    return Report(metrics, table, confusion, calibration, classes, True, notes=notes)


def _per_class(
    classes: tuple[str, ...], hits: NDArray[np.float64], predicted: NDArray[np.float64], support: NDArray[np.float64]
) -> list[dict[str, Any]]:
    columns = bootstrap.f1_scores(hits, predicted, support)
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s), "predicted": int(a)}
        for name, p, r, f, s, a in zip(classes, *columns, support, predicted, strict=True)
    ]


def _class_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is defined; nan where nothing is (numpy's nanmean would warn)."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0.0).sum(-1) / defined.sum(-1))


def _micro_f1(hits: NDArray[np.float64], predicted: NDArray[np.float64], support: NDArray[np.float64]) -> NDArray[np.float64]:
    return bootstrap.f1_scores(*(np.asarray(counts.sum(-1)) for counts in (hits, predicted, support)))[2]


def _macro_f1(hits: NDArray[np.float64], predicted: NDArray[np.float64], support: NDArray[np.float64]) -> NDArray[np.float64]:
    return _class_mean(bootstrap.f1_scores(hits, predicted, support)[2])


def _check(logits: Tensor, targets: Tensor, classes: tuple[str, ...] | list[str], multi_label: bool) -> None:
    n, k = logits.shape
    if n == 0:
        raise ValueError("there is no sample to evaluate")
    if len(classes) != k:
        raise ValueError(f"the scores are for {k} classes, but {len(classes)} class names were given")
    wanted = (n, k) if multi_label else (n,)
    if tuple(targets.shape) != wanted:
        kind = "multi-label" if multi_label else "single-label"
        raise ValueError(f"{kind} targets for scores of shape {(n, k)} have the shape {wanted}, got {tuple(targets.shape)}")
    if not multi_label and (int(targets.min()) < 0 or int(targets.max()) >= k):
        raise ValueError(f"class numbers go from 0 to {k - 1}, got {int(targets.min())} to {int(targets.max())}")


def _is_bound(name: str) -> bool:
    return name.endswith(("_low", "_high"))


def _shown(metrics: dict[str, float], name: str) -> str:
    if name == "n":
        return f"{int(metrics[name]):,}"
    if name == "nll":
        return f"{metrics[name]:.4f}"
    text = f"{100 * metrics[name]:.2f} %"
    if f"{name}_low" in metrics:
        text += f"   95 % interval {100 * metrics[f'{name}_low']:.2f} to {100 * metrics[f'{name}_high']:.2f} %"
    return text


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan(value: Any) -> Any:
    return float("nan") if value is None else value


def mean_iou(predicted: Int[Tensor, "*n"], truth: Int[Tensor, "*n"], classes: int) -> float:
    """Intersection over union of each class's pixels, averaged over the classes that occur; truth outside 0..classes - 1 is
    left out. 1 is perfect; one class everywhere gives its share of the pixels over the number of classes.
    """
    counted = (truth >= 0) & (truth < classes)
    pairs = truth[counted] * classes + predicted[counted]
    confusion = torch.bincount(pairs.flatten().long(), minlength=classes * classes).view(classes, classes).double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal() / union)[union > 0].mean())
