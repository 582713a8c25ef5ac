from __future__ import annotations

import pytest
import torch

from vitrail.config import ConfigError
from vitrail.data.composites import Composites, figure


def test_a_picture_is_a_function_of_seed_and_number() -> None:
    first, again, other = Composites(5, (48, 40)), Composites(50, (48, 40)), Composites(5, (48, 40), seed=1)
    for i in (0, 4):
        assert all(torch.equal(a, b) for a, b in zip(first[i], again[i], strict=True))
        assert not torch.equal(first[i][0], other[i][0])
    assert not torch.equal(first[0][0], first[1][0])
    picture, truth = first[2]
    assert (picture.shape, picture.dtype) == ((3, 48, 40), torch.uint8)
    assert (truth.shape, truth.dtype) == ((48, 40), torch.int64)
    assert set(truth.unique().tolist()) == {0, 1}
    with pytest.raises(IndexError):
        first[5]


def test_categories_are_classes() -> None:
    data = Composites(12, labels="category")
    assert data.classes[0] == "texture"
    assert len(data.classes) == 9
    found = set(torch.stack([data[i][1] for i in range(12)]).unique().tolist())
    assert len(found) > 4
    assert max(found) < 9


def test_the_figure_is_what_the_border_cannot_reach() -> None:
    cell = torch.full((3, 8, 8), 250, dtype=torch.uint8)
    cell[:, 2:7, 2:7] = 30
    cell[:, 3:6, 3:6] = 255  # white inside belongs to the drawing
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:7, 2:7] = True
    assert torch.equal(figure(cell), wanted)


@pytest.mark.parametrize(("choice", "said"), [({"labels": "objects"}, "'object'"), ({"designers": ("noto2",)}, "'noto'")])
def test_wrong_choices_name_the_right_ones(choice: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Composites(1, **choice)
