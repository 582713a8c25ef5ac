"""The embedded videos: deterministic, balanced, and honest about the direction of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitrail.config import ConfigError, DataConfig
from vitrail.data import ImageDataset, open_data
from vitrail.data.embedded.motion import FRAMES, MOTIONS, SIDE, MotionStore, cut_out, draw, opposite, reverse, scene
from vitrail.data.footage import open_footage


@pytest.fixture(scope="module")
def train() -> ImageDataset:
    data = open_data("motion").train
    assert data is not None
    return data


def store(train: ImageDataset) -> MotionStore:
    assert isinstance(train.store, MotionStore)
    return train.store


def test_classes_are_four_pairs() -> None:
    assert [(motion, opposite(motion)) for motion in MOTIONS[::2]] == [
        ("left", "right"), ("up", "down"), ("zoom in", "zoom out"), ("turn left", "turn right"),
    ]  # fmt: skip
    assert all(opposite(opposite(motion)) == motion for motion in MOTIONS)


def test_a_reversed_clip_is_a_true_sample_of_the_opposite_class(train: ImageDataset) -> None:
    source = store(train)
    for row in range(24):
        shown = source.scene(row)
        clip = draw(shown, source.drawings)
        assert clip.shape == (3, FRAMES, SIDE, SIDE)
        assert torch.equal(clip.flip(1), draw(reverse(shown), source.drawings)), shown.motion
        assert reverse(shown).motion == opposite(shown.motion)
        assert not torch.equal(clip[:, 0], clip[:, -1])


def test_motions_do_what_they_are_called(train: ImageDataset) -> None:
    """Left means to the left: judged by the drawing's centre of mass, its size, and the turn that undoes it."""
    source = store(train)
    for row in range(40):
        shown = source.scene(row)
        clip = draw(shown, source.drawings).float()
        background = draw(shown, torch.zeros_like(source.drawings)).float()  # all cut out
        mask = ((clip - background).abs().sum(0) > 30).float()
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        area = mask.sum((1, 2)).clamp(min=1)
        across, down = ((mask * axis).sum((1, 2)) / area for axis in (x, y))
        moved = {
            "left": across[0] - across[-1], "right": across[-1] - across[0],
            "up": down[0] - down[-1], "down": down[-1] - down[0],
            "zoom in": (area[-1] - area[0]) / 8, "zoom out": (area[0] - area[-1]) / 8,
        }  # fmt: skip
        if shown.motion in moved:
            assert moved[shown.motion] > 3, (row, shown)
    sheet = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    sheet[0, :, 4:14, 14:18] = 0  # a hand of a clock, pointing up
    shown = scene(MOTIONS.index("turn right"), np.array([0]))
    assert shown.motion == "turn right"
    drawings = cut_out(sheet)
    hand = (draw(shown, drawings).float() - draw(shown, torch.zeros_like(drawings)).float()).abs().sum(0)
    x = torch.arange(SIDE).float()
    tip = (hand.sum(1) * x).sum(1) / hand.sum((1, 2))
    assert tip[-1] > tip[0] + 3


def test_a_disc_that_turns_does_not_seem_to_rest() -> None:
    y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(32.0) - 15.5, indexing="ij")
    sheet = torch.where(x**2 + y**2 < 200, 0, 255).to(torch.uint8).expand(1, 3, 32, 32)
    for motion in ("turn left", "turn right"):
        clip = draw(scene(MOTIONS.index(motion), np.array([0])), cut_out(sheet)).float()
        assert ((clip[:, 1:] - clip[:, :-1]).abs().amax((0, 2, 3)) > 30).all()


def test_only_white_that_reaches_the_border_is_cut_out() -> None:
    """A ring, and a snail's shell whose inside has a way out of fifteen bends."""
    ring = torch.full((32, 32), 255, dtype=torch.uint8)
    ring[8:24, 8:24] = 0
    ring[12:20, 12:20] = 255
    snake = torch.full((32, 32), 0, dtype=torch.uint8)
    snake[1::2, 1:-1] = 255
    for row in range(2, 30, 2):
        snake[row, 1 if row % 4 else -2] = 255
    snake[0, 5], snake[-1] = 255, 0
    opacity = cut_out(torch.stack([ring, snake]).unsqueeze(1).expand(-1, 3, -1, -1))[:, 3]
    assert opacity[0].eq(255).sum() == 16 * 16
    assert torch.equal(opacity[1].eq(0), snake.eq(255))


def test_samples_are_a_function_of_their_number(train: ImageDataset) -> None:
    other = open_data("motion")
    assert other.train is not None
    for index in (0, 7, 1999):
        first, second = (data.read(index).source for data in (train, other.train))
        assert np.array_equal(
            list(dict(first.frames(range(FRAMES))).values()), list(dict(second.frames(range(FRAMES))).values())
        )
    assert scene(3, np.arange(9)) == scene(3, np.arange(9))
    assert scene(3, np.arange(9)) != scene(3, np.arange(9), seed=1)
    assert other.val is not None
    assert other.test is not None
    assert (train.class_counts() + other.val.class_counts()).tolist() == [500] * 8
    assert other.test.class_counts().tolist() == [100] * 8
    assert len({train.key(index) for index in range(200)}) == 200


def test_test_clips_show_other_drawings(train: ImageDataset) -> None:
    source = store(train)
    shown = [{source.scene(row).drawing for row in rows} for rows in (range(0, 4000, 3), range(4000, 4800))]
    assert not shown[0] & shown[1]
    assert len(shown[1]) > 300


def test_only_the_wanted_frames_are_drawn(train: ImageDataset) -> None:
    """Frames 3 and 9 alone are those of the whole clip; a model of grey pictures gets them in grey."""
    shown = store(train).scene(5)
    whole = draw(shown, store(train).drawings).permute(1, 2, 3, 0).numpy()
    with open_footage(store(train).read(5)) as opened:
        assert (len(opened.times), opened.end, opened.size) == (FRAMES, 1.0, (SIDE, SIDE))
        found = dict(opened.frames([9, 3, 9]))
    assert list(found) == [3, 9]
    assert all(np.array_equal(pixels, whole[number]) for number, pixels in found.items())
    with open_footage(store(train).read(5), channels=1) as opened:
        ((_, grey),) = opened.frames([3])
    assert grey.shape == (SIDE, SIDE, 1)


def test_choices_it_does_not_have() -> None:
    with pytest.raises(ConfigError, match="motion has no such choice"):
        open_data("motion", DataConfig(hold_out="noto"))
