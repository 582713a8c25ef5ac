from __future__ import annotations

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
