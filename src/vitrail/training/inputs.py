"""From a loader's uint8 batch to what the model sees: augmented, normalised and mixed on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.config import AugmentConfig, Preprocess
from vitrail.data import Batch
from vitrail.data.augment import DeviceAugment
from vitrail.data.mixing import mix_batch
from vitrail.data.transforms import Normalise

from .distillation import Taught
from .progressive import Size, shrink
from .teacher import Teacher


class Inputs(nn.Module):
    """Pictures (b, c, h, w) or clips (b, c, t, h, w) in float32 and targets, (b,) class numbers or (b, k) soft ones where
    samples are mixed.

    With a teacher, targets come with its answers to these very pictures.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        augment: AugmentConfig,
        classes: int,
        seed: int,
        layout: torch.memory_format,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.teacher = teacher
        self.config, self.classes, self.seed, self.layout = augment, classes, seed, layout
        self.augment = DeviceAugment(augment)
        self.normalise = Normalise(preprocess)

    @torch.no_grad()
    def forward(
        self, batch: Batch, device: torch.device, draw: int, size: Size | None = None
    ) -> tuple[Tensor, Tensor | Taught]:
        """Augmentation is drawn per sample from its key and the seed; what is mixed with what from the number `draw`.

        size: smaller height and width of what the model sees.
        """
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        images = self.normalise(self.augment(images, batch.keys, self.seed))
        if size is not None:
            images = shrink(images, size)
        if self.config.mixup or self.config.cutmix:
            soft = nn.functional.one_hot(targets, self.classes).float() if targets.ndim == 1 else targets
            images, targets = mix_batch(images, soft, self.config, torch.Generator(device).manual_seed(draw))
        images = images.contiguous(memory_format=self.layout)
        return images, targets if self.teacher is None else Taught(targets, self.teacher(images, batch.indices))
