"""Which frames make a clip, and clips against a plain loop over decoded frames with torchvision's transforms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.videos import decoded, frames, write_video
from torchvision.transforms import InterpolationMode, v2

from vitrail.config import AugmentConfig, ConfigError, Preprocess
from vitrail.data.clips import check_clips, clip_for_train, clip_frames, clips_for_eval, frames_at
from vitrail.data.footage import Footage
from vitrail.data.images import ImageError
from vitrail.data.video import VideoError

TIMES = np.arange(50) / 25  # two seconds at a steady rate
DENSE = Preprocess(image_size=(32, 32), frames=8, interpolation="bilinear")


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(preprocess: Preprocess, times: np.ndarray = TIMES, end: float = 2.0, **settings: object) -> list[int]:
    return clip_frames(times, end, preprocess, **settings).tolist()  # type: ignore[arg-type]


def test_dense_clips_reach_both_ends() -> None:
    preprocess = replace(DENSE, stride=3)  # 22 frames from first to last: first frames 0 to 28
    assert numbers(preprocess, clip=0, clips=4) == list(range(0, 22, 3))
    assert numbers(preprocess, clip=3, clips=4) == list(range(28, 50, 3))
    assert numbers(preprocess) == list(range(14, 36, 3))
    starts = [numbers(preprocess, clip=k, clips=10)[0] for k in range(10)]
    assert starts == sorted(set(starts))
    seen = {numbers(preprocess, generator=draws(seed))[0] for seed in range(400)}
    assert seen == set(range(29))


def test_frames_per_second_are_times() -> None:
    """The same stretch of time, whatever the rate of the file."""
    preprocess = replace(DENSE, fps=5.0)
    for rate in (25, 30, 12.5):
        times = np.arange(int(4 * rate)) / rate
        for clip in range(3):
            chosen = times[numbers(preprocess, times, 4.0, clip=clip, clips=3)]
            begin = clip * (4 - 8 / 5) / 2
            wanted = begin + np.arange(8) / 5
            assert (chosen <= wanted + 1e-6).all()
            assert (wanted - chosen < 1 / rate).all()
    assert numbers(preprocess, clip=1, clips=2)[-1] == 45  # the frame on show a fifth of a second before the end


def test_variable_rate_takes_the_frame_on_show() -> None:
    times = np.array([0, 0.04, 0.05, 0.8, 0.9, 2.5])
    assert frames_at(times, np.array([0.0, 0.039, 0.04, 0.79, 0.85, 2.0, 9.0])).tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert numbers(replace(DENSE, frames=5, sampling="uniform"), times, 3.0) == [2, 4, 4, 4, 5]


def test_uniform_and_segment() -> None:
    uniform, segment = replace(DENSE, frames=5, sampling="uniform"), replace(DENSE, frames=5, sampling="segment")
    assert numbers(uniform) == numbers(segment) == [5, 15, 25, 35, 45]
    assert numbers(uniform, clip=0, clips=2) == [2, 12, 22, 32, 42]
    assert numbers(uniform, clip=1, clips=2) == [7, 17, 27, 37, 47]
    for seed in range(20):
        assert len(set(np.diff(numbers(uniform, generator=draws(seed))).tolist())) == 1
        places = numbers(segment, generator=draws(seed))
        assert [place // 10 for place in places] == [0, 1, 2, 3, 4]
    assert len({tuple(np.diff(numbers(segment, generator=draws(seed)))) for seed in range(20)}) > 10


def test_short_videos_repeat_the_last_frame() -> None:
    assert numbers(DENSE, TIMES[:3], 0.12) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert numbers(replace(DENSE, fps=25.0), TIMES[:3], 0.12, generator=draws(0)) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_speed_covers_more() -> None:
    assert np.diff(numbers(DENSE, speed=4.0)).tolist() == [4] * 7
    assert np.diff(numbers(replace(DENSE, fps=25.0), speed=2.0)).tolist() == [2] * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "stride must be 1 or more"),
        ({"clips": 0}, "clips must be"),
        ({"fps": -1.0}, "fps must be"),
        ({"fps": 5.0, "stride": 2}, "give one"),
        ({"sampling": "uniform", "stride": 2}, "have no meaning"),
        ({"crops": 3, "fit": "pad"}, "need fit crop"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_clips(replace(DENSE, **changes))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "wide.mp4"
    write_video(path, frames(40, (48, 80)))
    return path


def test_views_are_those_of_torchvision(video: Path) -> None:
    """3 clips x 3 crops of every frame resized to a shorter side of 40 and cut to 32, with nothing but torchvision."""
    preprocess = replace(DENSE, stride=2, clips=3, crops=3, crop_fraction=0.8)
    found = clips_for_eval(Footage(str(video)), preprocess)
    assert found.shape == (9, 3, 8, 32, 32)
    resize = v2.Resize(40, InterpolationMode.BILINEAR, antialias=True)
    whole = torch.from_numpy(np.stack([pixels for _, pixels in decoded(video)])).permute(0, 3, 1, 2)
    resized = resize(whole)
    assert resized.shape[2:] == (40, 66)
    for clip, start in enumerate([0, 12, 25]):
        for crop, left in enumerate([0, 17, 34]):
            truth = resized[start : start + 16 : 2, :, 4:36, left : left + 32].transpose(0, 1)
            assert torch.equal(found[3 * clip + crop], truth), (clip, crop)


def test_one_view_is_the_centre(video: Path) -> None:
    one = clips_for_eval(Footage(str(video)), DENSE)
    assert torch.equal(one[0], clips_for_eval(Footage(str(video)), replace(DENSE, crops=3))[1])


def test_training_clip_is_cut_alike_in_all_frames(video: Path) -> None:
    """A video of one still picture stays still."""
    augment = AugmentConfig(crop_scale=(0.2, 0.8))
    still = Footage(torch.from_numpy(frames(1, (48, 80))).permute(3, 0, 1, 2).expand(-1, 12, -1, -1))
    clip = clip_for_train(still, DENSE, augment, draws(1))
    assert all(torch.equal(clip[:, 0], clip[:, t]) for t in range(8))
    moving = Footage(str(video))
    again, other = (clip_for_train(moving, DENSE, augment, draws(seed)) for seed in (3, 4))
    assert torch.equal(again, clip_for_train(moving, DENSE, augment, draws(3)))
    assert not torch.equal(again, other)


def test_crop_none_is_the_evaluation_fit(video: Path) -> None:
    whole = replace(DENSE, frames=40)
    clip = clip_for_train(Footage(str(video)), whole, AugmentConfig(crop="none"), draws(0))
    assert torch.equal(clip, clips_for_eval(Footage(str(video)), whole)[0])


def test_parts_of_a_video(video: Path) -> None:
    part = clips_for_eval(Footage(str(video), 0.4, 0.8), replace(DENSE, frames=10))
    whole = clips_for_eval(Footage(str(video)), replace(DENSE, frames=40))
    assert torch.equal(part[0], whole[0, :, 10:20])
    with pytest.raises(VideoError, match=r"no frame from 5.000 s to the end: the video is 1.600 s long"):
        clips_for_eval(Footage(str(video), 5.0), DENSE)


def test_frame_folders_and_pixels_agree(tmp_path: Path) -> None:
    pixels = frames(12)
    for at, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{at}.png")
    paths = tuple(str(tmp_path / f"{at}.png") for at in range(12))
    folder, memory = Footage(paths, rate=10.0), Footage(torch.from_numpy(pixels).permute(3, 0, 1, 2), rate=10.0)
    for preprocess in (DENSE, replace(DENSE, fps=5.0, frames=4), replace(DENSE, channels=1)):
        assert torch.equal(clips_for_eval(folder, preprocess), clips_for_eval(memory, preprocess))
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(ImageError, match="empty file"):
        clips_for_eval(folder, DENSE)
