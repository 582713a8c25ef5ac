"""Learning from a teacher beside the labels (DeiT, arXiv 2012.12877, section 4; Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config import DistillationConfig

from .objectives import Classify


class Taught(NamedTuple):
    """What a batch is compared with where there is a teacher: the labels, and the teacher's logits (b, k) of the same view."""

    targets: Tensor
    answers: Tensor


class Distill(nn.Module):
    """(1 - weight) times the loss against the labels plus weight times the loss against the teacher.

    A model that gives two logits (a distilled DeiT, called through `BothLogits`) learns the labels with its class head and
    the teacher with its distillation head; any other model learns both with its one head. Returns {"loss", "accuracy",
    "agreement", "label_loss", "teacher_loss"}; agreement is the share of samples to which the taught head gives the
    teacher's answer, accuracy that of the head that learns the labels.
    """

    def __init__(self, labels: Classify, config: DistillationConfig):
        super().__init__()
        self.labels = labels
        self.kind, self.weight, self.temperature = config.distill, config.distill_weight, config.distill_temperature

    def forward(self, model: nn.Module, images: Tensor, taught: Taught) -> dict[str, Tensor]:
        """Run the model and compare, in float32 whatever the model computes in."""
        logits = model(images)
        first, second = logits if isinstance(logits, tuple) else (logits, logits)
        values, second = self.labels.compare(first.float(), taught.targets), second.float()
        teacher = self.against_teacher(second, taught.answers)
        return {
            "loss": (1 - self.weight) * values["loss"] + self.weight * teacher,
            "accuracy": values["accuracy"],
            "agreement": (second.detach().argmax(1) == taught.answers.argmax(1)).float().mean(),
            "label_loss": values["loss"].detach(),
            "teacher_loss": teacher.detach(),
        }

    def against_teacher(self, logits: Float[Tensor, "b k"], answers: Float[Tensor, "b k"]) -> Tensor:
        """hard: cross-entropy with the teacher's answer. soft: divergence from its probabilities, both at the temperature.

        The divergence is scaled by temperature ** 2 and, as in the original code (losses.py) but not in the paper, divided
        by samples times classes instead of samples.
        """
        if self.kind == "hard":
            return F.cross_entropy(logits, answers.argmax(1))
        t = self.temperature
        mine, theirs = (logits / t).log_softmax(1), (answers / t).log_softmax(1)
        return F.kl_div(mine, theirs, reduction="sum", log_target=True) * t**2 / logits.numel()
