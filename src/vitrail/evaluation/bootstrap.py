"""Percentile bootstrap intervals, computed for all resamples at once.

A bootstrap draws n samples with replacement again and again and looks at how far a score moves (Efron & Tibshirani, "An
Introduction to the Bootstrap", chapter 13). Where a score depends on counts only, the counts of a resample follow a binomial
or multinomial law exactly, so they are drawn directly and no sample is ever copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000
_CHUNK = 4_000_000  # numbers held at once while resampling
_WORK = 400_000_000  # numbers sorted through by the multi-label bootstrap before it takes fewer resamples
_FEWEST = 200


def percentiles(values: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """The central `level` interval of resampled scores; scores that a resample leaves undefined (nan) are not counted."""
    kept = values[~np.isnan(values)]
    if kept.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rate_interval(successes: int, n: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % interval of a rate `successes / n`.

    All right or all wrong leaves the bootstrap without any width, however small n is; the exact binomial bound (Clopper &
    Pearson 1934) stands in there.
    """
    tail = ((1 - LEVEL) / 2) ** (1 / n)
    if successes == n:
        return tail, 1.0
    if successes == 0:
        return 0.0, 1.0 - tail
    return percentiles(rng.binomial(n, successes / n, size=resamples) / n)


def f1_scores(
    hits: NDArray[np.float64], predicted: NDArray[np.float64], support: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Precision, recall and F1 from counts of any shape; nan where a class was never predicted, never there, or neither."""
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall, f1 = hits / predicted, hits / support, 2 * hits / (predicted + support)
    return np.asarray(precision), np.asarray(recall), np.asarray(f1)


def confusion_resamples(
    confusion: NDArray[np.int64], rng: np.random.Generator, resamples: int = RESAMPLES
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """Per-class (hits, predicted, support), each (b, k), of resampled confusion matrices, in blocks of b resamples."""
    classes = confusion.shape[0]
    truth, answer = np.nonzero(confusion)
    counts = confusion[truth, answer]
    n = int(counts.sum())
    rows, columns, right = torch.from_numpy(truth), torch.from_numpy(answer), torch.from_numpy(truth == answer)
    for block in _blocks(resamples, len(counts)):
        drawn = torch.from_numpy(rng.multinomial(n, counts / n, size=block)).double()
        empty = torch.zeros(block, classes, dtype=torch.float64)
        yield (
            empty.index_add(1, rows, drawn * right).numpy(),
            empty.index_add(1, columns, drawn).numpy(),
            empty.index_add(1, rows, drawn).numpy(),
        )


def sample_weights(n: int, rng: np.random.Generator, resamples: int) -> Iterator[Float[Tensor, "b n"]]:
    """How often each of n samples occurs in each of b resamples, in blocks."""
    for block in _blocks(resamples, n):
        yield torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=block)).float()


def fitting_resamples(cells: int) -> int:
    """Resamples for a score whose one evaluation goes through `cells` numbers: 1000, fewer (not under 200) for huge sets."""
    return max(_FEWEST, min(RESAMPLES, _WORK // max(cells, 1)))


def weighted_average_precision(
    probabilities: Float[Tensor, " n"], targets: Int[Tensor, " n"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Average precision of one label under b sample weightings: the mean precision over recall steps, ties taken together.

    nan where a weighting leaves no positive sample.
    """
    order = probabilities.argsort(descending=True)
    ranked = probabilities[order]
    last_of_tie = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    weights = weights[:, order].double()
    hits = (weights * targets[order]).cumsum(1)[:, last_of_tie]
    seen = weights.cumsum(1)[:, last_of_tie]
    precision = hits / seen.clamp_min(1e-12)
    gained = hits.diff(dim=1, prepend=torch.zeros(len(hits), 1, dtype=hits.dtype))
    return ((gained * precision).sum(1) / hits[:, -1]).to(torch.float32)


def _blocks(resamples: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // max(width, 1))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)
