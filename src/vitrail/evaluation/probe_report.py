"""What a probe found: scores of every method, backbones ranked, and advice with its uncertainty."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from vitrail.checkpoints.io import write_text
from vitrail.evaluation.bootstrap import RESAMPLES, percentiles, rate_interval

LINEAR = ("logistic", "ridge", "sgd", "knn")  # which method's figure ranks the backbones: the first that was asked for
NAMES = {
    "ridge": "ridge (l2)",
    "knn": "k nearest neighbours (k)",
    "logistic": "logistic regression (l2)",
    "sgd": "linear SGD (lr)",
}


@dataclass(frozen=True)
class Backbone:
    """A model that was probed. flops: of one forward pass of one sample; seconds: to load it and get all features."""

    label: str
    family: str
    parameters: int
    flops: int
    image_size: tuple[int, int]
    width: int
    seconds: float
    kept: bool  # whether all features came from the cache


@dataclass(frozen=True)
class Score:
    """One method on one backbone. shots: per class, 0 for all training samples. setting: the one chosen.

    accuracies: top-1 of every subset at that setting; judged, chosen: of every setting, on the test and choosing samples.
    """

    label: str
    method: str
    shots: int
    setting: float
    accuracies: tuple[float, ...]
    judged: Mapping[float, Sequence[float]] = dataclasses.field(repr=False)
    chosen: Mapping[float, Sequence[float]] = dataclasses.field(repr=False)

    @property
    def mean(self) -> float:
        """Over subsets."""
        return fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Sample standard deviation over subsets; nan for one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else float("nan")


@dataclass(frozen=True)
class Rank:
    """A backbone's place. low, high: 95 % interval over test samples. behind: points behind the first, with its interval."""

    label: str
    accuracy: float
    low: float
    high: float
    behind: tuple[float, float, float]


@dataclass(frozen=True)
class ProbeReport:
    """The result of `probe`. Accuracies are fractions; `ranking` is by `ranked_by` (method, shots), best first."""

    data: str
    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    judged_on: str
    seeds: int
    backbones: tuple[Backbone, ...]
    scores: tuple[Score, ...]
    ranked_by: tuple[str, int]
    ranking: tuple[Rank, ...]
    advice: str
    notes: tuple[str, ...]

    @classmethod
    def made(cls, *, right: Mapping[tuple[str, str, int], Bool[Tensor, " m"]], **found: Any) -> ProbeReport:
        """The report with ranking and advice; right: which test samples were right, by (label, method, shots)."""
        methods, shots = ({score.method for score in found["scores"]}, {score.shots for score in found["scores"]})
        by = (next(method for method in LINEAR if method in methods), 0 if 0 in shots else max(shots))
        ranking = _ranked({label: hits for (label, *rest), hits in right.items() if tuple(rest) == by})
        advice = _advice(ranking, {b.label: b for b in found["backbones"]}, by)
        return cls(ranked_by=by, ranking=ranking, advice=advice, **found)

    def score(self, label: str, method: str, shots: int) -> Score:
        """The score of a backbone by a method at a number of shots (0: all). Raises KeyError."""
        for score in self.scores:
            if (score.label, score.method, score.shots) == (label, method, shots):
                return score
        raise KeyError((label, method, shots))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        plain = dataclasses.asdict(self)
        for row, score in zip(plain["scores"], self.scores, strict=True):
            row |= {"mean": score.mean, "spread": None if len(score.accuracies) < 2 else score.spread}
        return plain

    def save(self, path: str | Path) -> Path:
        """Write JSON, or, to a path ending in .csv, one row per backbone, method, shots, setting and subset."""
        path = Path(path)
        write_text(path, self.as_csv() if path.suffix == ".csv" else json.dumps(self.to_dict(), indent=1, ensure_ascii=False))
        return path

    def as_csv(self) -> str:
        """One row per backbone, method, shots, setting and subset."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("model", "method", "shots", "setting", "subset", "accuracy", "accuracy_choosing", "chosen"))
        for score in self.scores:
            for setting, accuracies in score.judged.items():
                for subset, accuracy in enumerate(accuracies):
                    choosing = score.chosen[setting][subset] if score.chosen else ""
                    place = (score.label, score.method, score.shots or "all", setting, subset)
                    table.writerow((*place, accuracy, choosing, int(setting == score.setting)))
        return text.getvalue()


def _ranked(right: Mapping[str, Bool[Tensor, " m"]]) -> tuple[Rank, ...]:
    order = sorted(right, key=lambda label: -float(right[label].float().mean()))
    first, rng, rows = right[order[0]], np.random.default_rng(0), []
    for label in order:
        hits = int(right[label].sum())
        low, high = rate_interval(hits, len(first), rng)
        rows.append(Rank(label, hits / len(first), low, high, _difference(first, right[label], rng)))
    return tuple(rows)


def _difference(first: Bool[Tensor, " m"], other: Bool[Tensor, " m"], rng: np.random.Generator) -> tuple[float, float, float]:
    """How far `other` is behind, with a 95 % bootstrap interval over samples, which both answered: only disagreements count."""
    n, won, lost = len(first), int((first & ~other).sum()), int((other & ~first).sum())
    draws = rng.multinomial(n, [won / n, lost / n, 1 - (won + lost) / n], size=RESAMPLES) / n
    return (won - lost) / n, *percentiles(draws[:, 0] - draws[:, 1])


def _advice(ranking: Sequence[Rank], backbones: Mapping[str, Backbone], by: tuple[str, int]) -> str:
    """One or two sentences: what to fine-tune and what to expect."""
    best = ranking[0]
    learned = "all training samples" if by[1] == 0 else f"{by[1]} samples of each class"
    expected = (
        f"a linear classifier on its frozen features reaches {best.accuracy:.1%} ({best.low:.1%} to {best.high:.1%}) "
        f"with {learned}; fine-tuning should give that or more"
    )
    if len(ranking) == 1:
        return f"{best.label}: {expected}."
    equals = [rank for rank in ranking[1:] if rank.behind[1] <= 0]
    if not equals:
        second = ranking[1]
        gap, low, high = (100 * value for value in second.behind)
        return f"Fine-tune {best.label}, {gap:.1f} points ({low:.1f} to {high:.1f}) ahead of {second.label}: {expected}."
    cheapest = min((best, *equals), key=lambda rank: backbones[rank.label].flops)
    names = ", ".join(rank.label for rank in equals)
    chosen = "also the cheapest of them" if cheapest is best else f"{cheapest.label} is the cheapest of them"
    return f"{best.label} is first, but not told apart from {names} on these samples; {chosen}. Of {best.label}, {expected}."
