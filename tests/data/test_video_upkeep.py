"""Checking, measuring and packing data sets of videos."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.videos import frames, write_video

from vitrail.cli import main
from vitrail.config import AugmentConfig, ConfigError, DataConfig, Preprocess
from vitrail.data import Data, DataError, TrainLoader, check_data, data_stats, eval_batches, open_data, pack_data
from vitrail.data.clips import clips_for_eval
from vitrail.data.embedded import motion
from vitrail.data.footage import open_footage
from vitrail.data.packed import PackedFrames, PackedVideo
from vitrail.data.video import Video, VideoError

PREPROCESS = Preprocess(image_size=(16, 16), frames=4, stride=2, interpolation="bilinear")
ALL = DataConfig(val_fraction=0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three videos of 14 to 19 frames, one of them at an uneven rate; with `train` and `test` of the same."""
    root = tmp_path_factory.mktemp("upkeep")
    for seed in range(6):
        path = root / "train" / ("odd" if seed % 2 else "even") / f"{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        uneven = {"times": [0, 40, 50, 300, 310, 320, 900, 910, 920, 930, 1000, 1100, 1110, 1500, 1600]}
        write_video(path, frames(14 + seed, (24, 32), seed)[: 15 if seed == 1 else None], **(uneven if seed == 1 else {}))
    for label in ("even", "odd"):
        (root / "test" / label).mkdir(parents=True)
        write_video(root / "test" / label / f"{label}.mp4", frames(30, (36, 64), len(label)), rate=10)
    return root


@pytest.fixture
def folder(videos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(videos, tmp_path / "set"))


def table_of(folder: Path, rows: list[tuple[str, ...]]) -> Path:
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "label", "split", "start", "end"), *rows])
    return folder / "table.csv"


def test_a_sound_set_has_no_findings(folder: Path) -> None:
    check = check_data(open_data(folder, ALL), progress=False)
    assert check.ok
    assert (check.noun, check.counts) == ("video", {"train": 6, "test": 2})
    assert (check.broken, check.damaged, check.copies, check.odd_sizes) == ((), (), (), ())


def test_broken_damaged_and_copied_videos_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    even = folder / "train" / "even"
    (even / "empty.mp4").write_bytes(b"")
    whole = (even / "0.mp4").read_bytes()
    (even / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(frames(1)[0]).save(even / "picture.mp4", format="PNG")
    write_video(folder / "train" / "odd" / "holes.avi", frames(40, (24, 32), 9), codec="mjpeg", bframes=0)
    data = bytearray((folder / "train" / "odd" / "holes.avi").read_bytes())
    places = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    for place in places[10:13]:  # three frames are no JPEGs any more
        data[place : place + 200] = bytes(200)
    (folder / "train" / "odd" / "holes.avi").write_bytes(data)
    shutil.copy(even / "0.mp4", folder / "train" / "odd" / "again.mp4")
    shutil.copy(even / "2.mp4", folder / "test" / "even" / "known.mp4")
    check = check_data(open_data(folder, DataConfig(val_fraction=0, bad_files="refuse")), progress=False)
    assert {Path(sample.name).name: reason for sample, reason in check.broken} == {
        "empty.mp4": "an empty file (0 bytes)",
        "cut.mp4": "not a readable video: cut short, the table of its frames is missing",
        "picture.mp4": "not a readable video: it is a PNG picture",
    }
    ((damaged, reason),) = check.damaged
    assert (Path(damaged.name).name, reason) == ("holes.avi", "3 of 40 frames cannot be decoded")
    assert [{Path(sample.name).name for sample in group.samples} for group in check.leaks] == [{"2.mp4", "known.mp4"}]
    assert [{Path(sample.name).name for sample in group.samples} for group in check.contradictions] == [{"0.mp4", "again.mp4"}]
    assert not check.ok
    assert main(["data", "check", str(folder), "--json"]) == 1
    written = json.loads(capsys.readouterr().out)
    assert (len(written["broken"]), len(written["damaged"]), written["noun"]) == (3, 1, "video")
    assert [table.title for table in check.tables()][1:3] == ["Unreadable videos", "Damaged videos"]


def test_parts_of_one_video_in_two_splits_leak(folder: Path) -> None:
    """Neighbouring parts share a scene; their labels may differ all the same, and a part that is there twice is a copy."""
    (even, odd), name = ("train/even/0.mp4", "train/odd/1.mp4"), "train/even/4.mp4"
    rows = [
        (even, "a", "train", "0", "0.2"), (even, "b", "test", "0.2", "0.4"), (odd, "b", "train", "0", "0.3"),
        (odd, "a", "train", "0.3", "0.9"), (name, "a", "train", "0", "0.2"), (name, "a", "train", "0", "0.2"),
    ]  # fmt: skip
    check = check_data(open_data(table_of(folder, rows)), progress=False)
    assert [(group.kind, len(group.samples), group.leaks) for group in check.copies] == [
        ("parts", 2, True),
        ("exact", 2, False),
    ]
    assert not check.contradictions
    assert not check.ok


def test_figures_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "even" / "empty.mp4").write_bytes(b"")
    stats = data_stats(open_data(folder, ALL), progress=False)
    assert stats.class_counts == {"train": {"even": 4, "odd": 3}, "test": {"even": 1, "odd": 1}}
    assert (stats.noun, stats.readable, stats.unreadable, stats.grey) == ("video", 8, 1, 0)
    assert stats.sizes == {"32 x 24": 6, "64 x 36": 2}
    assert (stats.smallest, stats.largest) == ((24, 32), (36, 64))
    lengths = stats.lengths
    assert lengths is not None
    assert lengths.seconds == pytest.approx((14 / 25, 18 / 25, 3.0))
    assert lengths.frames == (14, 18, 30)
    assert lengths.rates == {"25": 5, "10": 2, "variable": 1}
    assert lengths.total_frames == 14 + 15 + 16 + 17 + 18 + 19 + 30 + 30
    means, squares = [], []
    for seed in range(6):
        with Video(str(folder / "train" / ("odd" if seed % 2 else "even") / f"{seed}.mp4")) as video:
            chosen = np.linspace(0, len(video.times) - 1, min(16, len(video.times))).astype(int)
            values = np.stack([pixels for _, pixels in video.frames(chosen)]) / 255
        means.append(values.mean((0, 1, 2)))
        squares.append((values**2).mean((0, 1, 2)))
    mean = np.mean(means, 0)
    assert stats.mean == pytest.approx(mean.tolist(), abs=1e-5)
    assert stats.std == pytest.approx(np.sqrt(np.mean(squares, 0) - mean**2).tolist(), abs=1e-5)
    assert main(["data", "stats", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "0.56 s, 0.72 s, 3.00 s" in printed
    assert "Frame rates" in printed


def listed(data: Data) -> dict[str, list[tuple[str, int]]]:
    return {
        split: [(part.names(index), int(part.targets[index])) for index in range(len(part))]
        for split, part in data.splits().items()
    }


def batches(data: Data, **settings: Any) -> list[torch.Tensor]:
    """Two epochs of training clips."""
    assert data.train is not None
    augment = AugmentConfig(crop_scale=(0.3, 1.0))
    loader = TrainLoader(data.train, preprocess=PREPROCESS, augment=augment, batch_size=3, seed=4, workers=0)
    stream = loader.batches()
    return [next(stream).images for _ in range(4)]


def test_an_exact_pack_is_the_same_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same samples in the same order and splits, the same training clips and the same views, pixel for pixel."""
    data = open_data(folder, DataConfig(val_fraction=0.4))
    assert main(["data", "pack", str(folder), str(tmp_path / "packed"), "--exact", "--val-fraction", "0.4"]) == 0
    assert "packed: 8 videos, " in capsys.readouterr().out
    packed = open_data(tmp_path / "packed")
    assert listed(packed) == listed(data)
    assert packed.classes == data.classes
    assert packed.train is not None
    assert packed.train.video
    assert all(torch.equal(*pair) for pair in zip(batches(packed), batches(data), strict=True))
    again = pickle.loads(pickle.dumps(packed))
    for part, other in ((data.test, packed.test), (data.val, again.val)):
        views = [next(iter(eval_batches(p, preprocess=PREPROCESS, batch_size=9, workers=0))).images for p in (part, other)]
        assert torch.equal(*views)
    assert data_stats(packed, progress=False).lengths == data_stats(data, progress=False).lengths


def test_frames_as_jpegs_of_a_smaller_size(folder: Path, tmp_path: Path) -> None:
    """Close to what the file gives at that size, at the same times; much smaller than its pixels."""
    result = pack_data(open_data(folder, ALL), tmp_path / "packed", size=18, progress=False)
    assert (result.samples, result.kept, result.noun) == (8, 0, "video")
    assert result.size_before == sum(path.stat().st_size for path in folder.rglob("*.mp4"))
    train = open_data(tmp_path / "packed", ALL).train
    original = open_data(folder, ALL).train
    assert train is not None
    assert original is not None
    for index in range(6):
        small, large = train.read(index), original.read(index)
        with open_footage(small) as packed, open_footage(large) as file:
            assert packed.size == (18, 24)
            assert packed.times.tolist() == file.times.tolist()
            assert packed.end == file.end
            with pytest.raises(IndexError):
                next(packed.frames([len(file.times)]))
        found, truth = (clips_for_eval(footage, PREPROCESS).float() for footage in (small, large))
        assert (found - truth).abs().mean() < 4
    assert {len(train.read(index).source.row.frames[0]) < 18 * 24 * 3 for index in range(6)} == {True}


def test_parts_speeds_and_grey(folder: Path, tmp_path: Path) -> None:
    rows = [("train/even/4.mp4", "ab"[at % 2], "train", f"{at * 0.1:g}", f"{at * 0.1 + 0.25:g}") for at in range(4)]
    parts = open_data(table_of(folder, rows), ALL)
    packed = open_data(pack_data(parts, tmp_path / "parts", exact=True, progress=False).path, ALL)
    assert listed(packed) == listed(parts)
    assert all(torch.equal(*pair) for pair in zip(batches(packed), batches(parts), strict=True))
    speed = open_data(folder, DataConfig(labels="speed", val_fraction=0))
    fast = open_data(pack_data(speed, tmp_path / "speed", exact=True, channels=1, progress=False).path, ALL)
    assert listed(fast) == listed(speed)
    assert fast.train is not None
    assert speed.train is not None
    grey = Preprocess(image_size=(16, 16), frames=4, channels=1)
    for index in (0, 12, len(speed.train) - 1):
        assert fast.train.read(index).speed == speed.train.read(index).speed
        assert torch.equal(*(clips_for_eval(part.train.read(index), grey) for part in (fast, speed)))  # type: ignore[union-attr]
    uniform = Preprocess(image_size=(16, 16), frames=4, sampling="uniform")
    with pytest.raises(ConfigError, match="hides how fast"):
        next(eval_batches(fast.train, preprocess=uniform, batch_size=2))


def test_made_clips_are_packed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "TRAIN_CLIPS", 8)
    monkeypatch.setattr(motion, "TEST_CLIPS", 8)
    data = open_data("motion", ALL)
    packed = open_data(pack_data(data, tmp_path / "packed", exact=True, progress=False).path, ALL)
    assert listed(packed) == listed(data)
    assert all(torch.equal(*pair) for pair in zip(batches(packed), batches(data), strict=True))


def test_broken_videos_are_left_out_and_named_or_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "even" / "empty.mp4").write_bytes(b"")
    result = pack_data(open_data(folder, ALL), tmp_path / "packed", size=16, progress=False)
    assert result.left_out == (("train/even/empty.mp4", "an empty file (0 bytes)"),)
    assert result.samples == 8
    with pytest.raises(DataError, match=r"empty.mp4: an empty file"):
        pack_data(open_data(folder, DataConfig(bad_files="refuse")), tmp_path / "refused", progress=False)
    for path in folder.rglob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no video can be read; the first: "):
        pack_data(open_data(folder, ALL), tmp_path / "refused", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "set"]


def test_settings_and_rows_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact keeps the frames of videos"):
        pack_data(open_data("digits"), tmp_path / "packed", exact=True)
    with pytest.raises(ConfigError, match="channels: 4 is not one of 1"):
        pack_data(open_data(folder, ALL), tmp_path / "packed", channels=4)
    row = PackedVideo([bytes(12)] * 2, True, [0.0, 0.1], 0.2, 2, 2, 3, 1.0)
    assert next(PackedFrames(row).frames([1]))[1].shape == (2, 2, 3)
    with pytest.raises(VideoError, match="2 frames and 1 times"):
        PackedFrames(row._replace(times=[0.0]))
    with pytest.raises(VideoError, match="12 bytes instead of 27"):
        next(PackedFrames(row._replace(height=3, width=3)).frames([0]))
