from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.config import ConfigError
from vitrail.data.order import SampleOrder


def epoch(order: SampleOrder, number: int) -> np.ndarray:
    return order.epoch(number)[0]


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch() -> None:
    order = SampleOrder(samples=103, batch_size=20, seed=3)
    assert order.steps_per_epoch == 5
    drawn = epoch(order, 0)
    assert len(set(drawn.tolist())) == 100
    assert set(drawn.tolist()) | set(epoch(order, 1).tolist()) == set(range(103))  # another epoch leaves out others
    assert not np.array_equal(drawn, epoch(order, 1))
    assert not np.array_equal(drawn, epoch(SampleOrder(103, 20, seed=4), 0))
    assert np.array_equal(drawn, epoch(SampleOrder(103, 20, seed=3), 0))


def test_the_permutation_is_numpys() -> None:
    """The order is a promise: checkpoints of today must resume in later versions."""
    assert (
        epoch(SampleOrder(8, 8, seed=7), 2).tolist()
        == np.random.Generator(np.random.PCG64((7, 2, 0x0DE5))).permutation(8).tolist()
    )


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 90),
    distinct=st.integers(1, 4),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    repeats=st.integers(1, 3),
    start=st.integers(0, 40),
)
def test_ranks_and_micro_steps_cut_the_global_batch(
    samples: int, distinct: int, world: int, accumulate: int, repeats: int, start: int
) -> None:
    batch = distinct * world * accumulate * repeats
    whole = SampleOrder(samples, batch, 1, repeats=repeats)
    parts = SampleOrder(samples, batch, 1, accumulate, world, repeats)
    expected = whole.request(start)
    found = [parts.request(start * accumulate + micro, rank) for rank in range(world) for micro in range(accumulate)]
    assert np.array_equal(np.concatenate([part.indices for part in found]), expected.indices)
    assert np.array_equal(np.concatenate([part.keys for part in found]), expected.keys)
    assert all(len(part.indices) == parts.micro_batch_size == batch // world // accumulate for part in found)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 60), distinct=st.integers(1, 20), repeats=st.integers(1, 4), weighted=st.booleans())
def test_no_two_samples_of_a_run_share_a_key(samples: int, distinct: int, repeats: int, weighted: bool) -> None:
    weights = np.arange(1.0, samples + 1) if weighted else None
    order = SampleOrder(samples, distinct * repeats, 5, repeats=repeats, weights=weights)
    keys = [tuple(key) for step in range(3 * order.steps_per_epoch) for key in order.request(step).keys.tolist()]
    assert len(set(keys)) == len(keys)
    indices = [index for step in range(3 * order.steps_per_epoch) for index in order.request(step).indices.tolist()]
    assert [key[1] for key in keys] == indices


def test_repeats_put_copies_into_one_batch_on_different_ranks() -> None:
    order = SampleOrder(samples=100, batch_size=30, seed=0, world=3, repeats=3)
    ranks = [order.request(0, rank) for rank in range(3)]
    assert order.steps_per_epoch == 3
    assert ranks[0].indices.tolist() == ranks[1].indices.tolist() == ranks[2].indices.tolist()
    assert [part.keys[0, 0] for part in ranks] == [0, 1, 2]
    assert {order.request(3, rank).keys[0, 0] for rank in range(3)} == {3, 4, 5}  # epoch * repeats + copy


def test_a_set_smaller_than_a_batch_is_gone_through_again() -> None:
    order = SampleOrder(samples=5, batch_size=12, seed=0)
    indices, firsts = order.epoch(1)
    assert order.steps_per_epoch == 1
    assert np.bincount(indices).min() == 2
    assert np.bincount(indices).max() == 3
    assert sorted(set(firsts.tolist())) == [3, 4, 5]  # three copies an epoch


def test_weights_draw_with_replacement() -> None:
    weights = np.array([0.0, 1.0, 3.0])
    order = SampleOrder(3, 3, 0, weights=np.asarray(weights))
    drawn = np.concatenate([epoch(order, number) for number in range(2000)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares[0] == 0
    assert abs(shares[2] - 0.75) < 0.02
    with pytest.raises(ConfigError, match="expected 3 weights"):
        SampleOrder(3, 3, 0, weights=np.ones(2))
    with pytest.raises(ConfigError, match="none negative and some positive"):
        SampleOrder(3, 3, 0, weights=np.zeros(3))


def test_starting_late_is_as_quick_as_starting_early() -> None:
    order = SampleOrder(samples=1_000_000, batch_size=256, seed=0)
    start = time.perf_counter()
    order.request(10**9)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "accumulate": 4}, r"1 ranks x 4 micro-steps \(4\); nearest: 8 or 12"),
        ({"batch_size": 10, "accumulate": 2, "world": 3}, r"3 ranks x 2 micro-steps \(6\); nearest: 6 or 12"),
        ({"batch_size": 10, "repeats": 3}, r"repeats \(3\); nearest: 9 or 12"),
        ({"batch_size": 2, "accumulate": 4}, r"nearest: 4$"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"batch_size": 4, "seed": -1}, "seed: -1 is negative"),
    ],
)
def test_batches_that_cannot_be_divided(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleOrder(100, **settings)
