"""Every image family on few photographs: one base, and per family what its paper does that survives at this size.

Scaled down from ImageNet: the models (about 0.2 M parameters, pictures of 48 pixels), the batch (32 instead of 1024 to 4096, at
Adam's learning rate of 2e-3), the length, and the augmentation: crops, mirroring and a little turning; RandAugment, mixing and
erasing belong to hundreds of epochs. Kept: the shape of each family, its optimiser, decay, smoothing and stochastic depth.
"""

from __future__ import annotations

from typing import Any

from vitrail.config import (
    AugmentConfig,
    DistillationConfig,
    InputConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)

SIDE = 48
# Four blocks of width 64; fixed sine-cosine positions, because a learned table has to be learned first (arXiv 2205.01580).
ENCODER: dict[str, Any] = {"width": 64, "depth": 4, "heads": 4, "mlp_dim": 256, "position.kind": "sincos"}
# Of the hybrid and of BiT: group norm and weight standardisation on few channels.
TRUNK: dict[str, Any] = {"trunk.stem_width": 16, "trunk.groups": 8}


def _small(model: str, overrides: dict[str, Any], **more: Any) -> RunConfig:
    """The base that all recipes share; `more` replaces whole sections."""
    sections: dict[str, Any] = {
        "augment": AugmentConfig(crop_scale=(0.5, 1.0), hflip=0.5, affine_degrees=10.0),
        "objective": ObjectiveConfig(label_smoothing=0.1),
        "optim": OptimConfig(lr=2e-3, weight_decay=0.05),
        "schedule": ScheduleConfig(epochs=40, warmup_epochs=2),
    }
    return RunConfig(
        model=model, overrides=overrides, batch_size=32, precision="fp32", input=InputConfig(image_size=(SIDE, SIDE)),
        **{**sections, **more},
    )  # fmt: skip


def vit() -> RunConfig:
    """ViT (arXiv 2010.11929), patches of 8 pixels, class token.

    vitrail train signs/ --recipe vit

    Top-1 on the 412 test photos of docs/results.md after 618 steps (1 T FLOPs): 32.3 %, mean of 3 seeds.
    """
    return _small("vit_tiny_patch16_224", {**ENCODER, "patch": [8, 8], "drop_path": 0.1})


def hybrid() -> RunConfig:
    """The same ViT on the map of a small ResNet (arXiv 2010.11929, section 3.1).

    vitrail train signs/ --recipe hybrid

    Top-1 on the 412 test photos of docs/results.md after 523 steps (1 T FLOPs): 50.8 %, mean of 3 seeds.
    """
    trunk = {**TRUNK, "trunk.depths": [1, 1], "trunk.widths": [32, 64]}
    return _small("vit_small_r26_s32_224", {**ENCODER, **trunk, "drop_path": 0.1})


def deit_hard() -> RunConfig:
    """The same ViT with a distillation token that learns a teacher's answers (arXiv 2012.12877, section 4).

    vitrail train signs/ --recipe resnet --out runs/tutor
    vitrail train signs/ --recipe deit_hard --teacher runs/tutor

    Top-1 on the 412 test photos of docs/results.md after 449 steps (1 T FLOPs): 25.4 %, mean of 3 seeds.
    """
    return _deit(DistillationConfig(distill="hard", distill_weight=0.5))


def deit_soft() -> RunConfig:
    """The same, learning a teacher's probabilities at temperature 3, which weigh 0.1 of the loss as in the paper.

    vitrail train signs/ --recipe deit_soft --teacher runs/tutor

    Top-1 on the 412 test photos of docs/results.md after 449 steps (1 T FLOPs): 30.5 %, mean of 3 seeds.
    """
    return _deit(DistillationConfig(distill="soft", distill_weight=0.1, distill_temperature=3.0))


def _deit(distillation: DistillationConfig) -> RunConfig:
    overrides = {**ENCODER, "patch": [8, 8], "drop_path": 0.1, "init": "xavier"}
    return _small("deit_tiny_distilled_patch16_224", overrides, distillation=distillation)


def swin() -> RunConfig:
    """Swin (arXiv 2103.14030): 12 x 12 tokens in shifted windows of 6 x 6, then 6 x 6 tokens.

    vitrail train signs/ --recipe swin

    Top-1 on the 412 test photos of docs/results.md after 417 steps (1 T FLOPs): 20.0 %, mean of 3 seeds.
    """
    overrides = {"width": 32, "depths": [2, 4], "heads": [2, 4], "window": [6, 6], "drop_path": 0.1, "init": "xavier"}
    return _small("swin_tiny_patch4_window7_224", overrides)


def cvt() -> RunConfig:
    """CvT (arXiv 2103.15808): three stages of 24 x 24, 12 x 12 and 6 x 6 tokens, no positions.

    vitrail train signs/ --recipe cvt

    Top-1 on the 412 test photos of docs/results.md after 404 steps (1 T FLOPs): 70.2 %, mean of 3 seeds.
    """
    overrides = {
        "widths": [16, 32, 64], "depths": [1, 1, 3], "heads": [1, 2, 4], "kernels": [3, 3, 3], "strides": [2, 2, 2],
        "paddings": [1, 1, 1], "drop_path": 0.1, "init": "xavier",
    }  # fmt: skip
    return _small("cvt_13", overrides)


def resnet() -> RunConfig:
    """The convolutional net to compare with, and the teacher of `deit_hard` and `deit_soft` (arXiv 1512.03385).

    vitrail train signs/ --recipe resnet

    Top-1 on the 412 test photos of docs/results.md after 589 steps (1 T FLOPs): 90.0 %, mean of 3 seeds.
    """
    return _small("resnet18", {"width": 24, "depths": [2, 2, 1]})


def bit() -> RunConfig:
    """BiT (arXiv 1912.11370): SGD, learning rate in steps, decay 1e-4, as in its section 3.1 and appendix B.

    vitrail train signs/ --recipe bit
    """
    return _small(
        "resnetv2_50x1_bit",
        {**TRUNK, "trunk.depths": [1, 2, 2], "trunk.widths": [64, 128, 256]},
        optim=OptimConfig(optimizer="sgd", lr=0.03, weight_decay=1e-4, clip_norm=0.0),
        schedule=ScheduleConfig(epochs=40, warmup_epochs=2, schedule="step", milestones=(1 / 3, 2 / 3, 8 / 9)),
    )


def vit_finetune() -> RunConfig:
    """A trained ViT on other pictures, as the paper does it (arXiv 2010.11929, appendix B.1.1): SGD, no decay, a head of zeros.

    vitrail train grocery/ --recipe vit_finetune --init-from vit_tiny_patch16_224.safetensors --image-size 96

    With --lr 0.03 --steps 37 --warmup-steps 2 --precision bf16 (3.0 T training FLOPs), top-1 on the 2,485 test photos: 62.6 %,
    n = 1 seed; the same model from random weights for as many FLOPs: 17.7 %.
    """
    return RunConfig(
        model="vit_tiny_patch16_224",
        batch_size=64,
        augment=AugmentConfig(crop_scale=(0.35, 1.0), hflip=0.5),
        optim=OptimConfig(optimizer="sgd", lr=0.01, weight_decay=0.0, clip_norm=1.0),
        schedule=ScheduleConfig(epochs=4, warmup_epochs=0.2),
    )
