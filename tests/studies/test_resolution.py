"""The study of picture and patch sizes: judged, resumed, concluded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.models import create_model
from vitrail.studies import resolution, run_study

CLASSES = ("blue", "green", "red")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16", depth=1, num_classes=3)
    card = ModelCard(classes=CLASSES, preprocess=Preprocess(image_size=(16, 16)))
    return save_model(model, tmp_path / "w.safetensors", card=card)


def test_sizes_are_judged_once(
    weights: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    words = ["study", "resolution", str(picture_folder), "--model", str(weights), "--sizes", "16,20", "--out", str(out)]
    assert main([*words, "--patches", "4,8"]) == 0
    said = capsys.readouterr().out
    assert "At its own size" in said
    assert "its answers" in said
    points = json.loads((out / resolution.POINTS).read_text())["rows"]
    assert {(p["size"], p["patch"]) for p in points} == {(16, 4), (20, 4), (16, 8)}  # 20 is no multiple of 8
    costs = {(p["size"], p["patch"]): p["flops_picture"] for p in points}
    assert costs[20, 4] > costs[16, 4] > costs[16, 8]
    assert (out / "resolution.png").stat().st_size > 10_000
    monkeypatch.setattr(resolution, "judge", None)  # nothing is judged again
    findings, _ = run_study("resolution", data=str(picture_folder), model=str(weights), sizes=(16,), patches=(4,), out=str(out))
    assert len(findings.numbers["points"]) == 3
    with pytest.raises(ConfigError, match="another --out"):
        run_study("resolution", data=str(picture_folder), model="other.pth", out=str(out))


def test_other_classes_are_judged_by_ridge(weights: Path, tmp_path: Path) -> None:
    asked = {"data": "digits", "model": str(weights), "out": str(tmp_path / "s")}
    config = resolution.Config(**asked)
    sizes, patches = resolution.plan(config, (16, 16), (4, 4))
    assert (sizes, patches) == ([8, 12, 16, 20, 24, 32], [4])
    with pytest.raises(ConfigError, match="no patches"):
        resolution.plan(resolution.Config(**asked, patches=(4,)), (16, 16), None)
    with pytest.raises(ConfigError, match="multiple of a patch"):
        resolution.plan(resolution.Config(**asked, patches=(5,), sizes=(16,)), (16, 16), (4, 4))
    with pytest.raises(ConfigError, match="no trained model"):
        run_study("resolution", data="digits", out=str(tmp_path / "n"))


def test_a_cheaper_point_about_as_good_is_named(picture_folder: Path) -> None:
    def row(size: int, top1: float) -> resolution.Row:
        return {"size": size, "patch": 16, "tokens": 4, "flops_picture": size**2 * 1e6, "own": size == 224, "top1": top1,
                "low": top1 - 0.02, "high": top1 + 0.02, "n": 400, "judged": "its answers"}  # fmt: skip

    findings = resolution.conclude(resolution.Config(data="x", model="m"), [row(112, 0.6), row(224, 0.805), row(288, 0.81)])
    assert findings.answer.startswith("Best: 81.0% at 288 x 288")
    assert "Within one point of it at 60% of the cost: 80.5% at 224 x 224" in findings.answer
    assert len(findings.charts[0].series) == 1
