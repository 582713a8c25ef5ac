"""`vitrail train`: flags over recipes and files, a whole small run, its report, and going on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vitrail import runs
from vitrail.cli import main
from vitrail.config import OptimConfig, RunConfig, dump, flat
from vitrail.models import create_model
from vitrail.recipes import RECIPES
from vitrail.training.loop import Run

QUICK = ("--steps", "3", "--batch-size", "8", "--workers", "0", "--precision", "fp32", "--device", "cpu", "--no-tensorboard")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, dict[str, Any]]]:
    """What the verb hands to training, in place of training."""
    calls: list[tuple[RunConfig, dict[str, Any]]] = []

    def train(config: RunConfig, **settings: Any) -> Run:
        calls.append((config, settings))
        return Run(Path("run"), create_model("vit_micro_patch4_16"), config, {}, [])

    monkeypatch.setattr(runs, "train", train)
    return calls


def test_flag_names_are_unique_over_all_sections() -> None:
    sections = [value for value in vars(RunConfig()).values() if hasattr(value, "__dataclass_fields__")]
    names = [name for section in sections for name in vars(section)]
    names += [name for name, value in vars(RunConfig()).items() if value not in sections]
    assert len(names) == len(set(names)) == len(flat(RunConfig()))


def test_only_what_was_given_is_handed_on(asked: list[tuple[RunConfig, dict[str, Any]]]) -> None:
    """Also a value that happens to be the default: a preset must leave it alone."""
    words = "photos --lr 0.001 --image-size 96x64 --no-report --nesterov --schedule linear --set depth=6 position.kind=2d"
    assert main(["train", *words.split()]) == 0
    config, settings = asked[0]
    assert config == RunConfig()
    assert settings == {
        "resume": False,
        "data": "photos",
        "lr": 0.001,
        "image_size": (96, 64),
        "report": False,
        "nesterov": True,
        "schedule": "linear",
        "overrides": {"depth": 6, "position.kind": "2d"},
    }


def test_a_teacher_is_handed_on(asked: list[tuple[RunConfig, dict[str, Any]]]) -> None:
    words = "photos --model deit_micro --teacher runs/tutor --distill soft --distill-temperature 3 --distill-weight 0.1"
    assert main(["train", *words.split()]) == 0
    assert asked[0][1] == {
        "resume": False, "data": "photos", "model": "deit_micro", "teacher": "runs/tutor", "distill": "soft",
        "distill_temperature": 3.0, "distill_weight": 0.1,
    }  # fmt: skip


def test_a_file_and_a_recipe_are_starting_points(asked: list[tuple[RunConfig, dict[str, Any]]], tmp_path: Path) -> None:
    stored = RunConfig(data="photos", overrides={"depth": 2}, compile=True, optim=OptimConfig(lr=5e-4))
    file = tmp_path / "settings.yaml"
    file.write_text(dump(stored))
    assert main(["train", "--config", str(file), "--no-compile", "--set", "heads=2", "--weight-decay=0.1"]) == 0
    assert asked[-1] == (
        stored,
        {"resume": False, "compile": False, "overrides": {"depth": 2, "heads": 2}, "weight_decay": 0.1},
    )
    file.write_text("data: photos\nlr: 1e-3\nimage_size: [32, 48]\nschedule: linear\noptim: {lr: 0.5, momentum: 0.8}\n")
    assert main(["train", "--config", str(file)]) == 0
    read = asked[-1][0]
    assert (read.optim.lr, read.optim.momentum, read.input.image_size) == (1e-3, 0.8, (32, 48))
    assert read.schedule.schedule == "linear"
    assert main(["train", "--recipe", "digits", "--seed", "3"]) == 0
    assert asked[-1] == (RECIPES["digits"](), {"resume": False, "seed": 3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe digit", "'digits'"),
        ("--recipe digits --config x.yaml", "give one of them"),
        ("--config missing.yaml", "missing.yaml: No such file"),
        ("", "no data was named"),
        ("digits --model vit_tiny_patch16_242", "'vit_tiny_patch16_224'"),
        ("digits --model vit_micro_patch4_16 --set deph=3", "'depth'"),
        ("digits --model vit_micro_patch4_16 --set position.knd=2d", "'kind'"),
        ("digits --model vit_micro_patch4_16 --image-size 18", "not divisible"),
        ("digits --device cuda:9", "this machine has"),
        ("--resume runs/a --out runs/b", "a run goes on where it is: --out runs/b is not --resume runs/a"),
        ("digits --epochs 0", "epochs is 0; it must be above 0"),
        ("digits --ema 1", "ema is 1; it must be at least 0 and below 1"),
        ("digits --label-smoothing 2", "label_smoothing is 2; it must be at least 0 and at most 1"),
        ("digits --lr nan", "lr is nan; it must be at least 0"),
        ("digits --model vit_micro_patch4_16 --image-size 0", "nearest valid: 4x4 (height"),
        ("digits --model vit_micro_patch4_16 --crops 3", "crops is a setting of videos"),
        (
            "motion --model vivit_micro --frames 4 --set frames=8",
            "frames is 4, but overrides (--set) say frames=8: set it by --frames alone",
        ),
        ("motion --model mvit_micro --from nothing --inflate average", "mvit_micro is neither"),
    ],
)
def test_what_cannot_be_done_is_said_plainly(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words.split()]) in (1, 2)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_a_run_from_start_to_report(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    begin = ("train", str(picture_folder), "--model", "vit_micro_patch4_16", "--set", "depth=1", "--out", str(out))
    assert main([*begin, *QUICK]) == 0
    said = capsys.readouterr().out
    assert "top-1 accuracy" in said
    assert str(out / "report.html") in said
    assert yaml.safe_load((out / "config.yaml").read_text())["overrides"] == {"depth": 1}

    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert "<html" in (out / "report.html").read_text()

    assert main([*begin, *QUICK]) == 2
    assert f"--resume {out}" in capsys.readouterr().err
    assert main(["train", "--resume", str(out)]) == 0
    assert main(["predict", str(out), str(picture_folder / "red")]) == 0
    assert main(["eval", str(out), str(picture_folder), "--workers", "0"]) == 0
