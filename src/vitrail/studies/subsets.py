"""Nested subsets of the training pictures, as settings of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.config import ConfigError


def subset_variants(counts: Sequence[int], fractions: Sequence[float], least: int = 2) -> dict[str, dict[str, Any]]:
    """{name: settings} of a run on each fraction of the training pictures, from classes of `counts` pictures.

    The name says how many pictures that is. A subset takes equally many of every class while there are that many, at least
    `least`; the whole set is not capped. Raises ConfigError for fractions outside of 0..1 and for sizes that come out the same.
    """
    variants: dict[str, dict[str, Any]] = {}
    for fraction in sorted(fractions):
        if not 0 < fraction <= 1:
            raise ConfigError(f"fractions: {fraction} is not in 0 < fraction <= 1")
        cap = 0 if fraction == 1 else max(least, _cap(counts, fraction * sum(counts)))
        size = sum(min(count, cap) for count in counts) if cap else sum(counts)
        if str(size) in {name.removesuffix(" pictures") for name in variants}:
            raise ConfigError(
                f"fractions {', '.join(f'{f:g}' for f in fractions)} of {sum(counts)} pictures give the size {size} twice "
                f"(a subset has at least {least} pictures of each class); name fewer or larger fractions"
            )
        variants[f"{size} pictures"] = {"max_samples": cap}
    return variants


def size_of(row: Mapping[str, Any]) -> int:
    """How many pictures a run was trained on."""
    return int(row["pictures"])


def _cap(counts: Sequence[int], wanted: float) -> int:
    """The number of pictures per class whose total is nearest to what is wanted."""
    return min(range(1, max(counts) + 1), key=lambda cap: abs(sum(min(count, cap) for count in counts) - wanted))
