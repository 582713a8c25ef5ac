"""Videos asked: whole, in views and in windows, with the preprocessing that travels with the model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.clipnet import ClipConfig, ClipNet
from tests.data.videos import frames, write_video

from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.data import video as video_module
from vitrail.data.clips import clips_for_eval
from vitrail.data.footage import Footage
from vitrail.data.windows import window_starts, windows_for_eval
from vitrail.inference import Predictor, write_predictions

PREPROCESS = Preprocess(image_size=(16, 16), frames=4, stride=2, interpolation="bilinear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("asked")
    for seed, number in enumerate((20, 55, 30)):
        write_video(root / f"{seed}.mp4", frames(number, (24, 32), seed))
    (root / "broken.mp4").write_bytes(b"nothing")
    (root / "notes.txt").write_text("no video")
    return root


def predictor(preprocess: Preprocess = PREPROCESS, **settings: Any) -> Predictor:
    torch.manual_seed(0)
    model = ClipNet(ClipConfig(image_size=(16, 16), num_classes=3))
    model.card = ModelCard(classes=("a", "b", "c"), preprocess=preprocess)
    return Predictor(model, device="cpu", precision="fp32", **settings)


def test_a_folder_of_videos(folder: Path) -> None:
    ask = predictor(clips=2, crops=3)
    answers = ask(folder)
    assert [Path(answer.path).name for answer in answers] == ["0.mp4", "1.mp4", "2.mp4", "broken.mp4"]
    assert "not a readable video" in answers[3].error
    views = clips_for_eval(Footage(str(folder / "1.mp4")), replace(PREPROCESS, clips=2, crops=3))
    expected = ask.engine(views).softmax(1).mean(0)
    assert dict(answers[1].top) == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)), abs=1e-6)
    small = predictor(clips=2, crops=3, batch_size=4)(folder)
    assert [dict(answer.top) for answer in small[:3]] == [pytest.approx(dict(answer.top), abs=1e-6) for answer in answers[:3]]


def test_folders_of_frames(folder: Path, tmp_path: Path) -> None:
    """A folder of pictures is a clip where there are no videos, its frames in the order of their numbers."""
    pixels = frames(12, (24, 32), 0)
    for name in ("one", "two"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number, frame in enumerate(pixels):
            Image.fromarray(frame).save(tmp_path / "clips" / name / f"f{number}.png")
    ask = predictor()
    found = ask(tmp_path / "clips")
    assert [Path(answer.path).name for answer in found] == ["one", "two"]
    assert found[0].top == found[1].top == ask(tmp_path / "clips" / "one")[0].top
    assert dict(found[0].top) == pytest.approx(dict(ask(pixels)[0].top), abs=1e-6)
    assert [answer.start for answer in predictor(window=0.2)(tmp_path / "clips" / "one")][:2] == [0.0, 0.2]


def test_videos_in_memory(folder: Path) -> None:
    pixels = frames(20, (24, 32), 0)
    ask = predictor()
    path, data, array, tensor = ask([
        folder / "0.mp4", (folder / "0.mp4").read_bytes(), pixels, torch.from_numpy(pixels).permute(3, 0, 1, 2)
    ])  # fmt: skip
    assert path.top == data.top
    assert (array.path, array.top) == ("#2", tensor.top)
    assert "expected a video" in ask([np.zeros((4, 4, 3), np.uint8)])[0].error


def test_windows(folder: Path) -> None:
    """55 frames at 25 a second: windows of 0.8 s every half second, and the one that ends with the video."""
    ask = predictor(window=0.8, every=0.5, batch_size=2)
    answers = ask(folder / "1.mp4")
    assert [(answer.start, answer.end) for answer in answers] == [
        pytest.approx(times) for times in ((0.0, 0.8), (0.5, 1.3), (1.0, 1.8), (1.4, 2.2))
    ]
    for answer in answers:
        part = clips_for_eval(Footage(str(folder / "1.mp4"), answer.start or 0.0, answer.end), PREPROCESS)
        expected = ask.engine(part).softmax(1)[0]
        assert dict(answer.top) == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)), abs=1e-6)
    assert [answer.start for answer in predictor(window=9.0)(folder / "0.mp4")] == [0.0]
    assert "not a readable video" in predictor(window=1.0)([folder / "broken.mp4", folder / "0.mp4"])[0].error


def test_window_starts_reach_the_end() -> None:
    assert window_starts(10.0, 2.0, 2.0) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert window_starts(10.5, 2.0, 4.0) == [0.0, 4.0, 8.0, 8.5]
    assert window_starts(1.0, 2.0, 1.0) == [0.0]


def test_windows_decode_every_frame_once_and_hold_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    plain = video_module.Video.frames

    def counted(self: Any, wanted: Any) -> Any:
        for number, pixels in plain(self, wanted):
            decoded.append(number)
            yield number, pixels

    monkeypatch.setattr(video_module.Video, "frames", counted)
    dense = replace(PREPROCESS, stride=1, frames=8)
    parts = list(windows_for_eval(Footage(str(folder / "1.mp4")), dense, window=0.32, every=0.16))
    assert len(parts) == 13
    assert decoded == sorted(set(decoded))


def test_text_with_times(folder: Path) -> None:
    answers = predictor(window=1.0)([folder / "1.mp4", folder / "broken.mp4"])
    lines, cells, table = io.StringIO(), io.StringIO(), io.StringIO()
    assert write_predictions(answers, "jsonl", lines, times=True) == (3, 1)
    write_predictions(answers, "csv", cells, times=True)
    write_predictions(answers, "table", table)
    first = json.loads(lines.getvalue().splitlines()[0])
    assert (first["start"], first["end"]) == (0.0, 1.0)
    assert cells.getvalue().splitlines()[0].endswith("error,start,end")
    assert cells.getvalue().splitlines()[2].endswith("1.000,2.000")
    assert "0.00 to 1.00 s" in table.getvalue()
    whole = io.StringIO()
    write_predictions(predictor()(folder / "1.mp4"), "jsonl", whole)
    assert "start" not in json.loads(whole.getvalue())


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="every needs a window"):
        predictor(every=1.0)
    pictures = replace(PREPROCESS, frames=0)
    with pytest.raises(ConfigError, match="this model takes pictures"):
        predictor(pictures, window=1.0)
