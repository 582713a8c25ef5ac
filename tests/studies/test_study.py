"""The frame of every study: settings, resuming, the page and its files, and what a user is told."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitrail.cli import main
from vitrail.config import ConfigError, RunConfig
from vitrail.studies import grid
from vitrail.studies.statistics import Mean, difference, mean, verdict
from vitrail.studies.study import run_study, study

Score = Callable[[RunConfig], float]


class FakeTrainer:
    """Stands in for training: the accuracy is a function of the settings; it is "killed" at a chosen run."""

    def __init__(self, score: Score) -> None:
        self.score, self.trained, self.kill_at = score, [], 0

    def __call__(self, config: RunConfig, resume: bool = False, data: Any = None) -> Any:
        if self.kill_at and len(self.trained) + 1 == self.kill_at:
            raise KeyboardInterrupt
        self.trained.append(config)
        return SimpleNamespace(config=config, metrics={"top1": self.score(config), "nll": 1.0}, model=torch.nn.Linear(1, 1))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], FakeTrainer]:
    def install(score: Score) -> FakeTrainer:
        fake = FakeTrainer(score)
        monkeypatch.setattr(grid, "train", fake)
        monkeypatch.setattr(grid, "count_flops", lambda model: 1000)
        return fake

    return install


def pooled(config: RunConfig) -> float:
    """The mean likes a smaller learning rate; at each one's best they differ by one point, whatever the seed."""
    best = 3e-4 if config.overrides["pool"] == "mean" else 1e-3
    return 0.8 + (0.01 if best == 3e-4 else 0) - 0.1 * abs(math.log10(config.optim.lr / best)) + 0.001 * config.seed


def test_a_killed_study_goes_on_and_writes_its_page(trainer: Callable[[Score], FakeTrainer], tmp_path: Path) -> None:
    fake = trainer(pooled)
    fake.kill_at = 8
    settings: dict[str, Any] = {"data": "digits", "out": str(tmp_path / "s"), "budget": 1e8, "image_size": (16, 16)}
    with pytest.raises(KeyboardInterrupt):
        run_study("pooling", **settings)
    assert not (tmp_path / "s" / "study.html").exists()
    fake.kill_at = 0
    findings, out = run_study("pooling", **settings, command="vitrail study pooling digits")
    assert len(fake.trained) == 2 * 3 * 3  # seven before, eleven after: none twice
    assert len({(c.seed, c.optim.lr, c.overrides["pool"]) for c in fake.trained}) == 18
    assert findings.numbers["best_lr"] == {"class token": 1e-3, "mean": 3e-4}
    assert "the class token is 1.0 points worse than the mean" in findings.answer
    page = (out / "study.html").read_text()
    assert "the class token is 1.0 points worse than the mean" in page
    assert "vitrail study pooling digits" in page
    assert "<script" not in page
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert len(rows) == 18
    assert {row["pictures"] for row in rows} == {"4000"}  # a data set with a test split is trained on as a whole
    assert json.loads((out / "findings.json").read_text())["numbers"]["best_lr"]["mean"] == 3e-4
    assert (out / "pooling.png").read_bytes().startswith(b"\x89PNG")
    assert "#0102" not in (out / "pooling.svg").read_text()  # no placeholder of the page's colours
    with pytest.raises(ConfigError, match="was run with other settings"):
        run_study("pooling", **{**settings, "budget": 2e8})


def test_what_cannot_be_studied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "poolin", "digits"]) == 2
    assert "'pooling'" in capsys.readouterr().err
    assert main(["study", "pooling"]) == 2
    assert "no data was named" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="seeds is empty"):
        run_study("pooling", replace(study("pooling").Config(), data="digits", seeds=()))
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        run_study("pooling", data="digits", budgets=1)


def test_means_say_how_few_they_are() -> None:
    three = mean([0.7, 0.8, 0.9])
    assert (three.value, three.n) == (pytest.approx(0.8), 3)
    assert three.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert math.isnan(mean([0.5]).low)
    rows = [{"seed": seed, "top1": 0.5 + 0.1 * seed} for seed in range(3)]
    better = [{"seed": seed, "top1": 0.52 + 0.1 * seed + 0.001 * seed} for seed in (2, 1, 0)]
    gap = difference(better, rows)
    assert gap.low < 0.021 < gap.high
    assert "b is 2.1 points better than a" in verdict(gap, "b", "a")
    assert "no difference" in verdict(Mean(0.01, -0.02, 0.04, 3), "b", "a")
    assert "one seed" in verdict(mean([0.02]), "b", "a")
