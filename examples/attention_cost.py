"""What larger pictures cost global attention and attention within windows: counted, beside the laws that papers state.

python examples/attention_cost.py --out docs/images/attention-cost.png
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro
from matplotlib.ticker import FuncFormatter, LogLocator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrail

# Swin paper, section 3.2, equations 1 and 2: of h x w tokens each attends to all, or to the M x M of its window.
LAWS = {
    "vit_tiny_patch16_224": ("ViT-Ti/16, global attention", "∝ (h w)²"),
    "swin_tiny_patch4_window7_224": ("Swin-T, windows of 7 x 7", "∝ h w"),
}


class Point(NamedTuple):
    """One model at one size of picture; FLOPs of a forward pass of one picture."""

    model: str
    side: int
    attention: int  # of queries with keys, and of their weights with values
    law: int
    total: int


def law(model: vitrail.models.Model, side: int) -> int:
    """4 FLOPs for every channel and pair of tokens: two products of a multiplication and an addition each."""
    c = model.config
    if model.family == "vit":
        tokens = c.prefix + (side // c.patch[0]) ** 2
        return 4 * c.depth * c.width * tokens**2
    first, window = side // c.patch[0], c.window[0]
    stages = ((first // 2**s, c.width * 2**s, depth) for s, depth in enumerate(c.depths))
    return sum(4 * depth * width * grid**2 * window**2 for grid, width, depth in stages)


def measure(name: str, side: int) -> Point:
    """Count one model at one size."""
    with torch.device("meta"):
        model = vitrail.create_model(name, image_size=side).eval().requires_grad_(False)
        picture = torch.empty(1, *model.input_shape)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(picture)
    products = counter.get_flop_counts()["Global"]
    attention = sum(flops for product, flops in products.items() if "bmm" in str(product))  # all others are linear layers
    return Point(name, side, attention, law(model, side), sum(products.values()))


def draw(points: list[Point], out: Path) -> None:
    """Left attention alone, counted (marks) and by the laws (lines); right its share of the whole model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True)
    for (model, (name, growth)), colour, mark in zip(LAWS.items(), plt.cm.tab10.colors, "os", strict=False):
        mine = [point for point in points if point.model == model]
        sides = [point.side for point in mine]
        left.plot(sides, [p.law / 1e9 for p in mine], color=colour, linewidth=1.2, label=f"{name}: {growth}")
        left.plot(sides, [p.attention / 1e9 for p in mine], mark, color=colour, markersize=6, markerfacecolor="none")
        right.plot(sides, [100 * p.attention / p.total for p in mine], f"{mark}-", color=colour, linewidth=1.2, label=name)
    left.set(yscale="log", ylabel="GFLOPs of a forward pass")
    left.set_title("attention: counted (marks), law (lines)", loc="left", fontsize=11)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops:,g}"))
    right.set(ylabel="% of all FLOPs", ylim=(0, 100))
    right.set_title("attention's share of the model", loc="left", fontsize=11)
    ticks = sorted({point.side for point in points})
    for axes in (left, right):
        axes.set(xscale="log", xlabel="height and width of the picture in pixels")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False, loc="upper left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, facecolor="white")
    plt.close(figure)


def main(out: Path = Path("attention-cost.png"), sides: tuple[int, ...] = (224, 448, 896, 1792)) -> list[Point]:
    """Count both models at several sizes that windows and patches divide, print the figures and draw them."""
    points = [measure(name, side) for name in LAWS for side in sides]
    print(f"{'model':<30}{'side':>6}{'attention':>12}{'law':>12}{'whole model':>13}  GFLOPs")
    for p in points:
        print(f"{p.model:<30}{p.side:>6}{p.attention / 1e9:>12.3f}{p.law / 1e9:>12.3f}{p.total / 1e9:>13.2f}")
    draw(points, out)
    return points


if __name__ == "__main__":
    tyro.cli(main)
