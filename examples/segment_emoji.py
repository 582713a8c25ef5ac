"""Tell pasted emoji from the texture behind them, pixel by pixel: one model drawn, or several compared at equal cost.

    python examples/segment_emoji.py --families cvt
    python examples/segment_emoji.py --families vit swin cvt --seeds 0 1 2 --flops 3e11

Masks are no class labels, so the loop is written out here; models, objective, data and metric are the package's.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail.config import replace_dotted
from vitrail.cost import count_parameters
from vitrail.data.composites import Composites
from vitrail.evaluation.metrics import mean_iou
from vitrail.models import MODELS, Segmenter, build
from vitrail.studies.small import family
from vitrail.training.objectives import Segment

SIDE, BATCH = 64, 8
TRAINED_ON, NEW = ("noto", "twemoji", "fluent3d"), ("emojione2",)  # designers


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


def segmenter(name: str, head: str, scale: float) -> Segmenter:
    """The small model of a family behind a head for two classes."""
    settings = family(name, (SIDE, SIDE), scale)
    config = replace_dotted(MODELS[settings["model"]], {**settings["overrides"], "image_size": [SIDE, SIDE]})
    return Segmenter(build(config, name), 2, head, width=32)


def flops_of(network: Segmenter) -> int:
    """FLOPs of one picture's forward pass, heads included."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, SIDE, SIDE))
    return int(counter.get_total_flops())


def fit(network: Segmenter, steps: int, seed: int, lr: float) -> None:
    """AdamW, linear warm-up over a tenth of the steps, then a half cosine; no picture is seen twice."""
    data, objective = Composites(BATCH * steps, (SIDE, SIDE), 2 * seed, designers=TRAINED_ON), Segment()
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: (s + 1) / warmup if s < warmup else (1 + math.cos(math.pi * (s - warmup) / (steps - warmup))) / 2
    )
    network.train()
    for step in range(steps):
        objective(network, *batch_of(data, range(BATCH * step, BATCH * (step + 1))))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def main(
    families: tuple[str, ...] = ("cvt",),
    head: str = "fpn",
    flops: float = 6e10,
    seeds: tuple[int, ...] = (0,),
    scale: float = 0.5,
    lr: float = 2e-3,
    pictures: int = 200,
    out: Path = Path("segments.png"),
) -> None:
    """Train on three designers, answer pictures of a fourth.

    Args:
        families: small models, as studies use them: resnet, hybrid, cvt, swin, vit.
        head: fpn or linear.
        flops: what every training may cost (three forward passes a step).
        seeds: of weights and pictures.
        scale: of the models' widths.
        lr: peak learning rate.
        pictures: how many new ones are judged.
        out: picture of the first model's answers.
    """
    new = Composites(pictures, (SIDE, SIDE), seed=1, designers=NEW)
    images, truth = batch_of(new, range(pictures))
    print(f"texture everywhere: mean IoU {mean_iou(torch.zeros_like(truth), truth, 2):.3f}")
    for name in families:
        results = []
        for seed in seeds:
            torch.manual_seed(seed)
            network = segmenter(name, head, scale)
            cost = flops_of(network)
            steps = max(2, round(flops / (3 * cost * BATCH)))
            fit(network, steps, seed, lr)
            with torch.no_grad():
                answer = torch.cat([network.eval()(part).argmax(1) for part in images.split(50)])
            results.append(mean_iou(answer, truth, 2))
            if (name, seed) == (families[0], seeds[0]):
                strip(images[:8], truth[:8], answer[:8]).save(out)
        spread = f" ± {statistics.stdev(results):.3f} over {len(seeds)} seeds" if len(seeds) > 1 else ""
        print(f"{name}, {head} head: mean IoU {statistics.mean(results):.3f}{spread} after {steps} steps of {BATCH}; "
              f"{count_parameters(network):,} parameters, {cost / 1e6:.0f} MFLOPs a picture", flush=True)  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
