"""Videos through the one door, and batches of clips from there: same samples from every source, exact order, named losses."""

from __future__ import annotations

import csv
import io
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.videos import frames, write_video

from vitrail.config import AugmentConfig, ConfigError, DataConfig, Preprocess
from vitrail.data import Data, DataError, TrainLoader, eval_batches, open_data
from vitrail.data.clips import clips_for_eval
from vitrail.data.footage import Footage

PREPROCESS = Preprocess(image_size=(16, 16), frames=4, interpolation="bilinear")
NAMES = [f"{label}/{label}-{number}.mp4" for label in ("run", "walk") for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four videos."""
    root = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(exist_ok=True)
        write_video(root / name, frames(20 + seed, (24, 32), seed))
    return root


def contents(data: Data) -> list[tuple[str, int, bytes]]:
    assert data.train is not None
    assert data.train.video
    found = []
    for index in range(len(data.train)):
        clip = clips_for_eval(data.train.read(index), PREPROCESS)
        found.append((Path(data.train.names(index)).stem, int(data.train.targets[index]), clip.numpy().tobytes()))
    return found


def test_all_sources_hold_the_same_samples(folder: Path, tmp_path: Path) -> None:
    everything = DataConfig(val_fraction=0)
    expected = contents(open_data(folder, everything))
    assert [name for name, _, _ in expected] == [Path(name).stem for name in NAMES]
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "label"), *((name, name.split("/")[0]) for name in reversed(NAMES))])
    assert contents(open_data(folder / "table.csv", everything)) == expected
    (folder / "table.csv").unlink()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in NAMES:
            archive.add(folder / name, name)
    assert contents(open_data(tmp_path / "shard.tar", everything)) == expected
    pairs = [(str(folder / name), name.split("/")[0]) for name in NAMES]
    assert contents(open_data(pairs, everything)) == expected
    split = open_data({"train": pairs[:6], "test": pairs[6:]})
    assert split.test is not None
    assert split.test.video
    assert split.train is not None
    assert pickle.loads(pickle.dumps(split.train)).video


def test_parts_of_videos_from_a_table(folder: Path) -> None:
    rows = [("path", "label", "start", "end"), ("run/run-0.mp4", "a", "0.2", "0.6"), ("run/run-0.mp4", "b", "", "")]
    with open(folder / "parts.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = open_data(folder / "parts.csv", DataConfig(val_fraction=0))
    (folder / "parts.csv").unlink()
    assert data.train is not None
    part, whole = (data.train.read(index) for index in range(2))
    assert (part.start, part.end, whole.start, whole.end) == (0.2, 0.6, 0.0, None)
    assert data.train.key(0) == data.train.key(1)  # never on both sides of a split
    assert "parts.csv: parts of videos, in seconds" in data.notes


def test_frame_folders(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for clip in ("one", "two"):
            (tmp_path / label / clip).mkdir(parents=True)
            for at, picture in enumerate(frames(11, (24, 32), len(label + clip))):
                Image.fromarray(picture).save(tmp_path / label / clip / f"frame{at}.png")
    assert len(open_data(tmp_path, DataConfig(val_fraction=0)).train or ()) == 44  # pictures, unless asked for
    data = open_data(tmp_path, DataConfig(media="frames", frame_rate=10.0, val_fraction=0))
    assert data.train is not None
    assert len(data.train) == 4
    footage = data.train.read(0)
    assert [Path(path).name for path in footage.source] == [f"frame{at}.png" for at in range(11)]
    assert footage.rate == 10
    assert len({data.train.key(index) for index in range(4)}) <= 4
    shutil.rmtree(tmp_path / "a" / "one")
    clip, bad = next(iter(eval_batches(data.train, preprocess=PREPROCESS, batch_size=4))), data.train.bad
    assert len(clip.targets) == 3
    assert "one" in bad.summary()


def test_pictures_and_videos_side_by_side(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "both")
    for label in ("run", "walk"):
        Image.fromarray(frames(1)[0]).save(tmp_path / "both" / label / "still.png")
    pictures = open_data(tmp_path / "both", DataConfig(val_fraction=0))
    assert pictures.train is not None
    assert (pictures.train.video, len(pictures.train)) == (False, 2)
    assert any("media videos reads the others" in note for note in pictures.notes)
    videos = open_data(tmp_path / "both", DataConfig(media="videos", val_fraction=0))
    assert len(videos.train or ()) == 8
    with pytest.raises(DataError, match="some paths of the list are videos"):
        open_data([(str(folder / NAMES[0]), "a"), ("b.png", "b")])


def test_flat_folder_and_unreadable_media_are_explained(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / NAMES[0], tmp_path / "a.mp4")
    with pytest.raises(DataError, match=r"1 video but no class folders"):
        open_data(tmp_path)


def test_models_of_the_other_kind_are_refused(folder: Path, picture_folder: Path) -> None:
    videos, pictures = open_data(folder).train, open_data(picture_folder).train
    assert videos is not None
    assert pictures is not None
    with pytest.raises(ConfigError, match="takes pictures, but the samples of the data set are videos"):
        TrainLoader(videos, preprocess=replace(PREPROCESS, frames=0), augment=AugmentConfig(), batch_size=2)
    with pytest.raises(ConfigError, match="takes clips of videos, but the samples of the data set are pictures"):
        next(eval_batches(pictures, preprocess=PREPROCESS, batch_size=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_order_is_exact(folder: Path, workers: int) -> None:
    """Batches from micro-step 3 on are those that a run from the start comes to, whatever the number of processes."""
    data = open_data(folder, DataConfig(val_fraction=0)).train
    assert data is not None

    def loader(workers: int) -> TrainLoader:
        return TrainLoader(
            data, preprocess=replace(PREPROCESS, clips=4), augment=AugmentConfig(), batch_size=4, seed=1, workers=workers
        )

    def first(number: int, start: int, workers: int) -> list:
        stream = loader(workers).batches(start)
        found = [next(stream) for _ in range(number)]
        stream.close()
        return found

    whole, late = first(5, 0, 0), first(2, 3, workers)
    assert whole[0].images.shape == (4, 3, 4, 16, 16)
    assert whole[0].images.dtype == torch.uint8
    for ours, truth in zip(late, whole[3:], strict=True):
        assert torch.equal(ours.images, truth.images)
        assert torch.equal(ours.keys, truth.keys)
    assert not torch.equal(whole[0].images, whole[2].images)


def test_evaluation_gives_all_views_twice_the_same(folder: Path) -> None:
    data = open_data(folder, DataConfig(val_fraction=0)).train
    assert data is not None
    preprocess = replace(PREPROCESS, clips=2, crops=3)
    passes = [list(eval_batches(data, preprocess=preprocess, batch_size=3, workers=0)) for _ in range(2)]
    assert [len(batch.images) for batch in passes[0]] == [18, 18, 12]
    assert torch.equal(torch.cat([batch.targets for batch in passes[0]]), torch.from_numpy(data.targets))
    for fresh, kept in zip(*passes, strict=True):
        assert torch.equal(fresh.images, kept.images)
    assert torch.equal(passes[0][0].images[6:12], clips_for_eval(data.read(1), preprocess))


def test_broken_videos_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    data_of = (tmp_path / "broken" / NAMES[2]).read_bytes()
    (tmp_path / "broken" / NAMES[2]).write_bytes(data_of[: len(data_of) // 2])  # its table of frames lay at the end
    (tmp_path / "broken" / NAMES[5]).write_bytes(b"")
    data = open_data(tmp_path / "broken", DataConfig(val_fraction=0)).train
    assert data is not None
    batches = list(eval_batches(data, preprocess=PREPROCESS, batch_size=8, workers=0))
    assert sum(len(batch.targets) for batch in batches) == 6
    assert data.bad.summary().startswith("2 unreadable videos skipped (run/run-2.mp4: not a readable video")
    train = TrainLoader(data, preprocess=PREPROCESS, augment=AugmentConfig(), batch_size=8, workers=0)
    assert len(next(train.batches()).images) == 8
    refused = open_data(tmp_path / "broken", DataConfig(val_fraction=0, bad_files="refuse")).train
    assert refused is not None
    with pytest.raises(DataError, match="leave such videos out"):
        list(eval_batches(refused, preprocess=PREPROCESS, batch_size=8, workers=0))


def test_speed(folder: Path) -> None:
    data = open_data(folder, DataConfig(labels="speed", val_fraction=0.3))
    assert data.classes == ("1x", "2x", "4x")
    assert data.train is not None
    assert data.val is not None
    assert len(data.train) + len(data.val) == 24
    sides = [{part.names(index).split()[0] for index in range(len(part))} for part in (data.train, data.val)]
    assert not sides[0] & sides[1]
    by_name = {data.train.names(index): data.train.read(index) for index in range(len(data.train))}
    name = sorted(sides[0])[0]
    assert [by_name[f"{name} {speed}x"].speed for speed in (1, 2, 4)] == [1, 2, 4]
    slow, fast = (clips_for_eval(by_name[f"{name} {speed}x"], PREPROCESS)[0] for speed in (1, 4))
    assert not torch.equal(slow, fast)
    with pytest.raises(ConfigError, match="hides how fast"):
        next(eval_batches(data.val, preprocess=replace(PREPROCESS, sampling="uniform"), batch_size=2))
    with pytest.raises(DataError, match="needs a folder of videos"):
        open_data(folder / NAMES[0], DataConfig(labels="speed"))


def test_bytes_of_shards_need_no_file(folder: Path) -> None:
    data = (folder / NAMES[0]).read_bytes()
    assert torch.equal(clips_for_eval(Footage(data), PREPROCESS), clips_for_eval(Footage(str(folder / NAMES[0])), PREPROCESS))
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        archive.add(folder / NAMES[0], "a.mp4")
    assert np.frombuffer(shard.getvalue(), np.uint8).size > len(data)
