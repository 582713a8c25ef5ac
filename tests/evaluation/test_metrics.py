from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_average_precision,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
    multilabel_average_precision,
    multilabel_f1_score,
)

from vitrail.evaluation import bootstrap
from vitrail.evaluation.metrics import Report, calibration_bins, classification_report, mean_iou


def scores(answers: list[int], classes: int, margin: float = 4.0) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float() * margin


def test_single_label_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    report = classification_report(scores([0, 0, 1, 1, 1, 1], 3), truth, ["a", "b", "c"])
    assert report.confusion.tolist() == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]
    a, b, c = report.per_class
    assert (a["precision"], a["recall"], a["support"], a["predicted"]) == (1.0, pytest.approx(2 / 3), 3, 2)
    assert (b["precision"], b["recall"], b["f1"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert math.isnan(c["precision"])  # never answered
    assert (c["recall"], c["f1"]) == (0.0, 0.0)
    assert report.metrics["top1"] == pytest.approx(4 / 6)
    assert report.metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert report.metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    right, wrong = math.exp(4) / (math.exp(4) + 2), 1 / (math.exp(4) + 2)
    assert report.metrics["nll"] == pytest.approx(-(4 * math.log(right) + 2 * math.log(wrong)) / 6, rel=1e-6)
    assert report.metrics["ece"] == pytest.approx(right - 4 / 6, abs=1e-6)
    assert report.top_confusions() == [("a", "b", 1, pytest.approx(1 / 3)), ("c", "b", 1, 1.0)]
    assert report.headline == "top1"


def test_two_classes_told_apart() -> None:
    """Only what was answered with one of the two counts."""
    truth = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    report = classification_report(scores([0, 0, 1, 2, 1, 0, 2, 0], 3), truth, ["left", "right", "still"])
    assert report.between("left", "right") == report.between("right", "left") == (3, 5)
    assert report.between("right", "still") == (1, 2)
    with pytest.raises(ValueError, match="lift"):
        report.between("left", "lift")


def test_agrees_with_torchmetrics() -> None:
    torch.manual_seed(0)
    logits, truth = torch.randn(400, 7) * 2, torch.randint(7, (400,))
    found = classification_report(logits, truth, [str(i) for i in range(7)]).metrics
    for name, value in {
        "top1": multiclass_accuracy(logits, truth, num_classes=7, average="micro"),
        "top5": multiclass_accuracy(logits, truth, num_classes=7, average="micro", top_k=5),
        "balanced_accuracy": multiclass_accuracy(logits, truth, num_classes=7, average="macro"),
        "macro_f1": multiclass_f1_score(logits, truth, num_classes=7, average="macro"),
        "ece": multiclass_calibration_error(logits, truth, num_classes=7, n_bins=15),
    }.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name


def test_top5_of_few_classes_is_one_and_of_many_is_counted() -> None:
    truth = torch.tensor([0, 1, 2])
    assert classification_report(torch.randn(3, 3), truth, ["a", "b", "c"]).metrics["top5"] == 1.0
    ranked = -torch.arange(8.0).repeat(3, 1)  # class 0 first, class 7 last
    report = classification_report(ranked, torch.tensor([0, 4, 5]), [str(i) for i in range(8)])
    assert report.metrics["top1"] == pytest.approx(1 / 3)
    assert report.metrics["top5"] == pytest.approx(2 / 3)


def test_a_class_the_split_lacks_is_left_out_of_the_means() -> None:
    report = classification_report(scores([0, 1, 1], 4), torch.tensor([0, 1, 0]), ["a", "b", "c", "d"])
    assert math.isnan(report.per_class[2]["recall"])
    assert math.isnan(report.per_class[2]["f1"])
    assert report.metrics["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert report.metrics["macro_f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("right", [True, False])
def test_one_sample(right: bool) -> None:
    found = classification_report(scores([0 if right else 1], 2), torch.tensor([0]), ["a", "b"]).metrics
    assert found["top1"] == float(right)
    low, high = (0.025, 1.0) if right else (0.0, 0.975)  # the exact binomial bound of one trial
    assert (found["top1_low"], found["top1_high"]) == (pytest.approx(low), pytest.approx(high))


def test_one_class() -> None:
    report = classification_report(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), ["only"])
    assert report.metrics["top1"] == 1.0
    assert report.confusion.tolist() == [[3]]


def test_interval_covers_as_the_binomial_law_says() -> None:
    low, high = bootstrap.rate_interval(80, 100, np.random.default_rng(0))
    spread = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - spread, abs=0.015)
    assert high == pytest.approx(0.8 + spread, abs=0.015)
    low, high = bootstrap.rate_interval(100, 100, np.random.default_rng(0))
    assert (low, high) == (pytest.approx(0.025**0.01), 1.0)


def test_intervals_contain_the_value_and_repeat_with_the_seed() -> None:
    torch.manual_seed(1)
    truth = torch.randint(4, (300,))
    logits = torch.randn(300, 4) + scores(truth.tolist(), 4, 2.0)
    first, second = (classification_report(logits, truth, list("abcd"), seed=3).metrics for _ in range(2))
    assert first == second
    for name in ("top1", "top5", "balanced_accuracy", "macro_f1"):
        assert first[f"{name}_low"] <= first[name] <= first[f"{name}_high"]
    assert 0.05 < first["balanced_accuracy_high"] - first["balanced_accuracy_low"] < 0.15


def test_confusion_resamples_keep_the_total_and_the_mean() -> None:
    confusion = np.array([[30, 10], [0, 60]])
    hits, predicted, support = (
        np.concatenate(part) for part in zip(*bootstrap.confusion_resamples(confusion, np.random.default_rng(0)), strict=True)
    )
    assert (support.sum(1) == 100).all()
    assert (predicted.sum(1) == 100).all()
    assert hits.mean(0) == pytest.approx([30, 60], abs=1)
    assert support.mean(0) == pytest.approx([40, 60], abs=1)


def test_scores_that_are_not_finite_are_said_aloud() -> None:
    logits = scores([0, 1, 1], 2)
    logits[2] = float("nan")
    report = classification_report(logits, torch.tensor([0, 1, 1]), ["a", "b"])
    assert "1 of 3 samples got scores that are not finite" in report.notes[0]
    assert math.isfinite(report.metrics["nll"])


@pytest.mark.parametrize(
    ("logits", "targets", "multi_label", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), False, "no sample"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), False, "3 classes, but 2 class names"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), False, "from 0 to 1, got 0 to 2"),
        (torch.zeros(2, 2), torch.zeros(2, 2), False, r"single-label .* have the shape \(2,\)"),
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), True, r"multi-label .* have the shape \(2, 2\)"),
    ],
)
def test_bad_input(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_report(logits, targets, ["a", "b"], multi_label)


def test_calibration_bins_by_hand() -> None:
    confidence = torch.tensor([0.05, 0.1, 0.95, 1.0])
    bins, error = calibration_bins(confidence, torch.tensor([0.0, 1.0, 1.0, 0.0]), bins=10)
    assert [part.count for part in bins] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert bins[0].confidence == pytest.approx(0.075)
    assert bins[0].accuracy == 0.5
    assert math.isnan(bins[4].accuracy)
    assert error == pytest.approx((2 * abs(0.5 - 0.075) + 2 * abs(0.5 - 0.975)) / 4, abs=1e-6)


def test_multi_label_by_hand() -> None:
    logits = torch.tensor([[3.0, -3.0], [2.0, 1.0], [-1.0, -2.0], [1.0, -4.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    report = classification_report(logits, truth, ["x", "y"], multi_label=True)
    # x ranked: hit, miss, hit, hit -> (1/1 + 2/3 + 3/4) / 3;  y ranked: hit first -> 1
    assert report.per_class[0]["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert report.per_class[1]["average_precision"] == 1.0
    assert report.metrics["map"] == pytest.approx(((1 + 2 / 3 + 3 / 4) / 3 + 1) / 2)
    # x given to samples 0, 1, 3: two hits of three, support three; y: one hit of one
    assert report.metrics["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert report.metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert report.confusion.tolist() == [[[0, 1], [1, 2]], [[3, 0], [0, 1]]]
    assert report.headline == "map"
    assert report.top_confusions() == []


def test_multi_label_agrees_with_torchmetrics_and_ignores_a_label_without_positives() -> None:
    torch.manual_seed(2)
    logits, truth = torch.randn(120, 5), (torch.rand(120, 5) < 0.3).float()
    found = classification_report(logits, truth, list("abcde"), multi_label=True).metrics
    probabilities, whole = logits.sigmoid(), truth.long()
    assert found["map"] == pytest.approx(float(multilabel_average_precision(probabilities, whole, num_labels=5)), abs=1e-6)
    for kind in ("micro", "macro"):
        expected = float(multilabel_f1_score(probabilities, whole, num_labels=5, average=kind))
        assert found[f"{kind}_f1"] == pytest.approx(expected, abs=1e-6)
        assert found[f"{kind}_f1_low"] < expected < found[f"{kind}_f1_high"]
    assert found["map_low"] < found["map"] < found["map_high"]

    truth[:, 2] = 0
    report = classification_report(logits, truth, list("abcde"), multi_label=True)
    assert math.isnan(report.per_class[2]["average_precision"])
    kept = [row["average_precision"] for i, row in enumerate(report.per_class) if i != 2]
    assert report.metrics["map"] == pytest.approx(sum(kept) / 4)


def test_weighted_average_precision_equals_repeating_the_samples() -> None:
    torch.manual_seed(3)
    probabilities, truth = (torch.rand(40) * 8).round() / 8, torch.randint(2, (40,))  # many ties
    weights = torch.randint(0, 3, (4, 40)).float()
    found = bootstrap.weighted_average_precision(probabilities, truth, weights)
    for row, value in zip(weights.long(), found, strict=True):
        repeated = torch.repeat_interleave(torch.arange(40), row)
        expected = binary_average_precision(probabilities[repeated], truth[repeated])
        assert float(value) == pytest.approx(float(expected), abs=1e-5)


def test_report_survives_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = classification_report(scores([0, 1, 1], 4), torch.tensor([0, 1, 0]), ["a", "b", "c", "ü"])
    path = report.save(tmp_path / "report.json")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = Report.load(path)
    assert again.metrics == report.metrics
    assert np.array_equal(again.confusion, report.confusion)
    assert math.isnan(again.per_class[2]["recall"])
    assert again.classes == report.classes
    assert "top-1 accuracy" in str(again)
    assert "95 % interval" in str(again)


def test_many_samples_and_classes_are_quick_enough_to_run_every_epoch() -> None:
    torch.manual_seed(4)
    truth = torch.randint(300, (20_000,))
    report = classification_report(torch.randn(20_000, 300), truth, [str(i) for i in range(300)])
    assert report.metrics["n"] == 20_000
    assert report.metrics["balanced_accuracy_low"] < report.metrics["balanced_accuracy_high"]


def test_mean_iou() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    predicted = torch.tensor([[0, 1, 1, 1], [2, 2, 0, 1]])
    assert mean_iou(truth.clamp(max=2), truth.clamp(max=2), 3) == 1
    assert mean_iou(predicted, truth, 3) == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert mean_iou(predicted, truth, 5) == mean_iou(predicted, truth, 3)  # classes that do not occur do not count
