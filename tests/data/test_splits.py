from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.layouts import pictures, write_folder
from tests.data.pictures import encode, photo

from vitrail.config import ConfigError, DataConfig
from vitrail.data import Data, ImageDataset, open_data
from vitrail.data.splits import choose_splits, cut_validation, nested_subset, role_in_name


def rows(part: np.ndarray | None) -> list[int] | None:
    return None if part is None else part.tolist()


@pytest.mark.parametrize(
    ("splits", "settings", "train", "val", "test", "cut"),
    [
        (["", "", ""], {}, [0, 1, 2], None, None, True),
        (["train", "test", "train"], {}, [0, 2], None, [1], True),
        (["train", "test", "train"], {"val_split": "test"}, [0, 2], [1], [1], False),
        (["train", "test"], {"val_fraction": 0.0}, [0], None, [1], False),
        (["Training", "dev", "testing"], {}, [0], [1], [2], False),
        (["", "test", ""], {}, [0, 2], None, [1], True),
        (["a", "b", "b"], {}, [0, 1, 2], None, None, True),
        (["a", "b", "b"], {"val_split": "b"}, [0], [1, 2], None, False),
        (["a", "b", "b"], {"train_split": "b", "val_split": "a"}, [1, 2], [0], None, False),
        (["train", "train", "test"], {"val_split": "train"}, [0, 1], None, [2], True),
        (["train", "test", "test"], {"train_split": "test"}, [1, 2], None, None, True),
        (["test", "test"], {}, None, None, [0, 1], True),
        (["train", "train"], {"val_fraction": 0.0}, [0, 1], None, None, False),
    ],
)
def test_roles(splits: list[str], settings: dict, train: object, val: object, test: object, cut: bool) -> None:
    found = choose_splits(splits, DataConfig(**settings))
    assert [rows(found.train), rows(found.val), rows(found.test), found.cut] == [train, val, test, cut]


def test_unknown_and_unused_splits() -> None:
    with pytest.raises(ConfigError, match="the source names no splits"):
        choose_splits(["", ""], DataConfig(train_split="train"))
    found = choose_splits(["train", "val", "extra", ""], DataConfig())
    assert found.notes == ("2 samples left out, in no split that is used (extra, no split named)",)


def test_split_named_in_a_file_name() -> None:
    assert role_in_name("train-00000-of-00002.parquet") == "train"
    assert role_in_name("my_validation.csv") == "validation"
    assert role_in_name("train-and-test.csv") == ""
    assert role_in_name("latest.csv") == ""


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(40, 200),
    added=st.integers(1, 60),
    fraction=st.sampled_from([0.1, 0.15, 0.5]),
)
def test_the_cut_moves_nothing_when_samples_come_or_go(seed: int, number: int, added: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    numbers, targets = rng.random(number + added), rng.integers(0, 3, number + added)
    before, _ = cut_validation(numbers[:number], targets[:number], fraction)
    after, _ = cut_validation(numbers, targets, fraction)
    for target in range(3):
        members = np.flatnonzero(targets[:number] == target)
        if (numbers[members] < fraction).any() and not (numbers[members] < fraction).all():
            assert (before[members] == after[members]).all()


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.sampled_from([0.01, 0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=8), fraction=st.floats(0.01, 0.9))
def test_every_class_of_different_pictures_is_on_both_sides(numbers: list[float], fraction: float) -> None:
    values, targets = np.array(numbers), np.zeros(len(numbers), np.int64)
    held, without = cut_validation(values, targets, fraction)
    if len(set(numbers)) > 1:
        assert held.any()
        assert not held.all()
        assert without == []
    else:  # one picture, or copies of one: to training
        assert not held.any()
        assert without == [0]
    for value in set(numbers):  # copies stay together
        assert len(set(held[values == value].tolist())) == 1


def test_the_share_held_out_is_that_asked_for_in_every_class() -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], [4000, 400])
    held, _ = cut_validation(rng.random(4400), targets, 0.15)
    assert abs(held[targets == 0].mean() - 0.15) < 0.02
    assert abs(held[targets == 1].mean() - 0.15) < 0.05
    with pytest.raises(ConfigError, match=r"val_fraction: 1.5"):
        cut_validation(rng.random(3), np.zeros(3, np.int64), 1.5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), few=st.integers(1, 10), more=st.integers(0, 10), several=st.booleans())
def test_subsets_are_nested(seed: int, few: int, more: int, several: bool) -> None:
    rng = np.random.default_rng(seed)
    targets = (rng.random((60, 4)) < 0.3).astype(np.float32) if several else rng.integers(0, 4, 60)
    numbers = rng.random(60)
    small, large = (nested_subset(numbers, targets, limit).tolist() for limit in (few, few + more))
    assert set(small) <= set(large)
    assert small == sorted(small)
    counts = targets.sum(0) if several else np.bincount(targets, minlength=4)
    kept = targets[small].sum(0) if several else np.bincount(targets[small], minlength=4)
    if several:
        assert (kept >= np.minimum(counts, few)).all()
    else:
        assert (kept == np.minimum(counts, few)).all()


def files(dataset: ImageDataset) -> set[bytes]:
    return {Path(str(dataset.read(at))).read_bytes() for at in range(len(dataset))}


def sides(data: Data) -> tuple[set[bytes], set[bytes]]:
    return files(data.train), files(data.val)


def test_adding_and_renaming_files_moves_no_other_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path, pictures({"": 30}))
    train, val = sides(open_data(root))
    for at, path in enumerate(sorted(root.rglob("*.jpg"))[::3]):
        path.rename(path.with_name(f"renamed-{at}.jpg"))
    for at in range(20):
        (root / "bee" / f"new{at}.jpg").write_bytes(encode(photo(16, 16, seed=1000 + at)))
    (root / "dog").mkdir()
    for at in range(20):
        (root / "dog" / f"{at}.jpg").write_bytes(encode(photo(16, 16, seed=2000 + at)))
    train_after, val_after = sides(open_data(root))
    assert train <= train_after
    assert val <= val_after
    assert len(train_after | val_after) == len(train | val) + 40


def test_copies_of_a_file_fall_on_the_same_side(tmp_path: Path) -> None:
    root = write_folder(tmp_path, pictures({"": 12}))
    for path in sorted(root.rglob("*.jpg")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    train, val = sides(open_data(root))
    assert not train & val


def test_max_samples_takes_training_samples_only(tmp_path: Path) -> None:
    root = write_folder(tmp_path, pictures())
    small, large = (open_data(root, DataConfig(max_samples=limit)) for limit in (2, 4))
    assert files(small.train) < files(large.train)
    assert small.train.class_counts().tolist() == [2, 2, 2]
    assert len(small.test) == 9
    assert "training on 6 of 18 samples (max_samples 2)" in small.notes
