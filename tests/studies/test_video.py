"""The study of video models: real runs of a step or two, and its conclusion from made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail import cost
from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, replace_dotted
from vitrail.cost import Memory
from vitrail.data.embedded import motion
from vitrail.models import MODELS, build
from vitrail.studies.study import run_study
from vitrail.studies.video import CONTENDERS, KERNELS, Config, conclude, from_images, plan
from vitrail.training import plan as plan_of_a_run


def test_contenders_are_about_equally_large() -> None:
    (runs,) = plan(Config(data="motion"))
    assert list(runs.models) == list(CONTENDERS)
    for kind in runs.models.values():
        changes = {**kind["overrides"], "image_size": (32, 32), "frames": 8, "num_classes": 8}
        parameters = sum(p.numel() for p in build(replace_dotted(MODELS[kind["model"]], changes)).parameters())
        assert 40_000 < parameters < 300_000, kind["model"]
        assert kind["hflip"] == 0.0
    with pytest.raises(ConfigError, match="did you mean 'vivit'"):
        plan(Config(data="motion", contenders=("vivid",)))


def test_runs_are_judged_by_reversals_and_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "TRAIN_CLIPS", 64)
    monkeypatch.setattr(motion, "TEST_CLIPS", 16)
    memory = Memory(1, 2, 3, 4, 5 * 2**20)
    monkeypatch.setattr(plan_of_a_run, "forecast_memory", lambda *_, **__: memory)
    monkeypatch.setattr(plan_of_a_run, "matmul_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(cost, "forecast_memory", lambda *_, **__: memory)
    settings: dict[str, Any] = {"contenders": ("timesformer_space",), "seeds": (0,), "budget": 2e9, "batch_size": 8}
    findings, out = run_study("video", data="motion", out=str(tmp_path / "s"), **settings)
    assert "A motion and its reversal" in findings.sentences[0]
    (table,) = findings.tables
    ((name, *cells),) = table.rows
    assert (name, cells[3], cells[4], table.columns[-1]) == ("timesformer_space", "5", "1", "reversals")
    assert "MFLOPs a clip" in (out / "study.html").read_text()


def test_what_is_concluded() -> None:
    def row(model: str, seed: int, top1: float, reversals: float, mflops: float) -> dict[str, Any]:
        return {
            "model": model, "seed": seed, "top1": top1, "reversals": reversals, "mflops": mflops, "parameters": 60_000,
            "steps": 100, "milliseconds": 1.0, "mebibytes": 10.0,
        }  # fmt: skip

    rows = [row("blind", seed, 0.4 + seed / 100, 0.49 + seed / 100, 10.0) for seed in range(3)]
    rows += [row("seeing", seed, 0.9 + seed / 100, 0.98, 30.0) for seed in range(3)]
    findings = conclude(Config(data="motion"), rows)
    assert "seeing, top-1 91.0" in findings.answer
    assert "cheapest per clip: blind (10.0 MFLOPs)" in findings.answer
    assert findings.sentences[1] == "Not better than a coin beyond doubt by that measure: blind."
    plain = conclude(Config(data="clips/"), [{k: v for k, v in r.items() if k != "reversals"} for r in rows])
    assert plain.sentences == []
    assert plain.tables[0].columns[-1] == "seeds"


def test_starts_from_an_image_model_are_compared_with_random_weights(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motion, "TRAIN_CLIPS", 32)
    monkeypatch.setattr(motion, "TEST_CLIPS", 16)
    monkeypatch.setattr(plan_of_a_run, "forecast_memory", lambda *_, **__: Memory(1, 2, 3, 4, 5))
    monkeypatch.setattr(plan_of_a_run, "matmul_peak", lambda device, precision: 1e9)
    monkeypatch.setattr(cost, "forecast_memory", lambda *_, **__: Memory(1, 2, 3, 4, 5))
    settings: dict[str, Any] = {
        "contenders": ("vivit",), "starts": ("random", "central_frame", "average"), "seeds": (0,), "budget": 2e9,
        "batch_size": 8, "image_data": str(picture_folder), "image_budget": 3e8,
        "settings": {"frames": 2, "sampling": "uniform", "lr": 1e-9},
    }  # fmt: skip
    findings, out = run_study("video", data="motion", out=str(tmp_path / "s"), **settings)
    names = {row[0] for row in findings.tables[0].rows}
    assert names == {"vivit", *(f"vivit from {k}" for k in KERNELS[:2])}
    told = " ".join(findings.sentences)
    assert "vivit from average is" in told
    assert "than vivit from central_frame with one seed" in told
    assert "The image ViTs, one per seed" in told

    image = load_model(out / "image" / f"{picture_folder.name}-image-seed0", quiet=True).state_dict()
    runs = out / "from-image-seed0-clips"
    central, average = (load_model(runs / f"motion-vivit-{k}-seed0", quiet=True) for k in KERNELS[:2])
    kernel, block = image["embed.proj.weight"], "blocks.1.mlp.fc1.weight"  # all but untrained, at that learning rate
    torch.testing.assert_close(central.state_dict()["embed.proj.weight"][:, :, 1], kernel, atol=1e-5, rtol=0)
    torch.testing.assert_close(average.state_dict()["embed.proj.weight"][:, :, 0], kernel / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(central.state_dict()[block], image[block], atol=1e-5, rtol=0)
    assert central.config.activation == "gelu_tanh"

    both = Config(data="motion", contenders=("vivit", "timesformer", "x3d"), starts=("random", "central_frame", "average"))
    kinds = {tuple(runs.models): list(runs.variants) for _, runs in from_images(both, {0: ""})}
    assert kinds == {("vivit",): ["central_frame", "average"], ("timesformer",): ["central_frame"]}
    with pytest.raises(ConfigError, match="x3d cannot start from an image ViT"):
        from_images(Config(data="motion", contenders=("x3d",), starts=("average",)), {0: ""})
    with pytest.raises(ConfigError, match="did you mean 'average'"):
        plan(Config(data="motion", starts=("random", "averaged")))
