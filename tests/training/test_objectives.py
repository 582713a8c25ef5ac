import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrail.config import ObjectiveConfig
from vitrail.data import ImageDataset, open_data
from vitrail.training.objectives import Classify, build_objective, class_weights, sampler_weights

IDENTITY = torch.nn.Identity()
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(12) % 3


def dataset(counts: list[int], multi_label: bool = False) -> ImageDataset:
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    if multi_label:
        rows = [(pixels, torch.tensor(row, dtype=torch.float32)) for row in ([1, 0], [1, 0], [1, 0], [1, 1])]
        data = open_data(rows)
    else:
        data = open_data([(pixels + i, label) for label, count in enumerate(counts) for i in range(count)])
    splits = [split for split in (data.train, data.val) if split is not None]
    assert data.train is not None
    store = data.train.store
    rows_, targets = (np.concatenate([getattr(split, name) for split in splits]) for name in ("rows", "targets"))
    names = [str(row) for row in range(len(rows_))]
    return ImageDataset(store, rows_, names, targets, data.classes, multi_label=data.multi_label)


def value(objective: Classify, targets: torch.Tensor = TARGETS, logits: torch.Tensor = LOGITS) -> float:
    return objective(IDENTITY, logits, targets)["loss"].item()


def test_cross_entropy_with_smoothing_and_soft_targets() -> None:
    assert value(Classify()) == pytest.approx(F.cross_entropy(LOGITS, TARGETS).item())
    assert value(Classify(label_smoothing=0.2)) == pytest.approx(F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.2).item())
    hard = F.one_hot(TARGETS, 3).float()
    assert value(Classify(label_smoothing=0.2), hard) == pytest.approx(value(Classify(label_smoothing=0.2)), rel=1e-5)
    mixed = 0.3 * hard + 0.7 * hard.roll(1, 0)
    expected = 0.3 * value(Classify()) + 0.7 * value(Classify(), TARGETS.roll(1))
    assert value(Classify(), mixed) == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss_is_summed_over_classes() -> None:
    hard = F.one_hot(TARGETS, 3).float()
    expected = F.binary_cross_entropy_with_logits(LOGITS, hard, reduction="sum").item() / 12
    assert value(Classify("bce")) == pytest.approx(expected, rel=1e-5)
    assert value(Classify("bce"), hard) == pytest.approx(expected, rel=1e-5)
    smooth = F.binary_cross_entropy_with_logits(LOGITS, hard * 0.7 + 0.1, reduction="sum").item() / 12
    assert value(Classify("bce", 0.3)) == pytest.approx(smooth, rel=1e-5)
    labels = F.binary_cross_entropy_with_logits(LOGITS, hard * 0.7 + 0.15, reduction="sum").item() / 12
    assert value(Classify("bce", 0.3, multi_label=True), hard) == pytest.approx(labels, rel=1e-5)


@pytest.mark.parametrize(
    "config", [ObjectiveConfig(balance="weights"), ObjectiveConfig("bce", 0.1, "logit-adjustment"), ObjectiveConfig()]
)
def test_the_mean_of_micro_batches_is_that_of_the_batch(config: ObjectiveConfig) -> None:
    objective = build_objective(config, dataset([8, 4, 2]))
    parts = [value(objective, TARGETS[i : i + 4], LOGITS[i : i + 4]) for i in (0, 4, 8)]
    assert np.mean(parts) == pytest.approx(value(objective), rel=1e-5)


def test_class_weights_have_mean_one_over_the_samples() -> None:
    counts = np.array([100, 25, 0])
    weights = class_weights(counts, 0.5)
    assert weights @ counts == pytest.approx(counts.sum())
    assert weights[1] == pytest.approx(2 * weights[0])
    assert weights[2] == 0
    assert class_weights(counts, 0.0)[:2] == pytest.approx([1, 1])


def test_weights_act_on_hard_and_soft_targets_alike() -> None:
    objective = build_objective(ObjectiveConfig(balance="weights", balance_power=1.0), dataset([8, 4, 2]))
    expected = torch.tensor([14 / 24, 14 / 12, 14 / 6])[TARGETS] * F.cross_entropy(LOGITS, TARGETS, reduction="none")
    assert value(objective) == pytest.approx(expected.mean().item(), rel=1e-5)
    assert value(objective, F.one_hot(TARGETS, 3).float()) == pytest.approx(value(objective), rel=1e-5)


def test_logit_adjustment_adds_the_log_prior_while_training_only() -> None:
    objective = build_objective(ObjectiveConfig(balance="logit-adjustment", balance_power=1.0), dataset([8, 4, 2]))
    shifted = LOGITS + torch.tensor([8 / 14, 4 / 14, 2 / 14]).log()
    assert value(objective) == pytest.approx(F.cross_entropy(shifted, TARGETS).item(), rel=1e-5)
    answers = objective(IDENTITY, LOGITS, TARGETS)["accuracy"].item()
    assert answers == pytest.approx((LOGITS.argmax(1) == TARGETS).float().mean().item())


def test_multi_label_data_gets_the_sigmoid_loss_and_positive_weights() -> None:
    labelled = dataset([], multi_label=True)
    objective = build_objective(ObjectiveConfig("ce", balance="weights", balance_power=1.0), labelled)
    assert objective.loss == "bce"
    assert objective.positive_weights is not None
    assert objective.positive_weights.tolist() == pytest.approx(
        [(0.125 / 0.875), 3.0]
    )  # 4 of 4 counts as all but half a sample
    answers = objective(IDENTITY, torch.tensor([[2.0, -1.0], [3.0, 0.5]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert answers["accuracy"].item() == 0.75


def test_sampler_draws_rare_classes_more_often() -> None:
    config = ObjectiveConfig(balance="sampler", balance_power=1.0)
    unequal = dataset([8, 4, 2])
    weights = sampler_weights(config, unequal)
    assert weights is not None
    assert [weights[unequal.targets == c].sum() for c in range(3)] == pytest.approx([14 / 3] * 3)
    labels = sampler_weights(config, dataset([], multi_label=True))
    assert labels is not None
    assert labels[3] == pytest.approx(4 * labels[0])
    assert sampler_weights(ObjectiveConfig(), unequal) is None


def test_half_precision_logits_are_compared_in_float32() -> None:
    assert Classify()(IDENTITY, LOGITS.bfloat16(), TARGETS)["loss"].dtype == torch.float32
