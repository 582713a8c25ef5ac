"""The embedded clips of moving emoji: one base, and per family a small model of 50 to 250 thousand parameters.

Frames of 32 pixels in patches of 8, eight frames spread over the clip. Nothing is mirrored in space or time, because that is
what the classes are. Frames without their order cannot give more than 50 %.
"""

from __future__ import annotations

from typing import Any

from vitrail.config import (
    AugmentConfig,
    DataConfig,
    InputConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
)

ENCODER: dict[str, Any] = {"width": 64, "depth": 3, "heads": 4, "mlp_dim": 256}


def _clips(model: str, overrides: dict[str, Any], epochs: float, lr: float = 1e-3) -> RunConfig:
    """The base that all families share."""
    return RunConfig(
        data="motion",
        model=model,
        overrides=overrides,
        batch_size=32,
        precision="fp32",
        eval_every=1e6,
        data_config=DataConfig(val_fraction=0.0),  # nothing is chosen while training: all 4,000 clips are trained on
        input=InputConfig(image_size=(32, 32), frames=8, sampling="uniform"),
        augment=AugmentConfig(crop="none", hflip=0.0),
        optim=OptimConfig(lr=lr, weight_decay=0.05),
        schedule=ScheduleConfig(epochs=epochs, warmup_steps=60),
    )


def motion() -> RunConfig:
    """A small ViViT; `--set model=factorised_encoder` and so on makes models 2 to 4 of it (3 and 4 with pool=mean).

    vitrail train motion --recipe motion

    Top-1 on the 800 test clips, seed 0: 96.5 % (n = 1; 95 % interval 95.1 to 97.8 % over clips), one thread of an x86 CPU.
    """
    return _clips("vivit_micro", {**ENCODER, "tubelet": [2, 8, 8]}, epochs=5.0)


def motion_timesformer() -> RunConfig:
    """A small TimeSformer with divided attention; `--set attention=space` and so on makes the other schemes of it.

    vitrail train motion --recipe motion_timesformer

    Top-1 on the 800 test clips, seed 0: 96.6 % (n = 1; 95 % interval 95.3 to 97.9 % over clips), 426 seconds of an x86 CPU;
    attending over space only 32.4 %, and 51.0 % of the answers within a pair of opposite motions.
    """
    overrides = {"width": 64, "depth": 2, "heads": 4, "mlp_dim": 128, "patch": [8, 8], "init": "xavier"}
    return _clips("timesformer_micro", overrides, epochs=10.0, lr=1.5e-3)


def motion_mvit() -> RunConfig:
    """A small MViT v1.

    vitrail train motion --recipe motion_mvit

    Top-1 on the 800 test clips, seed 0: 94.4 % (n = 1; 95 % interval 92.8 to 96.0 % over clips), 311 seconds of an x86 CPU.
    """
    overrides = {
        "widths": [32, 64], "heads": [1, 2], "patch_kernel": [3, 7, 7], "patch_stride": [2, 4, 4],
        "key_strides": [[1, 2, 2], [1, 1, 1]], "init": "xavier",
    }  # fmt: skip
    return _clips("mvit_micro", overrides, epochs=4.0)


def motion_slowfast() -> RunConfig:
    """A small SlowFast.

    vitrail train motion --recipe motion_slowfast

    Top-1 on the 800 test clips, seed 0: 99.6 % (n = 1; 95 % interval 99.1 to 100.0 % over clips), 180 seconds of an x86 CPU.
    """
    return _clips("slowfast_micro", {}, epochs=3.0, lr=2e-3)


def motion_x3d() -> RunConfig:
    """A small X3D.

    vitrail train motion --recipe motion_x3d

    Top-1 on the 800 test clips, seed 0: 87.0 % (n = 1; 95 % interval 84.8 to 89.3 % over clips); 54.4 % in half the epochs.
    """
    return _clips("x3d_micro", {"depths": [1, 2, 2], "widths": [16, 32, 48], "head_width": 128}, epochs=6.0, lr=4e-3)
