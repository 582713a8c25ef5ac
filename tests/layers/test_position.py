from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.layers.position import (
    RESIZE_RULES,
    ClipPosition,
    PositionConfig,
    RelativePosition,
    grid_side,
    relative_index,
    resize_grid,
    resize_line,
    sincos_2d,
)

sides = st.integers(1, 7)


@given(h=sides, w=sides, rule=st.sampled_from(RESIZE_RULES))
@settings(max_examples=25, deadline=None)
def test_resizing_to_the_same_grid_is_the_identity(h: int, w: int, rule: str) -> None:
    table = torch.randn(h * w, 3)
    assert resize_grid(table, (h, w), (h, w), rule) is table


@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), rule=st.sampled_from(RESIZE_RULES))
@settings(max_examples=40, deadline=None)
def test_a_constant_table_stays_constant(old: tuple[int, int], new: tuple[int, int], rule: str) -> None:
    table = torch.full((old[0] * old[1], 2), 0.7)
    got = resize_grid(table, old, new, rule)
    assert got.shape == (new[0] * new[1], 2)
    torch.testing.assert_close(got, torch.full_like(got, 0.7))


@given(old=st.tuples(sides, sides, sides), new=st.tuples(sides, sides, sides))
@settings(max_examples=20, deadline=None)
def test_volumes_resize_frame_by_frame(old: tuple[int, int, int], new: tuple[int, int, int]) -> None:
    frames = torch.randn(old[1] * old[2], 2)
    got = resize_grid(frames.repeat(old[0], 1), old, new)  # every frame alike: so are the resized ones
    one = resize_grid(frames, old[1:], new[1:])
    torch.testing.assert_close(got, one.repeat(new[0], 1), atol=1e-5, rtol=1e-5)


def test_a_grid_of_one_column_is_resized_along_it() -> None:
    table = torch.tensor([[0.0, 5.0], [1.0, 7.0]])
    for rule in RESIZE_RULES:
        column, row = resize_grid(table, (2, 1), (3, 1), rule), resize_grid(table, (1, 2), (1, 3), rule)
        torch.testing.assert_close(column, row)
        assert len(column.unique(dim=0)) > 1


def test_transposing_commutes_with_resizing() -> None:
    table = torch.randn(4 * 6, 5)
    turned = table.view(4, 6, 5).transpose(0, 1).reshape(24, 5)
    a = resize_grid(table, (4, 6), (8, 3)).view(8, 3, 5)
    b = resize_grid(turned, (6, 4), (3, 8)).view(3, 8, 5)
    torch.testing.assert_close(a, b.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_lines() -> None:
    table = torch.arange(4.0)[:, None]
    assert resize_line(table, 4) is table
    torch.testing.assert_close(resize_line(table, 8).mean(), table.mean())


def test_sincos_order_and_range() -> None:
    table = sincos_2d(3, 5, 16)
    assert table.shape == (15, 16)
    grid = table.view(3, 5, 16)
    torch.testing.assert_close(grid[0, :, :8], grid[2, :, :8])  # the first half follows x only
    torch.testing.assert_close(grid[:, 0, 8:], grid[:, 4, 8:])  # the second half follows y only
    torch.testing.assert_close(grid[..., :4] ** 2 + grid[..., 4:8] ** 2, torch.ones(3, 5, 4))
    with pytest.raises(ValueError, match="nearest: 16"):
        sincos_2d(2, 2, 15)


def test_relative_bias_depends_on_the_offset_only() -> None:
    position = RelativePosition(6, (1, 3, 4), (1, 3, 4), prefix=1)
    query = torch.randn(6).expand(1, 2, 13, 6)  # every token asks the same question
    bias = position(query, (1, 3, 4))
    assert bias.shape == (1, 2, 13, 13)
    assert not bias[:, :, 0].any()
    assert not bias[:, :, :, 0].any()
    grid = bias[0, 0, 1:, 1:].view(3, 4, 3, 4)
    torch.testing.assert_close(grid[0, 0, 1, 2], grid[1, 1, 2, 3])
    torch.testing.assert_close(grid[2, 3, 0, 0], grid[2, 3, 0, 0])
    assert not torch.allclose(grid[0, 0, 1, 2], grid[1, 2, 0, 0])


def test_relative_bias_against_explicit_sums() -> None:
    position = RelativePosition(6, (1, 2, 3), (1, 2, 3), prefix=0)
    query = torch.randn(1, 1, 6, 6)
    bias = position(query, (1, 2, 3))[0, 0]
    for i in range(6):
        for j in range(6):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            expected = query[0, 0, i] @ (position.rows[dy + 1] + position.columns[dx + 2]) / 6**0.5
            torch.testing.assert_close(bias[i, j], expected)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (8, 2), (2, 8), (7, 3), (3, 7), (5, 4), (1, 1)])
def test_offsets_between_coarse_and_fine(queries: int, keys: int) -> None:
    index = relative_index(queries, keys)
    assert index.shape == (queries, keys)
    for i in range(queries):
        for j in range(keys):
            fine = Fraction(i * max(keys, queries), queries) - Fraction(j * max(keys, queries), keys)
            first = Fraction((keys - 1) * max(keys, queries), keys)
            assert index[i, j] == math.floor(fine + first)
    assert 0 <= index.min() <= index.max() <= 2 * max(queries, keys) - 2


def test_relative_bias_over_time_and_between_grids() -> None:
    queries, keys, d = (2, 2, 4), (2, 1, 2), 6
    position = RelativePosition(d, queries, keys, prefix=1, time=True, scaled=False)
    for table in position.parameters():
        torch.nn.init.normal_(table)
    q = torch.randn(1, 2, 17, d)
    bias = position(q, queries, keys)
    assert bias.shape == (1, 2, 17, 5)
    assert not bias[:, :, 0].any()
    assert not bias[..., 0].any()
    grid = bias[0, 1, 1:, 1:].view(*queries, *keys)
    asking = q[0, 1, 1:].view(*queries, d)
    for t, y, x in itertools.product(range(2), range(2), range(4)):
        for s, v, u in itertools.product(range(2), range(1), range(2)):
            vector = position.frames[t - s + 1] + position.rows[y] + position.columns[x - 2 * u + 2]
            torch.testing.assert_close(grid[t, y, x, s, v, u], asking[t, y, x] @ vector)


def test_a_separable_table_is_the_sum_of_its_parts() -> None:
    position = ClipPosition("separable", 8, (2, 3, 4), prefix=1)
    table = position((2, 3, 4))
    assert table.shape == (1, 25, 8)
    torch.testing.assert_close(table[0, 1 + 12 + 5], position.places[0, 5] + position.frames[0, 1])
    torch.testing.assert_close(table[:, :1], position.prefix_table)
    assert position((3, 6, 8)).shape == (1, 145, 8)
    joint = ClipPosition("joint", 8, (2, 3, 4), prefix=0)
    assert torch.equal(joint((2, 3, 4)), joint.table)
    assert joint((4, 3, 5)).shape == (1, 60, 8)


def test_words_are_checked() -> None:
    with pytest.raises(ValueError, match="allowed: none, 1d"):
        PositionConfig(kind="3d")
    with pytest.raises(ValueError, match="nearest squares: 9, 16"):
        grid_side(12)
