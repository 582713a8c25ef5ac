"""The comparison of families: who is trained how, who teaches whom, what it costs, and what the page says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitrail.checkpoints import save_model
from vitrail.config import ConfigError, ModelCard, Preprocess, RunConfig, replace_dotted, replace_flat
from vitrail.cost import count_flops, count_parameters
from vitrail.models import MODELS, ShapesOnly, build, create_model
from vitrail.recipes import RECIPES
from vitrail.studies import grid
from vitrail.studies.families import Config, contenders
from vitrail.studies.study import run_study

TOP1 = {"vit": 0.6, "hybrid": 0.7, "swin": 0.65, "cvt": 0.8, "deit_hard": 0.62, "deit_soft": 0.58, "resnet": 0.8}


def test_the_resnet_of_the_same_seed_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[RunConfig] = []

    def train(config: RunConfig, resume: bool = False) -> Any:
        trained.append(config)
        name = Path(config.out).name.split("-")[1]
        metrics = {"top1": TOP1[name] + 0.01 * config.seed}
        return SimpleNamespace(config=config, metrics=metrics, model=torch.nn.Linear(1, 1))

    monkeypatch.setattr(grid, "train", train)
    monkeypatch.setattr(grid, "count_flops", lambda model: 1000)
    monkeypatch.setattr(grid, "_teacher_flops", lambda config: 500 if config.distillation.teacher else 0)
    out = tmp_path / "s"
    settings = {"hflip": 0.0}
    findings, _ = run_study("families", data="digits", out=str(out), budget=1e7, seeds=(0, 1), settings=settings)
    names = {(Path(config.out).name, config.seed): config for config in trained}
    assert len(names) == 14
    for seed in (0, 1):
        for kind in ("hard", "soft"):
            taught = names[f"digits-deit_{kind}-seed{seed}", seed]
            assert taught.distillation.teacher == str(out / "alone" / f"digits-resnet-seed{seed}")
            assert taught.distillation.distill == kind
            assert taught.schedule.steps < names[f"digits-vit-seed{seed}", seed].schedule.steps  # its teacher answers too
        assert not names[f"digits-swin-seed{seed}", seed].distillation.teacher
    assert {config.augment.hflip for config in trained} == {0.0}
    assert {config.augment.affine_degrees for config in trained} == {10.0}
    assert findings.numbers["gap_closed"]["cvt"] == pytest.approx(1.0)
    assert findings.numbers["gap_closed"]["swin"] == pytest.approx(0.25)
    assert "the ResNet is 20.0 points better than the ViT" in findings.answer
    assert "cvt 100%, hybrid 50%, swin 25%, deit_hard 10%, deit_soft -10%" in findings.answer
    assert any(line.startswith("deit_soft (a teacher's probabilities): it is 2.0 points worse") for line in findings.sentences)
    page = (out / "study.html").read_text()
    assert "cvt 100%" in page


def test_a_teachers_answers_are_paid_for(tmp_path: Path) -> None:
    tutor = create_model("resnet_micro", num_classes=10)
    tutor.card = ModelCard(classes=tuple("0123456789"), preprocess=Preprocess((20, 20)))
    save_model(tutor, tmp_path / "tutor")
    alone = replace_flat(RunConfig(), {"model": "deit_micro", "image_size": 20, "batch_size": 8})
    taught = replace_flat(alone, {"teacher": str(tmp_path / "tutor")})
    costs = [grid.steps_within(0, config, "digits")[1] for config in (alone, taught)]
    assert costs[1] - costs[0] == 8 * count_flops(tutor, (3, 20, 20))
    stored = replace_flat(taught, {"teacher_cache": str(tmp_path)})
    assert grid.steps_within(0, stored, "digits")[1] == costs[0]


def test_contenders_are_about_equally_large() -> None:
    for name, recipe in contenders(Config()).items():
        with ShapesOnly():
            model = build(replace_dotted(MODELS[recipe.model], {**recipe.overrides, "image_size": [48, 48], "num_classes": 10}))
        assert 180_000 < count_parameters(model) < 260_000, name


def test_who_cannot_take_part() -> None:
    assert list(contenders(Config(contenders=("bit",)))) == ["resnet", "vit", "bit"]
    with pytest.raises(ConfigError, match="did you mean 'swin'"):
        contenders(Config(contenders=("swim",)))
    with pytest.raises(ConfigError, match="for digits alone"):
        contenders(Config(contenders=("digits",)))
    assert set(TOP1) < set(RECIPES)
