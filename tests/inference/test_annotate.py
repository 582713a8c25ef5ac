"""Answers drawn into videos: the right one on every frame, at the frame's own time, in a file that appears when it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tests.data.videos import frames, write_video

from vitrail.config import ConfigError
from vitrail.inference import Prediction, annotate
from vitrail.inference.annotate import annotated, check_drawable, clock, draw_answer

TIMES = [0, 40, 50, 200, 210, 600, 640, 641, 700, 1500, 1520, 1560, 1600, 1700, 2500]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    write_video(root / "steady.avi", frames(50, (241, 321)), codec="mjpeg", bframes=0)  # 2 s, odd sides
    write_video(root / "variable.mkv", frames(len(TIMES), (24, 32)), times=TIMES)
    write_video(root / "dot.avi", frames(3)[:, :1, :1], codec="mpeg4", bframes=0)
    (root / "broken.mp4").write_bytes(b"nothing")
    return root


def answers(path: Path, *shares: float, length: float = 1.0) -> list[Prediction]:
    """One window after the other."""
    return [
        Prediction(str(path), "cat", share, (("cat", share),), ("cat",), start=at * length, end=(at + 1) * length)
        for at, share in enumerate(shares)
    ]


def read(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def bar(pixels: np.ndarray) -> float:
    """The filled share of the bar: amber pixels of the row in its middle, between the margins."""
    size = max(min(pixels.shape[:2]) // 18, 12)
    margin = max(size // 2, 4)
    row = pixels[pixels.shape[0] - margin - max(size // 8, 1) - 1].astype(int)
    return float(((row[:, 0] > 180) & (row[:, 2] < 120)).sum() / (pixels.shape[1] - 2 * margin))


def test_every_frame_shows_its_answer_at_its_time(videos: Path, tmp_path: Path) -> None:
    source, out = videos / "steady.avi", tmp_path / "out.mp4"
    given = answers(source, 0.25, 0.75)
    assert list(annotated(iter(given), out)) == given
    made = read(out)
    assert made[0][1].shape == (242, 322, 3)  # H.264 stores colour for two by two pixels
    np.testing.assert_allclose([time for time, _ in made], np.arange(50) / 25, atol=1e-4)
    for time, pixels in made:
        assert bar(pixels) == pytest.approx(0.25 if time < 1 else 0.75, abs=0.03), time
    original = np.stack([pixels for _, pixels in read(source)]).astype(int)
    drawn = np.stack([pixels for _, pixels in made])[:, :241, :321].astype(int)
    assert np.abs(drawn - original)[:, :200].mean() < 3  # above the panel nothing is changed
    assert list(tmp_path.iterdir()) == [out]


def test_overlapping_windows_share_the_time_between_their_middles(videos: Path, tmp_path: Path) -> None:
    """Windows of 1 s from 0 and 1 s from 0.6: their middles are 0.5 and 1.1, so the answer changes at 0.8 s."""
    one, other = answers(videos / "steady.avi", 0.2, 0.9)
    list(annotated([one, Prediction(**{**other.__dict__, "start": 0.6, "end": 1.6})], tmp_path / "o.mp4"))
    assert next(time for time, pixels in read(tmp_path / "o.mp4") if bar(pixels) > 0.5) == pytest.approx(0.8)


def test_a_folder_for_several_and_odd_footage(videos: Path, tmp_path: Path) -> None:
    """A variable rate keeps its times; frames of a pixel are enlarged; what cannot be read is passed on and draws nothing."""
    broken = Prediction(str(videos / "broken.mp4"), error="not a readable video")
    given = [*answers(videos / "variable.mkv", 0.5, 0.5, 0.5), broken, *answers(videos / "dot.avi", 0.5, length=0.12)]
    assert list(annotated(given, tmp_path / "all")) == given
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["dot.mp4", "variable.mp4"]
    np.testing.assert_allclose([time for time, _ in read(tmp_path / "all" / "variable.mp4")], np.array(TIMES) / 1000, atol=1e-4)
    assert len(read(tmp_path / "all" / "dot.mp4")) == 3
    assert min(read(tmp_path / "all" / "dot.mp4")[0][1].shape[:2]) == 240


def test_it_is_written_while_the_answers_come_and_taken_back_when_they_stop(videos: Path, tmp_path: Path) -> None:
    stopped = annotated(iter(answers(videos / "steady.avi", 0.5, 0.5)), tmp_path / "o.mp4")
    next(stopped), next(stopped)
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    stopped.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []

    def failing() -> Iterator[Prediction]:
        yield from answers(videos / "steady.avi", 0.5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(annotated(failing(), tmp_path / "o.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_targets_that_make_no_sense(videos: Path, tmp_path: Path) -> None:
    several = [*answers(videos / "steady.avi", 0.5), *answers(videos / "variable.mkv", 0.5)]
    with pytest.raises(ConfigError, match="one file, but there are several videos: name a folder"):
        list(annotated(several, tmp_path / "o.mp4"))
    with pytest.raises(ConfigError, match="several videos"):
        check_drawable([str(videos)], tmp_path / "o.mp4")
    check_drawable([str(videos)], tmp_path / "folder")
    check_drawable([str(videos / "steady.avi"), "-"], tmp_path / "o.mp4")
    with pytest.raises(ConfigError, match="a stream and cannot be read a second time"):
        check_drawable(["http://127.0.0.1/a.ts"], tmp_path / "folder")
    with pytest.raises(ConfigError, match="is the video itself"):
        list(annotated(several[1:], videos / "variable.mkv"))
    with pytest.raises(ConfigError, match=r"\.mp4, \.mov, \.mkv, or into a folder, not into \.gif"):
        list(annotated(several[:1], tmp_path / "o.gif"))
    assert len(read(videos / "variable.mkv")) == len(TIMES)


def test_without_h264(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotate, "encoder", lambda: "mpeg4")
    list(annotated(answers(videos / "steady.avi", 0.25, 0.75), tmp_path / "o.mp4"))
    made = read(tmp_path / "o.mp4")
    assert len(made) == 50
    assert (bar(made[0][1]), bar(made[-1][1])) == (pytest.approx(0.25, abs=0.03), pytest.approx(0.75, abs=0.03))


def test_text_never_leaves_the_picture() -> None:
    """Any label, however long or strange, on any picture."""
    for size in ((640, 360), (40, 30), (1, 1)):
        for label in ("a", "x" * 500, "line\nbreak\x1b[2J", "Größe Ω я", ""):
            draw_answer(Image.new("RGB", size), Prediction("v", label, 1.0, ((label, 1.0),), (label,)), 3.2)
    assert [clock(seconds) for seconds in (0.0, 3.236, 59.999, 3600.0)] == ["0:00.00", "0:03.24", "1:00.00", "1:00:00.00"]
