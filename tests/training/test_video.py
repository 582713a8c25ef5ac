"""Clips through training, resuming and evaluation, with a small model that looks at time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.clipnet import ClipConfig, ClipNet
from tests.data.videos import frames, write_video

from vitrail import models
from vitrail.checkpoints import load_model
from vitrail.config import AugmentConfig, ConfigError, DataConfig, Preprocess, RunConfig
from vitrail.data import Data, open_data, pack_data
from vitrail.data.clips import average_views
from vitrail.data.embedded import motion
from vitrail.evaluation.classify import evaluate, predict_dataset
from vitrail.inspection.report import write_report
from vitrail.training.loop import Run
from vitrail.training.setup import why_not_to_mirror
from vitrail.training.state import saved_checkpoints

Fit = Callable[..., Run]
SETTINGS: dict[str, Any] = {
    "model": "clip_micro", "overrides": {}, "image_size": (16, 16), "batch_size": 8, "steps": 4, "crop": "random", "lr": 0.01,
}  # fmt: skip


@pytest.fixture
def fit_clips(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """`fit` with the model above among the families."""
    family = SimpleNamespace(CONFIG=ClipConfig, MODEL=ClipNet, VARIANTS={"clip_micro": ClipConfig()})
    monkeypatch.setitem(models.FAMILIES, "clip", family)  # type: ignore[arg-type]
    monkeypatch.setitem(models.MODELS, "clip_micro", ClipConfig())
    return lambda data, **settings: fit(data, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training-videos")
    for seed in range(12):
        name = root / ("odd" if seed % 2 else "even") / f"{seed}.mp4"
        name.parent.mkdir(exist_ok=True)
        write_video(name, frames(14, (24, 32), seed))
    return root


def test_a_run_on_videos(fit_clips: Fit, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that decides how clips are cut travels with the weights, and evaluation from the file agrees with the run."""
    run = fit_clips(folder, stride=2, clips=2, crops=3, randaugment_ops=1, cutmix=1.0, mixup=0.2)
    assert "clips of 4 frames, dense (every 2.); 2 x 3 views" in capsys.readouterr().out
    model = load_model(run.path / "model")
    p = model.card.preprocess
    assert (p.frames, p.stride, p.fps, p.sampling, p.clips, p.crops) == (4, 2, 0.0, "dense", 2, 3)
    report = evaluate(model, folder, split="val", progress=False)
    assert report.metrics["nll"] == pytest.approx(run.metrics["nll"], abs=1e-5)
    page = write_report(run.path, model=run.model, report=run.report).read_text(encoding="utf-8")
    assert "of the videos named rightly" in page
    assert "A model of the family clip has no attention, so there are no maps to show." in page
    single = evaluate(model, folder, split="val", clips=1, crops=1, progress=False)
    assert single.outputs is not None
    assert report.outputs is not None
    assert not torch.allclose(single.outputs.logits, report.outputs.logits)


def test_resuming_is_exact(fit_clips: Fit, folder: Path) -> None:
    """The second half of a run, made again from the checkpoint in its middle, ends with the same weights."""
    settings = {"steps": 6, "save_every_steps": 3, "keep_last": 5, "randaugment_ops": 1, "mixup": 0.3, "erasing": 0.5}
    whole = fit_clips(folder, **settings)
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    middle, *later = saved_checkpoints(whole.path)
    assert middle.name.endswith("3")
    for path in later:
        shutil.rmtree(path)
    again = fit_clips(folder, **settings, resume=True)
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_packed_copy_trains_alike(fit_clips: Fit, folder: Path, tmp_path: Path) -> None:
    """The same losses step by step, over more than an epoch, from the files and from their decoded frames."""
    pack_data(open_data(folder, DataConfig(val_fraction=0)), tmp_path / "packed", exact=True, progress=False)
    settings = {"val_fraction": 0.0, "randaugment_ops": 1, "mixup": 0.2}
    runs = [fit_clips(data, out=str(tmp_path / data.name), **settings) for data in (folder, tmp_path / "packed")]
    losses = [[record["loss"] for record in run.history if "loss" in record] for run in runs]
    assert losses[0]
    assert losses[0] == losses[1]
    weights = [run.model.state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_on_motion(fit_clips: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "TRAIN_CLIPS", 64)
    monkeypatch.setattr(motion, "TEST_CLIPS", 8)
    run = fit_clips("motion", steps=1, frames=8, sampling="uniform")
    assert run.model.card.classes == motion.MOTIONS
    assert run.model.card.preprocess.frames == run.model.config.frames == 8
    assert run.model.card.preprocess.sampling == "uniform"


def test_what_names_a_side_is_not_mirrored_unless_asked_for() -> None:
    sided, plain = (Data(None, None, None, names, False, "x") for names in (motion.MOTIONS, ("lefty", "cat")))
    assert "the class 'left' names a side" in why_not_to_mirror(RunConfig(), frozenset(), sided)
    assert not why_not_to_mirror(RunConfig(), frozenset({"hflip"}), sided)
    assert not why_not_to_mirror(replace(RunConfig(), augment=AugmentConfig(hflip=0.0)), frozenset(), sided)
    assert not why_not_to_mirror(RunConfig(), frozenset(), plain)


def test_frames_of_a_model_of_pictures(fit: Fit) -> None:
    with pytest.raises(ConfigError, match="vit_micro_patch4_16 takes pictures, so frames 8"):
        fit(frames=8, overrides={})
    with pytest.raises(ConfigError, match="the model takes pictures, but the samples of the data set are videos"):
        fit("motion", overrides={})


def test_views_are_averaged_as_probabilities() -> None:
    logits = torch.randn(6, 5) * 3
    softmax = average_views(logits, 3, multi_label=False).softmax(1)
    torch.testing.assert_close(softmax, logits.softmax(1).view(2, 3, 5).mean(1))
    sigmoid = average_views(logits, 3, multi_label=True).sigmoid()
    torch.testing.assert_close(sigmoid, logits.sigmoid().view(2, 3, 5).mean(1))
    assert average_views(logits, 1, multi_label=False) is logits


def test_views_do_not_depend_on_the_batch(folder: Path) -> None:
    """12 views of every video in batches smaller than that, and all at once."""
    data = open_data(folder, DataConfig(val_fraction=0)).train
    assert data is not None
    model = ClipNet(ClipConfig(image_size=(16, 16), num_classes=2))
    preprocess = Preprocess(image_size=(16, 16), frames=4, clips=4, crops=3)
    small, large = (predict_dataset(model, data, preprocess, batch_size=size) for size in (5, 200))
    assert len(small.logits) == len(data)
    torch.testing.assert_close(small.logits, large.logits, atol=1e-6, rtol=1e-5)
    assert math.isclose(float(small.logits.softmax(1)[0].sum()), 1, abs_tol=1e-5)


def test_pictures_have_one_view(fit: Fit, samples: list) -> None:
    run = fit()
    with pytest.raises(ConfigError, match="clips are views of videos; this model takes pictures"):
        evaluate(run.model, samples, clips=4, progress=False)
