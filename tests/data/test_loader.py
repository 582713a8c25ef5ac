from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.layouts import pictures, write_folder, write_shards
from tests.data.pictures import encode, photo

from vitrail.config import AugmentConfig, ConfigError, DataConfig, Preprocess
from vitrail.data import Batch, DataError, ImageDataset, TrainLoader, decoded, eval_batches, open_data, workers
from vitrail.data.transforms import decode_for_eval

SIZE = Preprocess(image_size=(16, 20))
ALL = DataConfig(val_fraction=0)
CROP, PLAIN = AugmentConfig(), AugmentConfig(crop="none")
BROKEN = {
    "zero.jpg": b"",
    "short.jpg": encode(photo(64, 64))[:700],
    "text.jpg": b"this is no picture at all",
    "bomb.png": encode(np.zeros((400, 300), np.uint8), "PNG"),
}
REASONS = {
    "zero.jpg": "0 bytes",
    "short.jpg": "cut short",
    "text.jpg": "not a picture",
    "bomb.png": "120,000 pixels, more than the 100,000 allowed",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures", pictures({"": 8}))


@pytest.fixture
def not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No set is small enough to stay in memory."""
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", -1)
    monkeypatch.setattr("vitrail.data.loader.KEPT_LIMIT", -1)


def add_broken(folder: Path) -> DataConfig:
    for name, data in BROKEN.items():
        (folder / "bee" / name).write_bytes(data)
    return DataConfig(val_fraction=0, max_pixels=100_000)


def loader(dataset: ImageDataset, augment: AugmentConfig = CROP, **settings: object) -> TrainLoader:
    return TrainLoader(dataset, preprocess=SIZE, augment=augment, **{"batch_size": 6, "workers": 0, **settings})


def first(made: TrainLoader, number: int, start: int = 0) -> list[Batch]:
    batches = made.batches(start)
    found = list(itertools.islice(batches, number))
    batches.close()
    return found


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for field in ("images", "targets", "indices", "keys"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("augment", [CROP, PLAIN], ids=["crop", "plain"])
@pytest.mark.parametrize("kept", [True, False])
def test_any_number_of_workers_gives_the_same_batches(
    folder: Path, augment: AugmentConfig, kept: bool, request: pytest.FixtureRequest
) -> None:
    if not kept:
        request.getfixturevalue("not_kept")
    data = open_data(folder, ALL).train
    alone = first(loader(data, augment, accumulate=2), 11)
    assert bool(data.pixels) == kept
    assert_same(alone, first(loader(data, augment, accumulate=2, workers=2), 11))
    assert {batch.images.dtype for batch in alone} == {torch.uint8}
    assert alone[0].images.shape == (3, 3, 16, 20)
    assert all(batch.wait >= 0 for batch in alone)


def test_keeping_a_set_in_memory_changes_nothing(folder: Path, request: pytest.FixtureRequest) -> None:
    data = open_data(folder, ALL).train
    kept = [first(loader(data, augment, mode="exact"), 5) for augment in (CROP, PLAIN)]
    request.getfixturevalue("not_kept")
    data.pixels.clear()
    loose = [first(loader(data, augment, mode="exact"), 5) for augment in (CROP, PLAIN)]
    for one, other in zip(kept, loose, strict=True):
        assert_same(one, other)
    assert not data.pixels


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_any_micro_step_continues_the_same_run(folder: Path, workers: int, not_kept: None) -> None:
    made = loader(open_data(folder, ALL).train, accumulate=3, workers=workers)
    assert made.steps_per_epoch == 4
    whole = first(made, 30)
    for start in (1, 11, 12, 25):
        assert_same(whole[start:], first(made, 30 - start, start))


def test_ranks_share_the_global_batch(folder: Path) -> None:
    data = open_data(folder, ALL).train
    whole = first(loader(data), 8)
    ranks = [first(loader(data, rank=rank, world=2), 8) for rank in (0, 1)]
    joined = [Batch(*(torch.cat([a[at], b[at]]) for at in range(4))) for a, b in zip(*ranks, strict=True)]
    assert_same(whole, joined)


def test_augmentation_differs_between_epochs_and_copies(folder: Path) -> None:
    data = open_data(folder, ALL).train
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in first(loader(data, AugmentConfig(repeats=2)), 8):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            seen.setdefault(index, []).append(image)
    for images in seen.values():
        assert len(images) >= 2
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))


def test_targets_and_indices_belong_to_the_pictures(folder: Path) -> None:
    data = open_data(folder, ALL).train
    for batch in first(loader(data, PLAIN, mode="exact"), 4):
        assert batch.targets.tolist() == data.targets[batch.indices.numpy()].tolist()
        assert torch.equal(batch.keys[:, 1], batch.indices)
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            assert torch.equal(image, decode_for_eval(data.read(index), SIZE))


def test_weights_draw_some_classes_more_often(folder: Path) -> None:
    data = open_data(folder, ALL).train
    weights = np.where(data.targets == 2, 1.0, 0.0)
    assert {int(t) for batch in first(loader(data, weights=weights), 4) for t in batch.targets} == {2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [CROP, PLAIN], ids=["crop", "plain"])
@pytest.mark.parametrize("kept", [True, False])
def test_training_takes_the_next_readable_sample_in_place_of_a_broken_one(
    folder: Path, workers: int, augment: AugmentConfig, kept: bool, request: pytest.FixtureRequest
) -> None:
    if not kept:
        request.getfixturevalue("not_kept")
    data = open_data(folder, add_broken(folder)).train
    broken = {at for at in range(len(data)) if Path(data.names(at)).name in BROKEN}
    order = [part.tolist() for part in np.split(loader(data, augment).order.epoch(0)[0][:24], 4)]
    for batch, asked in zip(first(loader(data, augment, workers=workers), 4), order, strict=True):
        expected = []
        for index in asked:
            while index in broken:
                index = (index + 1) % len(data)
            expected.append(index)
        assert batch.indices.tolist() == expected
        assert batch.targets.tolist() == data.targets[expected].tolist()
    assert {Path(name).name for name, _ in data.bad} <= set(BROKEN)
    assert len(data.bad) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_samples_out_and_names_them(folder: Path, workers: int) -> None:
    data = open_data(folder, add_broken(folder)).train
    for _ in range(2):  # decoded, then from memory
        batches = list(eval_batches(data, preprocess=SIZE, batch_size=10, workers=workers))
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert [data.names(at) for at in indices] == [
            data.names(at) for at in range(28) if Path(data.names(at)).name not in BROKEN
        ]
        assert sum(len(batch.images) for batch in batches) == 24
        reasons = {Path(name).name: reason for name, reason in data.bad}
        assert set(reasons) == set(BROKEN)
        assert all(REASONS[name] in reason for name, reason in reasons.items())
        data.bad._reasons.clear()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_broken_samples_are_refused_when_asked(folder: Path, workers: int, kept: bool, request: pytest.FixtureRequest) -> None:
    if not kept:
        request.getfixturevalue("not_kept")
    config = add_broken(folder)
    data = open_data(folder, DataConfig(val_fraction=0, max_pixels=config.max_pixels, bad_files="refuse")).train
    with pytest.raises(DataError, match=r"bee/.*(jpg|png): .*\(set bad_files to skip"):
        first(loader(data, workers=workers), 5)
    with pytest.raises(DataError, match=r"bee/.*\(set bad_files to skip"):
        list(eval_batches(data, preprocess=SIZE, batch_size=10, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", [CROP, PLAIN], ids=["crop", "plain"])
@pytest.mark.parametrize("kept", [True, False])
def test_nothing_readable_ends_with_an_error(
    tmp_path: Path, workers: int, augment: AugmentConfig, kept: bool, request: pytest.FixtureRequest
) -> None:
    if not kept:
        request.getfixturevalue("not_kept")
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.jpg").write_bytes(b"")
    data = open_data(tmp_path, ALL).train
    with pytest.raises(DataError, match=r"too many unreadable pictures in a row \(2 of 2\).*0 bytes"):
        first(loader(data, augment, workers=workers), 1)
    assert list(eval_batches(data, preprocess=SIZE, batch_size=2)) == []
    assert len(data.bad) == 2


def test_evaluation_is_in_order_exact_and_the_second_time_from_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(folder, ALL).train
    once = list(eval_batches(data, preprocess=SIZE, batch_size=10))
    assert torch.cat([batch.indices for batch in once]).tolist() == list(range(24))
    assert [len(batch.images) for batch in once] == [10, 10, 4]
    for index, image in enumerate(torch.cat([batch.images for batch in once])):
        assert torch.equal(image, decode_for_eval(data.read(index), SIZE))

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(ImageDataset, "read", refuse)
    assert_same(once, list(eval_batches(data, preprocess=SIZE, batch_size=10)))


def test_evaluation_in_ranks_covers_everything_once(folder: Path) -> None:
    data = open_data(folder, ALL).train
    found = []
    for rank in range(3):
        for _ in range(2):
            part = list(eval_batches(data, preprocess=SIZE, batch_size=3, rank=rank, world=3))
        found += torch.cat([batch.indices for batch in part]).tolist()
        whole = torch.cat([batch.images for batch in part])
        assert torch.equal(whole[1], decode_for_eval(data.read(rank + 3), SIZE))
    assert sorted(found) == list(range(24))


def test_an_evaluation_given_up_leaves_no_half_filled_memory(folder: Path) -> None:
    data = open_data(folder, ALL).train
    batches = eval_batches(data, preprocess=SIZE, batch_size=5)
    next(batches)
    batches.close()
    assert not data.pixels
    assert len(list(eval_batches(data, preprocess=SIZE, batch_size=5))) == 5


class Noisy(torch.utils.data.Dataset):
    """A data set with random transforms of its own, from all three global generators."""

    targets = (0, 1) * 6

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = [torch.rand(()).item(), np.random.random(), random.random()]
        return torch.full((3, 8, 8), sum(noise) / 3), self.targets[index]


def test_random_transforms_inside_a_data_set_become_reproducible() -> None:
    data = open_data(Noisy(), ALL).train
    torch.manual_seed(1)
    state = torch.get_rng_state()
    alone = first(loader(data, PLAIN), 6)
    assert torch.equal(torch.get_rng_state(), state)  # the model's own randomness is not touched
    assert_same(alone, first(loader(data, PLAIN, workers=2), 6))
    assert_same(alone[3:], first(loader(data, PLAIN), 3, start=3))
    assert not torch.equal(alone[0].images, alone[2].images)
    assert not data.pixels
    one, other = (list(eval_batches(data, preprocess=SIZE, batch_size=4)) for _ in range(2))
    assert_same(one, other)


def test_workers_started_afresh(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """By spawning, as on other systems than Linux; in a process of its own, to which the way of starting belongs."""
    write_shards(tmp_path / "s", pictures({"train": 8}))
    code = """
import itertools, multiprocessing, sys
import torch
from vitrail.config import AugmentConfig, DataConfig, Preprocess
from vitrail.data import TrainLoader, open_data

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    data = open_data(sys.argv[1], DataConfig(val_fraction=0)).train
    sums = []
    for workers in (0, 1):
        size = Preprocess(image_size=(16, 16))
        made = TrainLoader(data, preprocess=size, augment=AugmentConfig(), batch_size=8, workers=workers)
        sums.append([int(b.images.long().sum()) for b in itertools.islice(made.batches(), 4)])
    print(sums[0] == sums[1], len(set(sums[0])))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    out = run_python(run, str(script), str(tmp_path / "s"))
    assert out.split() == ["True", "4"]


def test_workers_are_chosen_from_cores_cost_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 9)
    assert workers.choose_workers(3, 1.0, 1, 0) == 3
    assert workers.choose_workers(-1, 1e-2, 1, 100) == 8
    assert workers.choose_workers(-1, 1e-2, 4, 100) == 1
    assert workers.choose_workers(-1, 1e-5, 1, 100) == 0  # costs next to nothing
    assert workers.choose_workers(-1, 1e-2, 1, 2**50) == (0 if Path("/dev/shm").is_dir() else 8)
    with pytest.raises(ConfigError, match="workers: -2 is less than -1"):
        workers.choose_workers(-2, 1.0, 1, 0)


def test_small_sets_in_memory_need_no_workers(folder: Path) -> None:
    data = open_data(folder, ALL).train
    assert loader(data, PLAIN, workers=-1).workers == 0
    assert data.pixels


def test_settings_that_do_not_fit(folder: Path) -> None:
    data = open_data(folder, ALL).train
    with pytest.raises(ConfigError, match="batch_size 6 cannot be divided by 1 ranks x 4 micro-steps"):
        loader(data, accumulate=4)
    with pytest.raises(ConfigError, match="batch_size: 0 is less than 1"):
        next(eval_batches(data, preprocess=SIZE, batch_size=0))
    empty = ImageDataset(data.store, [], [], np.zeros(0), data.classes)
    with pytest.raises(DataError, match="no training samples"):
        loader(empty)
    assert list(eval_batches(empty, preprocess=SIZE, batch_size=3)) == []
