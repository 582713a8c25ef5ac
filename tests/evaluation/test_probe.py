"""Frozen features and what simple classifiers make of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import golden, proofs

from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.data import open_data
from vitrail.evaluation import features, fewshot, knn, linear
from vitrail.evaluation.probing import probe
from vitrail.models import create_model

CASE = "bigvision_fewshot_ridge"
PIXELS = Preprocess(image_size=(16, 16))
ROWS = [row for row in golden.original(CASE)["cases"] if "l2_index" in row]
DRAWS = [row for row in golden.original(CASE)["cases"] if "shots" in row]


def micro(seed: int = 0, **overrides: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model("vit_micro_patch4_16", depth=1, num_classes=3, **overrides)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['set']}-{row['l2']:g}")
def test_ridge_is_the_authors(row: dict, record_property) -> None:
    stored = golden.original_outputs(CASE)
    name, at = row["set"], row["l2_index"]
    x, y = stored[f"{name}.x_train"], stored[f"{name}.y_train"]
    ridge = fewshot.Ridge(x, y, row["classes"])
    torch.testing.assert_close(ridge.mean.float(), stored[f"{name}.mean"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ridge.std.float(), stored[f"{name}.std"][0], atol=1e-5, rtol=1e-5)
    # The stored features are float32 and were standardised in it; against float64 that is what is left.
    wanted = stored[f"{name}.w64.{at}"]
    close = (ridge.weights(row["l2"]) - wanted).norm() / wanted.norm()
    proofs.record(record_property, CASE, float(close))
    assert close < (2e-3 if name == "square" and row["l2"] < 1 else 1e-5)
    scores = ridge.scores(stored[f"{name}.x_test"], row["l2"])
    assert float((scores.argmax(1) == stored[f"{name}.y_test"]).double().mean()) == pytest.approx(row["accuracy_float64"])
    swept = dict(zip((1.0, row["l2"]), ridge.sweep(stored[f"{name}.x_test"], (1.0, row["l2"])), strict=True))
    torch.testing.assert_close(swept[row["l2"]], scores, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("row", DRAWS, ids=lambda row: row["indices"])
def test_shots_are_drawn_as_by_the_authors(row: dict) -> None:
    stored = golden.original_outputs(CASE)
    x, y = stored["tall.x_train"], stored["tall.y_train"]
    rows = fewshot.draw_shots(y.numpy(), tuple("abcdef"), row["shots"], row["seed"])
    assert rows.tolist() == stored[row["indices"]].tolist()
    right = fewshot.Ridge(x[rows], y[rows], 6).scores(stored["tall.x_test"], row["l2"]).argmax(1) == stored["tall.y_test"]
    assert float(right.double().mean()) == pytest.approx(row["accuracy"], abs=1e-6)


def test_a_class_without_a_sample_is_named() -> None:
    with pytest.raises(ConfigError, match="training sample of 'b'"):
        fewshot.draw_shots(np.array([0, 0, 2]), ("a", "b", "c"), 1, 0)
    assert len(fewshot.draw_shots(np.array([0, 0, 1]), ("a", "b"), 5, 0)) == 3
    with pytest.raises(ConfigError, match="shots: 0"):
        fewshot.draw_shots(np.array([0, 1]), ("a", "b"), 0, 0)


def test_neighbours_vote_by_cosine() -> None:
    draws = torch.Generator().manual_seed(0)
    train, queries = torch.randn(20, 5, generator=draws), torch.randn(7, 5, generator=draws)
    targets = torch.arange(20) % 3
    similar = F.cosine_similarity(queries[:, None], train[None], dim=2)
    for k, scores in zip((1, 4, 99), knn.knn_scores(train, targets, queries, 3, (1, 4, 99)), strict=True):
        for row, votes in enumerate(scores):
            order = similar[row].argsort(descending=True)[:k]
            wanted = torch.zeros(3)
            for at in order.tolist():
                wanted[targets[at]] += torch.exp((similar[row, at] - 1) / knn.TEMPERATURE)
            torch.testing.assert_close(votes, wanted)


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    targets = torch.arange(90) % 3
    return F.one_hot(targets, 8).float() * 2 + torch.randn(90, 8, generator=draws), targets


def test_logistic_regression_stands_at_its_optimum() -> None:
    x, y = blobs()
    found = {l2: (w, b) for l2, w, b in linear.logistic_sweep(x, y, 3, (1e-3, 1e-1))}
    assert list(found) == [1e-1, 1e-3]
    for l2, (w, b) in found.items():
        error = ((x @ w.T + b).softmax(1) - F.one_hot(y, 3)) / len(x)
        assert (error.T @ x + l2 * w).abs().max() < 2e-5
        assert error.sum(0).abs().max() < 2e-5
    assert found[1e-3][0].norm() > found[1e-1][0].norm()
    standard = linear.Standardise(x)
    w, b = standard.undone(*found[1e-1])
    torch.testing.assert_close(x @ w.T + b, standard(x) @ found[1e-1][0].T + found[1e-1][1], atol=1e-5, rtol=1e-5)


def test_sgd_is_torchs_own() -> None:
    x, y = blobs()
    (_, weight, bias), (_, slow, _) = linear.sgd_sweep(x, y, 3, (0.3, 0.01), seed=4, epochs=2, batch_size=45)
    layer = torch.nn.Linear(8, 3)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    solver = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 4)
    draws = torch.Generator().manual_seed(4)
    for rows in [part for _ in range(2) for part in torch.randperm(90, generator=draws).split(45)]:
        solver.zero_grad()
        F.cross_entropy(layer(x[rows]), y[rows]).backward()
        solver.step()
        schedule.step()
    torch.testing.assert_close(weight, layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, layer.bias.detach(), atol=1e-5, rtol=1e-4)
    assert slow.norm() < weight.norm()


def test_features_are_kept_for_these_weights_and_pictures_only(picture_folder: Path, tmp_path: Path) -> None:
    train = open_data(str(picture_folder)).train
    model, other = micro(0), micro(1)
    first = features.extract_features(model, train, PIXELS, cache=tmp_path)
    again = features.extract_features(micro(0), train, PIXELS, cache=tmp_path, batch_size=5)
    assert (first.kept, again.kept) == (False, True)
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.targets, again.targets)
    small = Preprocess(image_size=(16, 16), fit="stretch")
    half = open_data(str(picture_folder)).val
    for changed in ((other, train, PIXELS), (model, train, small), (model, half, PIXELS)):
        assert not features.extract_features(*changed, cache=tmp_path).kept
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6  # one number of one tensor
    assert not features.extract_features(model, train, PIXELS, cache=tmp_path).kept
    assert len(list(tmp_path.iterdir())) == 5


def test_processes_share_the_samples_out(picture_folder: Path) -> None:
    train, model = open_data(str(picture_folder)).train, micro()
    whole = features.extract_features(model, train, PIXELS)
    parts = [features.extract_features(model, train, PIXELS, rank=rank, world=2) for rank in (0, 1)]
    order = torch.cat([part.indices for part in parts]).argsort()
    torch.testing.assert_close(torch.cat([part.features for part in parts])[order], whole.features)
    assert torch.equal(torch.cat([part.targets for part in parts])[order], whole.targets)
    idle = features.extract_features(model, train.subset(np.arange(1)), PIXELS, rank=1, world=2)
    assert len(idle.indices) == 0


def test_a_damaged_file_is_computed_anew(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, model = open_data(str(picture_folder)).train, micro()
    first = features.extract_features(model, train, PIXELS, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    assert torch.equal(features.extract_features(model, train, PIXELS, cache=tmp_path).features, first.features)
    assert "damaged" in capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    (tmp_path / f"{'0' * 32}.safetensors").write_bytes(path.read_bytes())
    assert features._read(tmp_path / f"{'0' * 32}.safetensors", len(train)) is None


def test_collections_from_python_are_never_kept(tmp_path: Path) -> None:
    pairs = [(torch.full((3, 16, 16), 40 * i, dtype=torch.uint8), i % 2) for i in range(6)]
    train = open_data(pairs).train
    features.extract_features(micro(), train, PIXELS, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_that_are_nan_are_named(picture_folder: Path) -> None:
    train, model = open_data(str(picture_folder)).train, micro()
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(ConfigError, match=r"nan or infinite for \d+ of \d+ pictures, such as \w+/\w+-\d+\.png"):
        features.extract_features(model, train, PIXELS)


def test_a_probe_ranks_and_advises(picture_folder: Path, tmp_path: Path) -> None:
    models = {"seeing": micro(), "blind": micro()}
    torch.nn.init.zeros_(models["blind"].embed.proj.weight)
    asked = {"shots": (1, 3), "seeds": 3, "cache": tmp_path, "workers": 0, "progress": False}
    report = probe(models, str(picture_folder), **asked)
    assert [rank.label for rank in report.ranking] == ["seeing", "blind"]
    assert report.advice.startswith("Fine-tune seeing")
    assert report.judged_on == "validation"
    assert any("choose settings" in note for note in report.notes)
    for method in ("ridge", "knn", "logistic", "sgd"):
        assert report.score("seeing", method, 0).mean > 0.9
        assert len(report.score("seeing", method, 1).accuracies) == 3
        assert report.score("blind", method, 0).mean < 0.7
    again = probe(models, str(picture_folder), **asked)
    assert all(backbone.kept for backbone in again.backbones)
    assert again.scores == report.scores
    one = probe(models["blind"], str(picture_folder), **{**asked, "full": False, "methods": ("ridge",)})
    assert one.ranked_by == ("ridge", 3)
    same = probe({"a": micro(), "b": micro()}, str(picture_folder), **{**asked, "methods": ("knn",), "shots": ()})
    assert "not told apart" in same.advice
    with pytest.raises(ConfigError, match="'knn'"):
        probe(micro(), str(picture_folder), methods=("knm",))


def test_what_no_model_is_called_is_found_out_before_anything_is_judged(picture_folder: Path, tmp_path: Path) -> None:
    for wrong, message in (("resnet_mikro", "nearest: resnet_micro"), ("resnet_micro", "no published weights of resnet_micro")):
        with pytest.raises(ConfigError, match=message):
            probe({"fine": micro(), "wrong": wrong}, str(picture_folder), cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


def test_the_verb_writes_page_and_tables(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = ModelCard(classes=("x", "y", "z"), preprocess=PIXELS)
    path = save_model(micro(), tmp_path / "model.safetensors", card=card)
    asked = f"--model {path} --shots 1,2 --seeds 2 --cache {tmp_path / 'cache'} --out {tmp_path / 'out'} --workers 0"
    assert main(["probe", str(picture_folder), *asked.split()]) == 0
    assert "fine-tuning should give that or more" in capsys.readouterr().out
    page = (tmp_path / "out" / "probe.html").read_text()
    assert page.count('<svg class="chart"') == 4
    rows = list(csv.DictReader((tmp_path / "out" / "probe.csv").read_text().splitlines()))
    assert {row["shots"] for row in rows} == {"1", "2", "all"}
    stored = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert stored["ranking"][0]["label"] == "model"
    assert main(["probe", str(picture_folder), "--model", ","]) == 2


def test_clips_are_probed_by_the_mean_of_their_views() -> None:
    data = open_data("motion")
    clips = data.test
    clips.rows, clips.targets = clips.rows[:4], clips.targets[:4]
    torch.manual_seed(0)
    model = create_model("vivit_micro", num_classes=8)
    c, t, h, w = model.input_shape
    seen = Preprocess(image_size=(h, w), channels=c, frames=t, clips=2)
    both = features.extract_features(model, clips, seen)
    assert both.features.shape == (4, model.config.width)
    first = Preprocess(image_size=(h, w), channels=c, frames=t, clips=1)
    assert not torch.equal(features.extract_features(model, clips, first).features, both.features)
