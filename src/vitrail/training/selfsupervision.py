"""Learning from pictures alone: hidden patches as objective and evaluator of the one training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.config import ConfigError, Preprocess, RunConfig, replace_flat
from vitrail.cost import autocast
from vitrail.data import ImageDataset, eval_batches
from vitrail.data.transforms import Normalise
from vitrail.models import Model
from vitrail.models.pretext import Pretext

from .distributed import Ranks


class GuessPatches(nn.Module):
    """The objective: what is hidden is drawn from torch's own generator, which is seeded anew for every micro-step."""

    def __init__(self, pretext: Pretext):
        super().__init__()
        self.draw = pretext.draw  # not the module itself: its parameters are the run's, not the objective's

    def forward(self, runner: nn.Module, images: Tensor, targets: object) -> dict[str, Tensor]:
        """The values of the task; there is nothing to compare with but the pictures."""
        return runner(images, self.draw(len(images), images.device))


@dataclass(frozen=True)
class PretextEvaluator:
    """How well hidden patches of one split are guessed; what is hidden of a picture depends on its number alone.

    Yields ("masked_accuracy" or "explained", value), larger is better, and ("masked_loss", value). explained is the share of
    the pixels' mean square that the guesses account for: 0 is as good as answering zero, 1 is perfect.
    """

    pretext: Pretext
    dataset: ImageDataset
    preprocess: Preprocess
    ranks: Ranks
    precision: str
    batch_size: int
    workers: int

    def __call__(self, model: Model) -> Iterator[tuple[str, float]]:
        """Yield (name, value); `model` is the one inside the task."""
        assert model is self.pretext.model
        mean = self.means()
        if "accuracy" in mean:
            yield "masked_accuracy", mean["accuracy"]
        else:
            yield "explained", 1 - mean["loss"] / mean["baseline"]
        yield "masked_loss", mean["loss"]

    @torch.no_grad()
    def means(self) -> dict[str, float]:
        """The task's values over all pictures; every process answers its share. Raises ConfigError if none can be read."""
        ranks, pretext = self.ranks, self.pretext
        normalise = Normalise(self.preprocess).to(ranks.device)
        names = ("loss", "baseline" if pretext.regression else "accuracy")
        sums, count, was_training = [0.0, 0.0], 0, pretext.training
        batches = eval_batches(
            self.dataset, preprocess=self.preprocess, batch_size=self.batch_size, workers=self.workers, rank=ranks.rank,
            world=ranks.world,
        )  # fmt: skip
        pretext.eval()
        try:
            for batch in batches:
                images = normalise(batch.images.to(ranks.device, non_blocking=True))
                draws = pretext.draw_for(batch.indices.tolist()).to(ranks.device)
                with autocast(ranks.device, self.precision):
                    values = pretext(images, draws)
                sums = [total + float(values[name]) * len(images) for name, total in zip(names, sums, strict=True)]
                count += len(images)
        finally:
            pretext.train(was_training)
        *sums, total = ranks.total([*sums, float(count)])
        if not total:
            raise ConfigError(f"none of the {len(self.dataset)} {self.dataset.noun}s could be read")
        return {name: value / total for name, value in zip(names, sums, strict=True)}


def without_label_settings(config: RunConfig, explicit: frozenset[str]) -> RunConfig:
    """What a preset or recipe chose for labels is left out; what was asked for by name stays, and is refused."""
    off = {"mixup": 0.0, "cutmix": 0.0, "balance": "none", "ema": 0.0, "label_smoothing": 0.0}
    return replace_flat(config, {name: value for name, value in off.items() if name not in explicit})


def check_settings(config: RunConfig, own_objective: bool) -> None:
    """Raise ConfigError for settings that mean nothing, or something else, where there are no labels."""
    name = config.objective.objective
    without = f"objective {name} uses no labels"
    if own_objective:
        raise ConfigError(f"objective {name} and an objective of your own were given; give one of them")
    if config.distillation.teacher:
        raise ConfigError(f"{without}, so there is nothing to learn from a teacher; leave --teacher out")
    if config.augment.mixup or config.augment.cutmix:
        raise ConfigError(f"{without} to mix, and mixed pictures are not what it should learn; set mixup and cutmix to 0")
    if config.objective.balance != "none":
        raise ConfigError(f"{without}, so unequal classes cannot be balanced; leave --balance out")
    if config.transfer.freeze or config.transfer.lora_rank or config.transfer.head == "probe":
        raise ConfigError(f"objective {name} trains the whole model and has no head; leave freeze, lora_rank and head out")
    if config.schedule.progressive:
        raise ConfigError(f"objective {name} hides patches of one picture size; leave progressive out")
    if config.optim.ema:
        raise ConfigError(f"objective {name} evaluates and keeps the trained weights, not their average; leave --ema out")
