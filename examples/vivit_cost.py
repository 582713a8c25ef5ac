"""What a longer clip costs the four models of ViViT: attention counted, beside the formulas that papers quote, and everything.

python examples/vivit_cost.py --out docs/images/vivit-cost.png
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
from vitrail.cost import count_flops

# S = nh * nw tokens of a frame, T = nt of them over time: pairs of tokens that attend to each other.
FORMULAS = {
    "joint": ("model 1, joint", "(S T)²", lambda s, t: (s * t) ** 2),
    "factorised_encoder": ("model 2, factorised encoder", "T S² + T²", lambda s, t: t * s**2 + t**2),
    "factorised_self_attention": ("model 3, factorised self-attention", "T S² + S T²", lambda s, t: t * s**2 + s * t**2),
    "factorised_dot_product": ("model 4, factorised dot product", "half of model 3", lambda s, t: (t * s**2 + s * t**2) / 2),
}


class Point(NamedTuple):
    """One model at one clip length; FLOPs of a forward pass of one clip."""

    model: str
    frames: int
    attention: int  # of queries with keys, and of their weights with values
    formula: float  # pairs by the formula, times layers, times 4 FLOPs for each of a layer's channels
    total: int


def measure(model: str, frames: int, **settings: int | tuple[int, ...]) -> Point:
    """Count one model at one length; settings: of its configuration, over those of ViViT-B/16x2."""
    pool = "cls" if model in ("joint", "factorised_encoder") else "mean"
    with torch.device("meta"):
        made = vitrail.create_model("vivit_base_16x2", model=model, pool=pool, frames=frames, **settings).eval()
        clip = torch.empty(1, *made.input_shape)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        made(clip)
    products = counter.get_flop_counts()["Global"]
    attention = sum(flops for name, flops in products.items() if "bmm" in str(name))  # all other products are linear layers
    t, h, w = made.config.grid
    pairs = FORMULAS[model][2](h * w, t)
    return Point(model, frames, attention, 4 * made.config.width * made.config.depth * pairs, count_flops(made))


def draw(points: list[Point], out: Path) -> None:
    """Left attention alone, counted (marks) and by formula (lines); right the whole model."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharex=True)
    for (model, (name, formula, _)), colour, mark in zip(FORMULAS.items(), plt.cm.tab10.colors, "os^D", strict=False):
        mine = [point for point in points if point.model == model]
        frames = [point.frames for point in mine]
        left.plot(frames, [p.formula / 1e9 for p in mine], color=colour, linewidth=1.2, label=f"{name}: {formula}")
        left.plot(frames, [p.attention / 1e9 for p in mine], mark, color=colour, markersize=6, markerfacecolor="none")
        right.plot(frames, [p.total / 1e9 for p in mine], f"{mark}-", color=colour, markersize=5, linewidth=1.2, label=name)
    left.set_title("attention: counted (marks), formula (lines)", loc="left", fontsize=11)
    right.set_title("the whole model, linear layers included", loc="left", fontsize=11)
    ticks = sorted({point.frames for point in points})
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="frames of a clip", ylabel="GFLOPs of a forward pass")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops:,g}"))
        axes.minorticks_off()
        axes.set_ylim(top=8 * axes.dataLim.ymax)  # room for the legend
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8.5, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, facecolor="white")
    plt.close(figure)


def main(out: Path = Path("vivit-cost.png"), frames: tuple[int, ...] = (8, 16, 32, 64, 128), side: int = 224) -> list[Point]:
    """Count ViViT-B/16x2 at several clip lengths, print the figures and draw them."""
    points = [measure(model, length, image_size=(side, side)) for model in FORMULAS for length in frames]
    print(f"{'model':<28}{'frames':>7}{'attention':>12}{'formula':>12}{'counted / formula':>19}{'whole model':>13}  GFLOPs")
    for p in points:
        figures = f"{p.attention / 1e9:>12.2f}{p.formula / 1e9:>12.2f}{p.attention / p.formula:>19.4f}{p.total / 1e9:>13.1f}"
        print(f"{p.model:<28}{p.frames:>7}{figures}")
    draw(points, out)
    return points


if __name__ == "__main__":
    tyro.cli(main)
