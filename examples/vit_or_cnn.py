"""A Vision Transformer or a convolutional network for MY pictures? Train both alike and compare with intervals.

python examples/vit_or_cnn.py photos/ --minutes 5
"""

from __future__ import annotations

from pathlib import Path

import tyro

import vitrail

# Equal time and data; the ViT as the automatic preset builds it, the ResNet at the same input size.
CONTENDERS = {
    "vit": {"model": "vit_tiny_patch16_224", "overrides": {"patch": 8, "depth": 6, "pool": "mean", "class_token": False}},
    "resnet": {"model": "resnet18"},
}


def main(data: str, /, minutes: float = 5.0, image_size: int = 64, seeds: int = 1, out: Path = Path("runs/vit_or_cnn")) -> None:
    """Train every contender once per seed for the same time, then print accuracies with their 95 % intervals."""
    lines = []
    for name, settings in CONTENDERS.items():
        for seed in range(seeds):
            same = {"data": data, "image_size": image_size, "time_budget": minutes, "ema": 0.998}
            m = vitrail.train(**same, **settings, seed=seed, out=out / f"{name}-{seed}").metrics
            lines.append(f"{name:<8} seed {seed}   {m['top1']:.1%}   ({m['top1_low']:.1%} to {m['top1_high']:.1%})")
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    tyro.cli(main)
