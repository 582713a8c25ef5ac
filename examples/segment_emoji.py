"""Tell pasted emoji from the texture behind them, pixel by pixel, and draw picture / truth / answer.

    python examples/segment_emoji.py --model cvt_micro --head fpn

Masks are no class labels, so the loop is written out here; model, objective, data and metric are the package's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from vitrail.data.composites import Composites
from vitrail.evaluation.metrics import mean_iou
from vitrail.models import Segmenter, create_model
from vitrail.training.objectives import Segment


def batch_of(data: Composites, rows: range) -> tuple[Tensor, Tensor]:
    """Normalised pictures and the classes of their pixels."""
    pictures, truth = zip(*(data[row] for row in rows), strict=True)
    return torch.stack(pictures) / 127.5 - 1, torch.stack(truth)


def strip(pictures: Tensor, truth: Tensor, answer: Tensor) -> Image.Image:
    """Three rows: pictures, truth, answer."""
    colour = ((pictures + 1) * 127.5).byte()
    rows = [colour, *(255 * mask[:, None].expand(-1, 3, -1, -1).byte() for mask in (truth, answer))]
    pixels = torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)


def main(
    model: str = "cvt_micro", head: str = "fpn", steps: int = 150, side: int = 64, out: Path = Path("segments.png")
) -> None:
    """Train on three designers, answer pictures of a fourth."""
    torch.manual_seed(0)
    train = Composites(8 * steps, (side, side), designers=("noto", "twemoji", "fluent3d"))
    new = Composites(24, (side, side), seed=1, designers=("emojione2",))
    network, objective = Segmenter(create_model(model), 2, head, width=32), Segment()
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        objective(network, *batch_of(train, range(8 * step, 8 * step + 8)))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    pictures, truth = batch_of(new, range(len(new)))
    with torch.no_grad():
        answer = network.eval()(pictures).argmax(1)
    print(f"{model}, {head} head: mean IoU {mean_iou(answer, truth, 2):.3f} after {steps} steps; texture everywhere "
          f"{mean_iou(torch.zeros_like(truth), truth, 2):.3f}")  # fmt: skip
    strip(pictures[:8], truth[:8], answer[:8]).save(out)


if __name__ == "__main__":
    tyro.cli(main)
