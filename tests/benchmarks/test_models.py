from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import models


@pytest.mark.parametrize(
    ("ours", "peer", "void", "batches"),
    [
        ([1.4], [1.0], False, 1),  # within 1.5 times the peer's: no other batch is asked
        ([9.0, 1.0, 1.0], [1.0, 1.0, 1.0], False, 3),  # something turned over on the first batch alone
        ([9.0, 1.0, 9.0], [1.0, 1.0, 1.0], True, 3),
        ([9.0, 9.0, 9.0], [1.0, 1.0, 1.0], True, 3),
    ],
)
def test_an_error_on_one_batch_is_judged_by_two_others(ours: list[float], peer: list[float], void: bool, batches: int) -> None:
    asked: list[int] = []

    def our_error(draw: int) -> float:
        asked.append(draw)
        return ours[draw]

    entry = models.agreement(our_error, lambda draw: peer[draw])
    assert entry["void"] is void
    assert asked == list(range(batches))
    assert (entry["error"], entry["peer_error"]) == (ours[0], peer[0])
    assert len(entry.get("on_other_batches", [])) == batches - 1


@pytest.mark.parametrize(
    ("seconds", "mode", "ran"), [(1, "eager", 6), (1, "compiled", 7), (60, "eager", 3), (60, "compiled", 4)]
)
def test_long_steps_are_not_wasted(monkeypatch: pytest.MonkeyPatch, seconds: float, mode: str, ran: int) -> None:
    steps: list[str] = []

    def timed(step: Callable[[], None], _: str) -> float:
        step()
        return seconds * (3 if steps[-1] == "peer" else 1)

    monkeypatch.setattr(models, "_seconds", timed)
    monkeypatch.setattr(models, "peak_memory", lambda step, device: (7.0, timed(step, device)))
    found = models.duel(lambda: steps.append("ours"), lambda: steps.append("peer"), 3, "cpu", mode)
    assert steps.count("ours") == steps.count("peer") == ran
    assert (found["ratio"], found["low"], found["high"], found["ours_mib"]) == (3, 3, 3, 7)
    assert (found["ours_s"], found["peer_s"]) == (seconds, 3 * seconds)
