"""Which family was proven equal to which peer, and which way: recorded by the peer tests, printed when the run ends.

A peer test ends with `compare(record_property, "swin", "timm", WRITES, ours, theirs)`: the pair is written down, with the
largest relative error, before anything is asserted, so that a failing pair stands in the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

READS, WRITES = "we read theirs", "they read ours"
_PROPERTY = "pair"


class Pair(NamedTuple):
    """One row: the worst error over its tests, and whether all of them passed."""

    family: str
    peer: str
    direction: str
    tests: int
    error: float
    passed: bool


def compare(
    record_property: Callable[[str, Any], None],
    family: str,
    peer: str,
    direction: str,
    ours: Tensor,
    theirs: Tensor,
    atol: float = 2e-5,
    rtol: float = 1e-5,
) -> None:
    """Write the pair down, then assert that both answers are the same."""
    import torch  # not by the process that only hands tests to workers

    assert direction in (READS, WRITES), direction
    ours, theirs = ours.detach(), theirs.detach()
    fits = ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)) if fits else float("inf")
    record_property(_PROPERTY, [family, peer, direction, error])
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def gather(reports: Iterable[Any]) -> list[Pair]:
    """The pairs in test reports, one row each, ordered by name."""
    found: dict[tuple[str, str, str], Pair] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == _PROPERTY and report.when == "call":
                key = tuple(value[:3])
                before = found.get(key, Pair(*key, 0, 0.0, True))
                found[key] = Pair(*key, before.tests + 1, max(before.error, value[3]), before.passed and report.passed)
    return [found[key] for key in sorted(found)]


def table(pairs: Iterable[Pair]) -> Iterator[str]:
    """Lines of the table."""
    yield f"{'family':<12}{'peer':<14}{'direction':<17}{'tests':>5}  {'largest relative error':>22}"
    for pair in pairs:
        row = f"{pair.family:<12}{pair.peer:<14}{pair.direction:<17}{pair.tests:>5}  {pair.error:>22.1e}"
        yield row + ("" if pair.passed else "  FAILED")
