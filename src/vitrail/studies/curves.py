"""Learning curves: error as a power of the number of pictures (or of compute) over an offset, and how sure each fit is.

error(n) = a n^-b + c: c is what more data would not remove. The form is that of the ViT paper's successors (Zhai et al., arXiv
2106.04560, section 2, and Hestness et al., arXiv 1712.00409, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrail.studies.statistics import by, mean
from vitrail.studies.study import Series

Array = NDArray[np.float64]
EXPONENTS: Array = np.concatenate([np.linspace(0.02, 1.5, 75), np.linspace(1.6, 3.0, 15)])
DRAWS = 400
LEAST_SIZES = 4  # three parameters are to be found
LEAST_SHOWN = 1e-4  # error at which an interval ends on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """A fitted curve: parameters (a, b, c) of the measured means, and of `DRAWS` bootstrap draws, (draws, 3).

    misfit: the chance of means at least as far from the curve if it were true; near 0 the form does not fit.
    """

    best: Array
    draws: Array
    misfit: float

    def at(self, n: Array | float) -> Array:
        """Error at sizes n."""
        return power(self.best[None], np.atleast_1d(np.asarray(n, float)))[0]

    def band(self, n: Array | float) -> tuple[Array, Array]:
        """Ends of the 95 % interval of the error at sizes n."""
        low, high = np.quantile(power(self.draws, np.atleast_1d(np.asarray(n, float))), [0.025, 0.975], axis=0)
        return low, high

    @property
    def offset(self) -> tuple[float, float, float]:
        """The error that stays, with the ends of its 95 % interval."""
        low, high = np.quantile(self.draws[:, 2], [0.025, 0.975])
        return float(self.best[2]), float(low), float(high)


def power(parameters: Array, n: Array) -> Array:
    """(draws, sizes): a n^-b + c for rows (a, b, c)."""
    a, b, c = (parameters[:, i, None] for i in range(3))
    return np.asarray(a * n**-b + c)


def fit(points: Mapping[float, Sequence[float]], seed: int = 0) -> Curve:
    """Fit a curve to errors by size, {size: errors of the seeds}.

    Least squares of relative errors, a and c at least 0. The bootstrap is parametric: a size's mean is drawn around the
    measured one with the relative spread pooled over sizes, which itself is drawn, because few seeds know it badly.
    Raises ValueError for fewer than four sizes or no size with two seeds.
    """
    sizes = np.array(sorted(points), float)
    if len(sizes) < LEAST_SIZES:
        raise ValueError(f"{len(sizes)} sizes; a curve with an offset needs at least {LEAST_SIZES}")
    groups = [np.maximum(np.asarray(points[n], float), 1e-4) for n in sizes]  # an error of 0 has no relative spread
    free = sum(len(group) - 1 for group in groups)
    if free == 0:
        raise ValueError("one run per size; the spread over seeds needs at least two")
    means, counts = np.array([group.mean() for group in groups]), np.array([len(group) for group in groups])
    relative = np.concatenate([group / group.mean() - 1 for group in groups])
    spread = max(math.sqrt(float((relative**2).sum()) / free), 1e-4)
    best = _fit(sizes, means[None])[0]
    miss = float(((power(best[None], sizes)[0] / means - 1) ** 2 * counts).sum()) / spread**2
    random = np.random.default_rng(seed)
    spreads = spread * np.sqrt(free / random.chisquare(free, (DRAWS, 1)))
    noise = random.standard_normal((DRAWS, len(sizes))) * spreads / np.sqrt(counts)
    draws = _fit(sizes, np.maximum(means * (1 + noise), 1e-4))
    # How far means lie from their own fit when the form is true: judged by the draws around the fitted curve.
    around = np.maximum(power(best[None], sizes) * (1 + noise), 1e-4)
    misses = (((power(_fit(sizes, around), sizes) / around - 1) ** 2 * counts).sum(1)) / spread**2
    return Curve(best, draws, float((misses >= miss - 1e-12).mean()))


def _fit(sizes: Array, errors: Array) -> Array:
    """(draws, 3) parameters for rows of errors (draws, sizes): for every exponent a linear problem, the best one kept."""
    scale = math.exp(float(np.log(sizes).mean()))
    basis = (sizes / scale) ** -EXPONENTS[:, None]  # e m
    w = errors**-2.0  # d m, weights of relative errors
    sw, sx, sxx = w.sum(1)[:, None], w @ basis.T, w @ (basis**2).T  # d e
    sy, sxy = (w * errors).sum(1)[:, None], (w * errors) @ basis.T
    determinant = np.maximum(sw * sxx - sx**2, 1e-300)
    a, c = (sw * sxy - sx * sy) / determinant, (sxx * sy - sx * sxy) / determinant
    a_alone, c_alone = sxy / sxx, np.broadcast_to(sy / sw, a.shape)  # with the other at 0
    a, c = np.where(c < 0, np.maximum(a_alone, 0), a), np.maximum(c, 0)
    c = np.where(a < 0, c_alone, c)
    a = np.maximum(a, 0)
    guess = a[..., None] * basis[None] + c[..., None]  # d e m
    loss = (w[:, None] * (guess - errors[:, None]) ** 2).sum(-1)
    chosen = loss.argmin(1)
    rows = np.arange(len(errors))
    b = EXPONENTS[chosen]
    return np.stack([a[rows, chosen] * scale**b, b, c[rows, chosen]], 1)


@dataclass(frozen=True)
class Crossing:
    """Where one curve falls below another: `size` with the ends of its 95 % interval; `share`: the part of the draws that do.

    kind: "known" (an interval), "ahead" (below already at the largest measured size), "never" (not up to the horizon in 95 % of
    the draws) or "unknown".
    """

    kind: str
    size: float
    low: float
    high: float
    share: float


def crossing(challenger: Curve, holder: Curve, largest: float, horizon: float) -> Crossing:
    """From which size on, up to `horizon`, the challenger's error is below the holder's.

    The measured range ends at `largest`; beyond it both curves are extrapolated. An interval wider than a factor of 100 is no
    answer: the kind is "unknown" then, as where less than 95 % of the draws agree whether there is a crossing.
    """
    sizes = np.geomspace(largest, horizon, 400)
    below = power(challenger.draws, sizes) < power(holder.draws, sizes)
    stays = np.flip(np.logical_and.accumulate(np.flip(below, 1), axis=1), 1)  # below from here to the horizon
    crosses = stays[:, -1]
    share = float(crosses.mean())
    if float(stays[:, 0].mean()) >= 0.95:
        return Crossing("ahead", largest, math.nan, largest, share)
    if share <= 0.05:
        return Crossing("never", math.inf, horizon, math.inf, share)
    found = np.where(crosses, sizes[stays.argmax(1)], np.inf)
    low, middle, high = (float(x) for x in np.quantile(found, [0.025, 0.5, 0.975], method="nearest"))
    if share < 0.95 or not math.isfinite(high) or high > 100 * low:
        return Crossing("unknown", middle, low, high, share)
    return Crossing("known", middle, low, high, share)


def error_series(
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    key: Any,
    curves: Mapping[str, Curve],
    reach: Callable[[Sequence[float]], Array],
) -> list[Series]:
    """The mean error of every group of runs over `key` as points, and over `reach(measured sizes)` its curve with its band."""
    series = []
    for colour, (name, group) in enumerate(groups.items()):
        cells = {float(size): mean(1 - row["top1"] for row in rows) for size, rows in sorted(by(group, key).items())}
        series.append(Series.of_means(name, list(cells), cells.values(), floor=LEAST_SHOWN, line=False, colour=colour))
        if name in curves:
            far, curve = reach(list(cells)), curves[name]
            below, above = curve.band(far)
            series.append(Series("", list(far), list(curve.at(far)), list(below), list(above), dashed=True, colour=colour))
    return series
