"""Corruptions do what they say, and the study of trained runs goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.data import open_data
from vitrail.models import create_model
from vitrail.studies import robustness
from vitrail.studies.corruptions import CORRUPTIONS, LEVELS, corrupt
from vitrail.studies.study import run_study


def smooth(n: int = 2, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Pictures of gentle waves."""
    wave = torch.linspace(0, 6.28, side).sin()
    field = wave[:, None] + wave[None].roll(5, 1)
    return ((field + 2) * 60 + 7).round().to(torch.uint8).expand(n, channels, side, side).contiguous()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_grows_with_its_level_and_repeats_itself(name: str) -> None:
    images = smooth()
    away = []
    for level in LEVELS:
        made = corrupt(images, name, level, first=3)
        assert made.shape == images.shape
        assert made.dtype == torch.uint8
        assert torch.equal(made, corrupt(images, name, level, first=3))
        away.append(float((made.float() - images.float()).abs().mean()))
    assert min(away) > 0
    assert name == "shuffle" or away[4] > max(away[2], 2 * away[0])  # tiles of gentle waves differ as much as their halves
    assert torch.equal(corrupt(images, name, 0), images)
    assert corrupt(smooth(1, 1), name, 3).shape == (1, 1, 32, 32)


def test_shuffling_moves_tiles_and_occlusion_covers_what_it_says() -> None:
    images = torch.arange(64, dtype=torch.uint8).repeat_interleave(4).view(1, 1, 16, 16)
    shuffled = corrupt(images, "shuffle", 3)
    assert torch.equal(shuffled.flatten().sort()[0], images.flatten().sort()[0])
    whole = {tuple(tile.flatten().tolist()) for tile in images[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).reshape(16, 4, 4)}
    assert {
        tuple(tile.flatten().tolist()) for tile in shuffled[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).reshape(16, 4, 4)
    } == whole
    white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    white[:, :, ::2] = 255
    covered = (corrupt(white, "occlusion", 5) == 128).all(1).float().mean()
    assert covered == pytest.approx(round(64 * 0.8) / 64)


def saved(path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = create_model("resnet_micro", num_classes=10, image_size=(16, 16), in_channels=1)
    card = ModelCard(name="resnet_micro", classes=tuple(map(str, range(10))))
    model.card = card.__class__(
        **{**vars(card), "preprocess": Preprocess(image_size=(16, 16), channels=1, mean=(0.5,), std=(0.5,))}
    )
    save_model(model, path, card=model.card)
    return str(path)


def test_runs_are_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (saved(tmp_path / "one" / "run", 0), saved(tmp_path / "two" / "run", 1))
    judged: list[tuple[str, int]] = []

    def judge(model: Any, dataset: Any, batch_size: int, name: str, level: int) -> dict[str, Any]:
        if len(judged) == 9 and not finishing:
            raise KeyboardInterrupt
        judged.append((name, level))
        return {"top1": 0.9 - 0.1 * level, "low": 0.0, "high": 1.0, "n": 100}

    finishing = False
    monkeypatch.setattr(robustness, "judge", judge)
    settings: dict[str, Any] = {
        "data": "digits", "runs": runs, "corruptions": ("noise", "shuffle"), "out": str(tmp_path / "study"),
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run_study("robustness", **settings)
    finishing = True
    findings, out = run_study("robustness", **settings)
    assert len(judged) == 2 * (1 + 2 * 5)  # two runs, clean and two corruptions: none twice
    assert findings.numbers["kept"]["run"]["noise"] == pytest.approx(0.6 / 0.9)
    assert set(findings.numbers["clean"]) == {"run", "two-run"}
    assert "Of shuffled patches:" in " ".join(findings.sentences)
    assert (out / "noise.png").is_file()
    assert (out / "study.html").read_text().count("data:image/png") == 3
    saved(tmp_path / "one" / "run", 5)  # other weights in the same place are judged again
    run_study("robustness", **settings)
    assert len(judged) == 3 * 11
    assert json.loads((out / "run.json").read_text())["asked"]["data"] == "digits"


def test_a_real_model_is_judged_on_real_pictures(tmp_path: Path) -> None:
    config = robustness.Config(data="digits", runs=(saved(tmp_path / "run", 0),))
    data = open_data("digits").test
    row = robustness.judge(load_model(config.runs[0], quiet=True), data, 64, "noise", 1)
    assert row["n"] == 1000
    assert row["low"] < row["top1"] < row["high"]
    for changes, problem in (
        ({"runs": ()}, "--runs names no trained model"),
        ({"corruptions": ("nois",)}, "did you mean 'noise'"),
        ({"runs": (str(tmp_path / "nothing"),)}, "holds no weights"),
    ):
        with pytest.raises(ConfigError, match=problem):
            robustness.measure(
                robustness.Config(**{"data": "digits", "runs": config.runs, "out": str(tmp_path / "o"), **changes})
            )
