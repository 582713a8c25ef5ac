"""The study of video models: real runs of a step or two, and its conclusion from made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vitrail import cost
from vitrail.config import ConfigError, replace_dotted
from vitrail.cost import Memory
from vitrail.data.embedded import motion
from vitrail.models import MODELS, build
from vitrail.studies.study import run_study
from vitrail.studies.video import CONTENDERS, Config, conclude, plan
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
    assert findings.sentences[1] == "No better than a coin by that measure: blind."
    plain = conclude(Config(data="clips/"), [{k: v for k, v in r.items() if k != "reversals"} for r in rows])
    assert plain.sentences == []
    assert plain.tables[0].columns[-1] == "seeds"
