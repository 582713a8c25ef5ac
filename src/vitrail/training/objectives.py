"""What is minimised. An objective is called with (model, images, targets) and returns a dict of means with "loss"."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from vitrail.config import ObjectiveConfig
from vitrail.data import ImageDataset

Objective = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


class Classify(nn.Module):
    """Cross-entropy or sigmoid cross-entropy of logits (b, k) against class numbers (b,) or soft targets (b, k).

    Returns {"loss", "accuracy"}, both means over the samples, so that the mean over equal micro-batches is exactly that of
    the whole batch. `sample_weights` (k,) multiply a sample's loss by its class; `positive_weights` (k,) the positive part
    of a label's; `shift` (k,) is added to the logits while training only (logit adjustment, arXiv 2007.07314, equation 10).
    The sigmoid loss is summed over classes, as in arXiv 2106.10270.
    """

    sample_weights: Tensor | None
    positive_weights: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        loss: str = "ce",
        label_smoothing: float = 0.0,
        *,
        multi_label: bool = False,
        sample_weights: Tensor | None = None,
        positive_weights: Tensor | None = None,
        shift: Tensor | None = None,
    ):
        super().__init__()
        self.loss, self.label_smoothing, self.multi_label = loss, label_smoothing, multi_label
        self.register_buffer("sample_weights", sample_weights)
        self.register_buffer("positive_weights", positive_weights)
        self.register_buffer("shift", shift)

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Run the model and compare; the comparison is in float32 whatever the model computes in."""
        return self.compare(model(images).float(), targets)

    def compare(self, logits: Float[Tensor, "b k"], targets: Tensor) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of logits in float32."""
        shifted = logits if self.shift is None else logits + self.shift
        losses = self._cross_entropy(shifted, targets) if self.loss == "ce" else self._sigmoid(shifted, targets)
        if self.sample_weights is not None:
            weights = self.sample_weights[targets] if targets.ndim == 1 else targets @ self.sample_weights
            losses = losses * weights
        return {"loss": losses.mean(), "accuracy": self._accuracy(logits.detach(), targets)}

    def _cross_entropy(self, logits: Float[Tensor, "b k"], targets: Tensor) -> Float[Tensor, " b"]:
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)

    def _sigmoid(self, logits: Float[Tensor, "b k"], targets: Tensor) -> Float[Tensor, " b"]:
        classes = logits.shape[1]
        soft = F.one_hot(targets, classes).to(logits.dtype) if targets.ndim == 1 else targets.to(logits.dtype)
        if self.label_smoothing:
            soft = soft * (1 - self.label_smoothing) + self.label_smoothing / (2 if self.multi_label else classes)
        losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none", pos_weight=self.positive_weights)
        return losses.sum(1)

    def _accuracy(self, logits: Float[Tensor, "b k"], targets: Tensor) -> Tensor:
        """Share of right answers: the largest score against the largest target, or every label against one half."""
        if self.multi_label:
            return ((logits > 0) == (targets > 0.5)).float().mean()
        truth = targets if targets.ndim == 1 else targets.argmax(1)
        return (logits.argmax(1) == truth).float().mean()


class Segment(nn.Module):
    """Cross-entropy of every pixel's logits (b, k, h, w) against class numbers (b, h, w).

    Pixels of class `ignore` do not count. Returns {"loss", "accuracy"}, means over the pixels that do.
    """

    def __init__(self, ignore: int = 255):
        super().__init__()
        self.ignore = ignore

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Run the model and compare, in float32 whatever the model computes in."""
        logits = model(images).float()
        counted = targets != self.ignore
        right = (logits.detach().argmax(1) == targets) & counted
        return {
            "loss": F.cross_entropy(logits, targets, ignore_index=self.ignore),
            "accuracy": right.sum() / counted.sum().clamp_min(1),
        }


def build_objective(config: ObjectiveConfig, dataset: ImageDataset) -> Classify:
    """The objective of the settings; class frequencies are those of the training set.

    Multi-label data always uses the sigmoid loss: cross-entropy would make its labels compete.
    """
    loss = "bce" if dataset.multi_label else config.loss
    counts, total = dataset.class_counts(), len(dataset)
    share = torch.from_numpy(np.clip(counts / total, 0.5 / total, 1 - 0.5 / total)).float()  # never nobody, never everybody
    made: dict[str, Tensor] = {}
    if config.balance == "weights" and dataset.multi_label:
        made["positive_weights"] = ((1 - share) / share) ** config.balance_power
    elif config.balance == "weights":
        made["sample_weights"] = torch.from_numpy(class_weights(counts, config.balance_power)).float()
    elif config.balance == "logit-adjustment":
        made["shift"] = config.balance_power * (share.log() if loss == "ce" else share.logit())
    return Classify(loss, config.label_smoothing, multi_label=dataset.multi_label, **made)


def class_weights(counts: NDArray[np.int64], power: float) -> NDArray[np.float64]:
    """Weights (k,) proportional to counts ** -power whose mean over the samples is 1; 0 for a class without samples."""
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 0.0)
    return weights * counts.sum() / (weights * counts).sum()


def sampler_weights(config: ObjectiveConfig, dataset: ImageDataset) -> NDArray[np.float64] | None:
    """How often each training sample is drawn (n,), relative to the others, where the settings ask for a balanced sampler.

    A sample with several labels is drawn as often as its rarest one asks for, one without as often as the commonest.
    """
    if config.balance != "sampler":
        return None
    counts = dataset.class_counts()
    weights = class_weights(counts, config.balance_power)
    if not dataset.multi_label:
        return weights[dataset.targets]
    labels = np.asarray(dataset.targets, np.float64)
    return np.maximum((labels * weights).max(1), weights[counts > 0].min())
