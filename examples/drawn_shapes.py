"""Train on pictures that exist only in Python, with an objective of your own.

    python examples/drawn_shapes.py

Any map-style data set of (picture, label) works the same way; here circles and squares are drawn when they are asked for.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor, nn

import vitrail


class Shapes(torch.utils.data.Dataset[tuple[Image.Image, str]]):
    """Circles and squares of random size, place and colour; sample i is always the same picture."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        rng = random.Random(index)
        picture = Image.new("RGB", (32, 32), tuple(rng.randrange(120) for _ in range(3)))
        x, y, size = rng.randrange(2, 14), rng.randrange(2, 14), rng.randrange(8, 16)
        colour = tuple(rng.randrange(140, 256) for _ in range(3))
        shape = ("circle", "square")[index % 2]
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)((x, y, x + size, y + size), fill=colour)
        return picture, shape


def brier(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Squared error of the probabilities: a proper score that punishes sure mistakes less than cross-entropy."""
    probabilities = model(images).float().softmax(1)
    truth = nn.functional.one_hot(targets, probabilities.shape[1])
    return {"loss": (probabilities - truth).square().sum(1).mean()}


def main(out: Path = Path("runs/shapes"), samples: int = 2000, epochs: float = 10.0) -> None:
    """Train a small ViT and answer three new pictures."""
    run = vitrail.train(
        data=Shapes(samples),
        model="vit_tiny_patch16_224",
        image_size=32,
        overrides={"patch": 8, "depth": 4, "width": 64, "heads": 4, "mlp_dim": 128},
        objective=brier,
        epochs=epochs,
        batch_size=64,
        workers=0,
        out=out,
    )
    new = Shapes(samples + 3)
    for i in range(samples, samples + 3):
        picture, truth = new[i]
        (answer,) = vitrail.Predictor(run.path)([picture])
        print(f"{truth}: {answer.label} ({answer.probability:.0%})")


if __name__ == "__main__":
    tyro.cli(main)
