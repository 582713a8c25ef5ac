"""Learning without labels through the one loop: what it writes, that it is resumed exactly, and that it learns."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vitrail.checkpoints import load_model
from vitrail.checkpoints.pretext import load_pretext
from vitrail.config import AugmentConfig, ConfigError, DataConfig, OptimConfig, RunConfig
from vitrail.data import open_data
from vitrail.evaluation import evaluate
from vitrail.training.loop import Run, train
from vitrail.training.selfsupervision import without_label_settings
from vitrail.training.state import saved_checkpoints

Fit = Callable[..., Run]
Samples = list[tuple[Tensor, int]]


def files(run: Run) -> dict[str, Tensor]:
    own = {f"own.{name}": tensor for name, tensor in load_file(run.path / "pretext.safetensors").items()}
    return load_file(run.path / "model" / "model.safetensors") | own


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def learned(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.history if record["kind"] == "train"]


@pytest.fixture(scope="session")
def shapes() -> Samples:
    """64 pictures of one of eight colours each and a little noise: any patch tells all others."""
    draws = torch.Generator().manual_seed(0)
    colours = 200 * torch.randint(0, 2, (64, 3, 1, 1), generator=draws)
    noise = torch.randint(0, 16, (64, 3, 16, 16), generator=draws)
    return [((colour + extra).to(torch.uint8), 0) for colour, extra in zip(colours, noise, strict=True)]


@pytest.mark.parametrize(
    ("settings", "measure", "reached"),
    [
        ({"objective": "masked"}, "masked_accuracy", 0.6),
        ({"objective": "masked", "mask_target": "pixels"}, "explained", 0.6),
        ({"objective": "mae", "patch_norm": False}, "explained", 0.6),
    ],
)
def test_guesses_improve_within_seconds(
    fit: Fit, shapes: Samples, settings: dict[str, Any], measure: str, reached: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(shapes, steps=60, lr=5e-3, batch_size=32, eval_every=100.0, overrides={"depth": 2}, **settings)
    records = learned(run)
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert list(run.metrics) == [measure, "masked_loss"]
    assert run.metrics[measure] > reached
    shown = capsys.readouterr().out
    assert "classes  labels are not used" in shown
    assert f"--from {run.path}" in shown
    final = next(record for record in run.history if record["kind"] == "final")
    assert final[measure] == pytest.approx(run.metrics[measure], rel=1e-6)


@pytest.mark.parametrize("settings", [{"objective": "masked", "mask_target": "colours"}, {"objective": "mae"}])
def test_a_stopped_run_goes_on_to_the_same_bits(fit: Fit, tmp_path: Path, samples: Samples, settings: dict[str, Any]) -> None:
    overrides = {"depth": 1, "drop_path": 0.2, "dropout": 0.1}
    whole = fit(overrides=overrides, hflip=0.5, accumulate=2, save_every_steps=3, keep_last=9, **settings)
    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(saved_checkpoints(cut)[-1])
    (cut / "pretext.safetensors").unlink()
    resumed = train(resume=cut, data=samples)
    assert same(files(resumed), files(whole))
    assert resumed.metrics == whole.metrics
    assert not same(files(fit(seed=1, overrides=overrides, out=str(tmp_path / "other"), **settings)), files(whole))


def test_what_is_hidden_differs_between_steps_and_not_between_evaluations(fit: Fit) -> None:
    run = fit(objective="mae", lr=0.0, batch_size=64, steps=4, eval_every=1.0)
    judged = [record["masked_loss"] for record in run.history if record["kind"] == "eval"]
    assert len(judged) > 1
    assert len(set(judged)) == 1  # the weights stand still, and so does what is hidden
    assert len({record["loss"] for record in learned(run)}) == 4


def test_the_encoder_is_kept_and_goes_on_to_labels(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    run = fit(objective="mae")
    names = {path.name for path in run.path.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "metrics.csv", "checkpoints", "best", "model", "pretext.safetensors"}
    card = load_model(run.path).card
    assert card.classes == ()
    assert card.provenance[-1].startswith("pre-trained without labels (mae) by vitrail on")
    assert load_model(run.path).config.num_classes == 0
    with pytest.raises(ConfigError, match=r"answers no classes.*--from"):
        evaluate(run.model, samples, progress=False)
    tuned = fit(model="vit_micro_patch4_16", init_from=str(run.path), lr=0.0, out=str(tmp_path / "tuned"))
    before, after = files(run), load_file(tuned.path / "model" / "model.safetensors")
    assert after.pop("head.linear.weight").shape == (3, 32)
    after.pop("head.linear.bias")
    assert same(after, {name: before[name] for name in after})
    again = load_pretext(run.path, run.config, load_model(run.path), card.preprocess)
    assert same(again.own_state(), load_file(run.path / "pretext.safetensors"))


def test_pictures_without_labels(fit: Fit, tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 6)):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for i in range(count):
            colour = (9 * i, 5 * i + (split == "val"), 200 - 9 * i)
            Image.new("RGB", (18, 18), colour).save(tmp_path / "photos" / split / f"{i}.png")
    data = open_data(tmp_path / "photos", DataConfig(unlabelled=True))
    assert {name: len(part) for name, part in data.splits().items()} == {"train": 20, "val": 6}
    run = fit(str(tmp_path / "photos"), objective="masked", steps=2)
    assert run.config.data_config.unlabelled
    assert 0 <= run.metrics["masked_accuracy"] <= 1
    with pytest.raises(ConfigError, match="teach a classifier nothing"):
        fit(str(tmp_path / "photos"), unlabelled=True, out=str(tmp_path / "labelled"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet_micro", "overrides": {}}, r"families vit, deit; resnet_micro \(resnet\) has no patches"),
        ({"teacher": "x"}, "nothing to learn from a teacher"),
        ({"mixup": 0.2}, "uses no labels to mix"),
        ({"balance": "weights"}, "cannot be balanced"),
        ({"ema": 0.9}, "leave --ema out"),
        ({"lora_rank": 2}, "leave freeze, lora_rank and head out"),
        ({"progressive": (8,)}, "leave progressive out"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5; allowed: above 0, below 1"),
        ({"objective": "mea"}, "not one of classify, masked, mae .nearest: mae"),
    ],
)
def test_what_does_not_fit_is_refused(fit: Fit, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(**{"objective": "mae", **settings})
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_preset_chosen_for_labels_is_cut_to_what_needs_none() -> None:
    chosen = RunConfig(augment=AugmentConfig(mixup=0.2, cutmix=0.5), optim=OptimConfig(ema=0.999))
    kept = without_label_settings(chosen, frozenset({"cutmix"}))
    assert (kept.augment.mixup, kept.augment.cutmix, kept.optim.ema) == (
        0,
        0.5,
        0,
    )  # what was asked for is refused


def test_features_are_probed_with_labels_while_they_are_learned_without(fit: Fit) -> None:
    run = fit(objective="mae", steps=4, probe_shots=(2,))
    probed = [record["fewshot_2"] for record in run.history if record["kind"] == "probe"]
    assert probed
    assert all(0 <= value <= 1 for value in probed)
