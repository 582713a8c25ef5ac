"""Videos as they really come: broken, empty, too short, tiny, turned, cut. Each is read, or counted and named."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.videos import decoded, frames, remux_from, write_video

from vitrail.config import AugmentConfig, ConfigError, DataConfig, Preprocess
from vitrail.data import DataError, TrainLoader, eval_batches, open_data
from vitrail.data.clips import clip_for_train, clips_for_eval
from vitrail.data.footage import Footage
from vitrail.data.images import ImageError, decode_image
from vitrail.data.video import Video, VideoError

PREPROCESS = Preprocess(image_size=(16, 16), frames=4, stride=2, interpolation="bilinear")
ALL = DataConfig(val_fraction=0)


def write_sound(path: Path) -> None:
    """A film file with a second of silence and nothing to see."""
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        note = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        note.sample_rate = 16000
        out.mux(sound.encode(note))
        out.mux(sound.encode(None))


def write_no_frames(path: Path) -> None:
    """A file that announces a video of 32 x 24 pixels and holds none of its frames."""
    options = {"movflags": "empty_moov+frag_keyframe"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        out.start_encoding()


def write_tiny(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width = stream.height = 1
        stream.pix_fmt = "yuv444p"
        for at in range(10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((1, 1, 3), 20 * at, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))


def half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


BROKEN = {
    "empty.mp4": "an empty file (0 bytes)",
    "text.mp4": "not a readable video",
    "cut.mp4": "not a readable video: cut short, the table of its frames is missing",
    "sound.mp4": "holds no video stream",
    "picture.mp4": "not a readable video: it is a PNG picture",
    "nothing.mp4": "holds no frames",
    "nothing.mkv": "not a readable video: it ends before its first frame",
}
FINE = ("plain.mp4", "short.mp4", "tail.ts", "tiny.mkv", "turned.mp4", "uneven.mp4", "edited.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: `odd` holds what can be read in spite of its oddity, `mixed` one sound video and all that cannot."""
    root = tmp_path_factory.mktemp("bad")
    odd, mixed = root / "odd", root / "mixed"
    odd.mkdir()
    mixed.mkdir()
    small = (24, 32)
    write_video(odd / "plain.mp4", frames(20, small))
    write_video(odd / "short.mp4", frames(2, small, 1))
    write_video(odd / "tail.ts", frames(40, small, 2), gop=5)
    half(odd / "tail.ts")
    write_tiny(odd / "tiny.mkv")
    write_video(odd / "turned.mp4", frames(20, small, 3), rotation=90)
    write_video(odd / "uneven.mp4", frames(8, small, 4), times=[0, 40, 50, 300, 310, 320, 900, 1500])
    write_video(root / "whole.mp4", frames(40, small, 5))
    remux_from(root / "whole.mp4", odd / "edited.mp4", 0.6, rotation=270)
    (root / "whole.mp4").unlink()
    write_video(mixed / "sound and picture.mp4", frames(20, small, 6), audio=True)
    (mixed / "empty.mp4").write_bytes(b"")
    (mixed / "text.mp4").write_text("once upon a time")
    write_video(mixed / "cut.mp4", frames(20, small, 7))
    half(mixed / "cut.mp4")
    write_sound(mixed / "sound.mp4")
    Image.fromarray(frames(1)[0]).save(mixed / "picture.mp4", format="PNG")
    write_no_frames(mixed / "nothing.mp4")
    write_no_frames(mixed / "nothing.mkv")
    return root


def test_reasons_name_what_is_wrong(folder: Path) -> None:
    for name, reason in BROKEN.items():
        for data in (str(folder / "mixed" / name), (folder / "mixed" / name).read_bytes()):
            with pytest.raises(VideoError) as problem:
                Video(data)
            assert str(problem.value).startswith(reason), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_which_half_is_broken(folder: Path, workers: int) -> None:
    """15 videos, 7 of them broken: evaluation judges the other 8, training shows each of them, both name the 7."""
    data = open_data(folder, ALL).train
    assert data is not None
    names = {data.names(index) for index in range(len(data))}
    assert len(names) == len(FINE) + 1 + len(BROKEN)
    batches = list(eval_batches(data, preprocess=PREPROCESS, batch_size=4, workers=workers))
    judged = {data.names(index) for batch in batches for index in batch.indices.tolist()}
    assert judged == {*(f"odd/{name}" for name in FINE), "mixed/sound and picture.mp4"}
    assert dict(data.bad).keys() == names - judged
    assert all(dict(data.bad)[f"mixed/{name}"].startswith(reason) for name, reason in BROKEN.items())
    assert data.bad.summary(limit=7).startswith("7 unreadable videos skipped (mixed/cut.mp4: not a readable video: cut short")

    again = open_data(folder, ALL).train
    assert again is not None
    loader = TrainLoader(again, preprocess=PREPROCESS, augment=AugmentConfig(), batch_size=5, workers=workers)
    stream = loader.batches()
    shown = {again.names(index) for _ in range(2 * loader.steps_per_epoch) for index in next(stream).indices.tolist()}
    stream.close()
    assert shown == judged
    assert dict(again.bad) == dict(data.bad)


def test_refused_as_asked(folder: Path) -> None:
    data = open_data(folder, DataConfig(val_fraction=0, bad_files="refuse")).train
    assert data is not None
    with pytest.raises(DataError, match=r"mixed/cut.mp4: not a readable video: cut short.*leave such videos out"):
        list(eval_batches(data, preprocess=PREPROCESS, batch_size=4, workers=0))
    loader = TrainLoader(data, preprocess=PREPROCESS, augment=AugmentConfig(), batch_size=15, workers=0)
    with pytest.raises(DataError, match=r"mixed/\w+\.mp4: .*leave such videos out"):
        next(loader.batches())


def test_nothing_but_broken_videos(folder: Path, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        shutil.copy(folder / "mixed" / "cut.mp4", tmp_path / label)
    data = open_data(tmp_path, ALL).train
    assert data is not None
    assert list(eval_batches(data, preprocess=PREPROCESS, batch_size=4, workers=0)) == []
    loader = TrainLoader(data, preprocess=PREPROCESS, augment=AugmentConfig(), batch_size=2, workers=0)
    with pytest.raises(DataError, match=r"too many unreadable videos in a row \(2 of 2\)"):
        next(loader.batches())


def test_parts_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    """They are known to be wrong when the table is opened; a part after the end of its video when the video is."""
    shutil.copy(folder / "odd" / "plain.mp4", tmp_path / "v.mp4")
    rows = [("0.2", "0.6"), ("", ""), ("0.6", "0.2"), ("0.4", "0.4"), ("-1", "0.5"), ("inf", ""), ("", "-3"), ("5", "9")]
    with open(tmp_path / "parts.csv", "w", newline="") as file:
        cells = (("v.mp4", "ab"[at % 2], *row) for at, row in enumerate(rows))
        csv.writer(file).writerows([("video", "label", "start", "end"), *cells])
    opened = open_data(tmp_path / "parts.csv", ALL)
    data = opened.train
    assert data is not None
    assert len(data) == 3
    assert dict(data.bad) == {
        "v.mp4@0.6-0.2": "the part ends at 0.2 s, but starts at 0.6 s",
        "v.mp4@0.4-0.4": "the part ends at 0.4 s, but starts at 0.4 s",
        "v.mp4@-1-0.5": "the part starts at -1 s; expected 0 or more",
        "v.mp4@inf": "the part starts at inf s; expected 0 or more",
        "v.mp4@0--3": "the part ends at -3 s, but starts at 0 s",
    }
    assert any(note.startswith("train: 5 unreadable videos skipped (v.mp4@-1") for note in opened.notes)
    (batch,) = eval_batches(data, preprocess=PREPROCESS, batch_size=8, workers=0)
    assert len(batch.targets) == 2
    assert dict(data.bad)["v.mp4@5-9"].startswith("no frame from 5.000 s to 9.000 s: the video is 0.800 s long")
    with pytest.raises(DataError, match=r"v.mp4@\S+: the part (starts|ends) at"):
        open_data(tmp_path / "parts.csv", DataConfig(val_fraction=0, bad_files="refuse"))


def test_short_videos_and_frames_of_one_pixel(folder: Path) -> None:
    """Two frames make a clip of four, in training too; one pixel fills the picture, and stays as bright as it was."""
    short, tiny = (Footage(str(folder / "odd" / name)) for name in ("short.mp4", "tiny.mkv"))
    clip = clips_for_eval(short, PREPROCESS)[0]
    assert not torch.equal(clip[:, 0], clip[:, 1])
    assert all(torch.equal(clip[:, 1], clip[:, at]) for at in (2, 3))
    assert torch.equal(clip, clip_for_train(short, PREPROCESS, AugmentConfig(crop="none"), torch.Generator().manual_seed(0)))
    for fit in ("crop", "pad", "stretch"):
        settings: dict[str, Any] = {"image_size": (16, 16), "frames": 4, "stride": 2, "fit": fit}
        assert clips_for_eval(tiny, Preprocess(**settings))[0, 0, :, 8, 8].tolist() == [40, 80, 120, 160]
    for seed in range(4):
        random = clip_for_train(tiny, PREPROCESS, AugmentConfig(), torch.Generator().manual_seed(seed))
        assert random.shape == (3, 4, 16, 16)
        assert all(len(random[:, at].unique()) == 1 for at in range(4))


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_edit_lists_and_rotation(rotation: int, tmp_path: Path) -> None:
    """A phone's clip, cut without encoding again: frames before the cut are there to decode from, and never shown.

    Every frame and its time, in any order, against a full decode by PyAV alone.
    """
    write_video(tmp_path / "whole.mp4", frames(60))
    remux_from(tmp_path / "whole.mp4", tmp_path / "edited.mp4", 0.4, rotation)
    with av.open(str(tmp_path / "edited.mp4")) as container:
        hidden = sum(packet.is_discard for packet in container.demux(video=0) if packet.size)
    assert hidden == 10
    expected = decoded(tmp_path / "edited.mp4")
    with Video(str(tmp_path / "edited.mp4")) as video:
        assert video.size == ((64, 48) if rotation % 180 else (48, 64))
        np.testing.assert_allclose(video.times, [time for time, _ in expected], atol=1e-9)
        for number in np.random.default_rng(0).integers(0, 50, 40).tolist():
            ((found, pixels),) = video.frames([number])
            assert found == number
            assert (pixels == np.rot90(expected[number][1], rotation // 90)).all(), number
        assert video.repaired == 0
    with Video(str(tmp_path / "whole.mp4")) as whole:
        ((_, pixels),) = whole.frames([10])
        assert (pixels == expected[0][1]).all()


def test_pictures_for_videos_and_videos_for_pictures(folder: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(frames(1)[0]).save(picture, format="JPEG")
    with pytest.raises(VideoError, match="it is a JPEG picture"):
        Video(picture.getvalue())
    for name in ("odd/plain.mp4", "odd/tail.ts", "odd/tiny.mkv"):
        with pytest.raises(ImageError, match="a video, not a picture"):
            decode_image(str(folder / name))
    with pytest.raises(ConfigError, match="takes pictures, but the samples of the data set are videos"):
        next(eval_batches(open_data(folder, ALL).train, preprocess=Preprocess(image_size=(16, 16)), batch_size=2))  # type: ignore[arg-type]
