"""Means over few seeds with intervals that say how few they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom (Fisher and Yates, Statistical Tables, table III).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
        2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


class Mean(NamedTuple):
    """A mean with its 95 % interval (Student's t over n values; not a number for a single one)."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def percent(self) -> str:
        """As text in percent, such as "81.3 ± 1.2"."""
        spread = f" ± {100 * self.half:.1f}" if math.isfinite(self.half) else ""
        return f"{100 * self.value:.1f}{spread}"


def mean(values: Iterable[float]) -> Mean:
    """Mean and interval of values. Raises ValueError for none."""
    found = list(values)
    if not found:
        raise ValueError("the mean of no values")
    middle, n = fmean(found), len(found)
    if n == 1:
        return Mean(middle, math.nan, math.nan, 1)
    half = (_T95[n - 2] if n - 2 < len(_T95) else 1.96) * stdev(found) / math.sqrt(n)
    return Mean(middle, middle - half, middle + half, n)


def by(rows: Sequence[Mapping[str, Any]], key: str | Callable[[Mapping[str, Any]], Any]) -> dict[Any, list[Mapping[str, Any]]]:
    """Rows grouped by a column or a function of the row, groups in the order they first appear."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key(row) if callable(key) else row[key], []).append(row)
    return groups


def difference(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], column: str = "top1") -> Mean:
    """How much more the first has of a column, seed by seed (a paired t interval). Raises ValueError without a common seed."""
    theirs = {row["seed"]: row[column] for row in second}
    return mean(row[column] - theirs[row["seed"]] for row in first if row["seed"] in theirs)


def verdict(gap: Mean, first: str, second: str) -> str:
    """A difference as a sentence that says when it may be none."""
    size = f"{100 * abs(gap.value):.1f} points"
    if not math.isfinite(gap.half):
        way = "better" if gap.value >= 0 else "worse"
        return f"{first} is {size} {way} than {second} with one seed, which says nothing about how sure that is"
    interval = f"95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}, n = {gap.n}"
    if gap.low <= 0 <= gap.high:
        return f"no difference between {first} and {second} can be told ({100 * gap.value:+.1f} points, {interval})"
    return f"{first} is {size} {'better' if gap.value > 0 else 'worse'} than {second} ({interval})"
