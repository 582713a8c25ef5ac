from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.checkpoints import save_model
from vitrail.config import ConfigError, DataConfig, ModelCard, Preprocess, RunConfig, dump
from vitrail.data import open_data
from vitrail.evaluation import evaluate, predict_dataset
from vitrail.models import Model, create_model

CLASSES = ("blue", "green", "red")
PIXELS = Preprocess(image_size=(16, 16), fit="stretch")


def model_for(classes: tuple[str, ...] = CLASSES, name: str = "vit_micro_patch4_16", multi_label: bool = False) -> Model:
    torch.manual_seed(0)
    model = create_model(name, num_classes=len(classes))
    torch.nn.init.normal_(model.head.linear.weight)
    model.card = ModelCard(classes=classes, multi_label=multi_label, preprocess=PIXELS)
    return model


@pytest.fixture
def with_broken(tmp_path: Path, picture_folder: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(picture_folder, root)
    (root / "red" / "red-05x.png").write_bytes((root / "red" / "red-05.png").read_bytes()[:100])
    return root


@pytest.mark.parametrize("name", ["vit_micro_patch4_16", "resnet_micro"])
def test_scores_are_the_models_own_in_the_order_of_the_set(picture_folder: Path, name: str) -> None:
    model = model_for(name=name).train()
    dataset = open_data(picture_folder).train
    assert dataset is not None
    outputs = predict_dataset(model, dataset, PIXELS, batch_size=7)
    assert model.training
    assert outputs.indices.tolist() == list(range(len(dataset)))
    assert outputs.targets.tolist() == dataset.targets.tolist()
    model.eval()
    for i in (0, 9, len(dataset) - 1):
        pixels = np.asarray(Image.open(dataset.read(i)))
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        fitted = torch.nn.functional.interpolate(picture, (16, 16), mode="bicubic", antialias=True)
        with torch.no_grad():
            expected = model((fitted / 255 - 0.5) / 0.5)[0]
        assert torch.allclose(outputs.logits[i], expected, atol=1e-4)


def test_batches_and_processes_do_not_change_the_scores(picture_folder: Path) -> None:
    model, dataset = model_for(), open_data(picture_folder).train
    assert dataset is not None
    whole = predict_dataset(model, dataset, PIXELS, batch_size=64)
    small = predict_dataset(model, dataset, PIXELS, batch_size=5)
    assert torch.allclose(whole.logits, small.logits, atol=1e-5)
    parts = [predict_dataset(model, dataset, PIXELS, batch_size=5, rank=rank, world=3) for rank in range(3)]
    logits, targets, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    order = indices.argsort()
    assert indices[order].tolist() == list(range(len(dataset)))
    assert torch.equal(targets[order], whole.targets)
    assert torch.allclose(logits[order], whole.logits, atol=1e-5)


def test_more_processes_than_samples() -> None:
    pictures = [(np.full((16, 16, 3), 40 * i, np.uint8), "ab"[i % 2]) for i in range(4)]
    dataset = open_data(pictures).train
    assert dataset is not None
    idle = predict_dataset(model_for(("a", "b")), dataset, PIXELS, rank=7, world=8)
    assert idle.logits.shape == (0, 2)
    assert len(idle.targets) == len(idle.indices) == 0


def test_bf16_is_close(picture_folder: Path) -> None:
    model, dataset = model_for(), open_data(picture_folder).train
    assert dataset is not None
    exact, fast = (predict_dataset(model, dataset, PIXELS, precision=p).logits for p in ("fp32", "bf16"))
    assert fast.dtype == torch.float32
    assert not torch.equal(exact, fast)
    assert (exact - fast).abs().max() < 0.05 * exact.abs().max()


def test_evaluate_a_checkpoint_on_a_folder(picture_folder: Path, tmp_path: Path) -> None:
    model = model_for()
    save_model(model, tmp_path / "model")
    report = evaluate(tmp_path / "model", picture_folder, device="cpu", split="val", val_fraction=0.5, progress=False)
    same = evaluate(model, str(picture_folder), device="cpu", val_fraction=0.5, progress=False)
    assert report.metrics == same.metrics
    assert report.classes == CLASSES
    assert report.split == same.split == "val"
    assert report.outputs is not None
    n = len(report.outputs.targets)
    assert report.metrics["n"] == n == report.confusion.sum()
    assert report.metrics["top1"] == pytest.approx(np.trace(report.confusion) / n)


def test_all_samples_are_judged_but_those_a_run_was_trained_on(picture_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_model(model_for(), run / "model")
    (run / "metrics.jsonl").touch()
    asked = RunConfig(data=str(picture_folder), data_config=DataConfig(val_fraction=0.5))
    (run / "config.yaml").write_text(dump(asked))
    number = sum(1 for _ in picture_folder.rglob("*.png"))
    held = evaluate(run, picture_folder, device="cpu", progress=False)  # the half that training held out
    assert held.split == "val"
    assert held.metrics["n"] == len(open_data(picture_folder, asked.data_config).val) < number
    assert any("held out for validation" in note for note in held.notes)
    shutil.copytree(picture_folder, tmp_path / "new")
    for model, data in ((run, tmp_path / "new"), (model_for(), picture_folder)):
        whole = evaluate(model, data, device="cpu", progress=False)
        assert (whole.split, whole.metrics["n"]) == ("all", number)
        assert not whole.notes
    seen = model_for()
    seen.card = replace(seen.card, provenance=(f"trained by vitrail on {picture_folder.name}, seed 0",))
    assert evaluate(seen, picture_folder, device="cpu", progress=False).split == "val"  # as the card tells
    link = tmp_path / "link"
    link.symlink_to(picture_folder)
    assert evaluate(run, link, device="cpu", progress=False).metrics == held.metrics
    assert evaluate(run, tmp_path / "new", split="val", device="cpu", progress=False).metrics["n"] < number


def test_unreadable_pictures_are_counted_and_named_or_refused(with_broken: Path) -> None:
    report = evaluate(model_for(), with_broken, device="cpu", split="train", progress=False)
    assert report.notes[-1].startswith("1 unreadable picture")
    assert "red-05x.png" in report.notes[-1]
    with pytest.raises(ConfigError, match=r"red-05x\.png"):
        evaluate(model_for(), with_broken, device="cpu", split="train", bad_files="refuse", progress=False)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "x.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ConfigError, match=r"none of the 2 pictures could be read; 2 unreadable pictures"):
        evaluate(model_for(("a", "b")), tmp_path / "data", split="train", val_fraction=0, device="cpu", progress=False)


def test_other_classes_are_refused_with_the_difference(picture_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'green'.*'yellow'"):
        evaluate(model_for(("blue", "red", "yellow")), picture_folder, device="cpu", progress=False)


def test_data_opened_elsewhere_must_fit_too(picture_folder: Path) -> None:
    data = open_data(picture_folder)
    for classes, message in (
        (("red", "green", "blue"), "same ones in another order"),
        (("blue", "green", "pink"), "unknown to the model: 'red'"),
        (("a", "b"), "answers 2 classes, the data set pictures.* has 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(model_for(classes), data, device="cpu", progress=False)
    with pytest.raises(ConfigError, match="gives a picture any number of labels"):
        evaluate(model_for(multi_label=True), data, device="cpu", progress=False)
    assert evaluate(model_for(), data, device="cpu", progress=False).split == "val"


def test_several_labels(tmp_path: Path, picture_folder: Path) -> None:
    rows = [
        f"{path}\t{path.parent.name}|{'blue' if i % 2 else 'red'}\n" for i, path in enumerate(picture_folder.rglob("*.png"))
    ]
    (tmp_path / "test.tsv").write_text("file\tlabel\n" + "".join(rows))
    report = evaluate(model_for(multi_label=True), tmp_path / "test.tsv", split="train", device="cpu", progress=False)
    assert report.multi_label
    assert report.headline == "map"
    assert report.confusion.shape == (3, 2, 2)


def test_unknown_settings_and_splits(picture_folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'image_column'"):
        evaluate(model_for(), picture_folder, image_colum="x")
    with pytest.raises(ConfigError, match="has no split 'test'; it has: val, train"):
        evaluate(model_for(), picture_folder, split="test", device="cpu", progress=False)


def test_progress_is_silent_unless_asked_for(picture_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = open_data(picture_folder)
    evaluate(model_for(), data, device="cpu", progress=False)
    assert capfd.readouterr() == ("", "")


def test_progress_without_a_terminal_is_plain_lines(
    picture_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.evaluation.classify.PLAIN_SECONDS", 0.0)
    dataset = open_data(picture_folder).train
    assert dataset is not None
    predict_dataset(model_for(), dataset, PIXELS, batch_size=10, progress="evaluating train")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"evaluating train: 10 of {len(dataset)}"
    assert lines[-1] == f"evaluating train: {len(dataset)} of {len(dataset)}"
