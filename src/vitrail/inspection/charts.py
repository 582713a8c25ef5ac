"""The charts and mosaics of an inspection, drawn for a page and, the same, as files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from vitrail.checkpoints.io import replacing, write_text
from vitrail.inspection.draw import STYLE, light, plot_distances, plot_over_time, svg

TONE, GREY = "#3b73c8", "#8a92a0"  # readable on light and on dark paper
_COLD, _WARM = np.array([47, 92, 168.0]), np.array([201, 84, 42.0])


def publish(make: Callable[[], Figure], title: str, path: Path) -> Markup:
    """Write a figure as PATH.png and PATH.svg; returns it as inline SVG in a page's colours."""
    with matplotlib.rc_context(STYLE):
        inline = svg(make(), title)
    with matplotlib.rc_context({**STYLE, **light(STYLE), "svg.hashsalt": title}):
        figure, pixels, drawn = make(), io.BytesIO(), io.StringIO()
        figure.savefig(pixels, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(drawn, format="svg", facecolor="white", metadata={"Date": None})
    with replacing(path.with_name(f"{path.name}.png")) as temporary:
        temporary.write_bytes(pixels.getvalue())
    write_text(path.with_name(f"{path.name}.svg"), drawn.getvalue())
    return inline


def distance_figure(layers: Sequence[Float[Tensor, " _"]], even: Sequence[float], unit: str) -> Figure:
    """Mean attention distance of every head, layer by layer; `even`: what attention to all in reach alike would give."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    plot_distances(axes, layers, even, TONE, GREY)
    axes.set_xlabel("attention layer")
    axes.set_title(f"Mean attention distance, {unit}")
    return figure


def time_figure(maps: Mapping[str, tuple[Float[Tensor, " e"], Float[Tensor, " t"]]], frames: int, title: str) -> Figure:
    """How maps {name: (edges, shares)} of a clip spread over its frames."""
    figure = Figure(figsize=(5.6, 2.0), layout="constrained")
    axes = figure.subplots()
    plot_over_time(axes, maps, frames, (TONE, "#c78a1e", GREY))
    axes.set_title(title)
    return figure


def depth_figure(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Values of every layer, one line for each entry, the first in colour."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, line) in enumerate(values.items()):
        axes.plot(range(len(line)), line, "o-", markersize=3.5, color=TONE if number == 0 else GREY, label=name)
    axes.set(xlabel="blocks passed")
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if len(values) > 1:
        axes.legend(fontsize=8.5)
    return figure


def heat_figure(matrix: Float[Tensor, "n m"], title: str, x: str, y: str, low: float, high: float) -> Figure:
    """A matrix as colours with a scale."""
    figure = Figure(figsize=(4.8, 4.1), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    drawn = axes.imshow(matrix.numpy(), cmap="cividis", vmin=low, vmax=high, origin="lower", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.85)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def mosaic(tiles: Sequence[np.ndarray], columns: int, side: int, gap: int = 2) -> Image.Image:
    """Pictures (h, w, 3) of one size in reading order, each enlarged in hard pixels to at least `side`."""
    height, width = tiles[0].shape[:2]
    scale = max(1, -(-side // max(height, width)))
    h, w = height * scale, width * scale
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * (h + gap) - gap, min(columns, len(tiles)) * (w + gap) - gap, 3), 128, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (h + gap), number % columns * (w + gap)
        canvas[top : top + h, left : left + w] = np.repeat(np.repeat(tile, scale, 0), scale, 1)
    return Image.fromarray(canvas)


def filter_tiles(components: Float[Tensor, "n c t h w"]) -> list[np.ndarray]:
    """Each component over its own range, grey for nothing; the frames of a tubelet side by side."""
    tiles = []
    for part in components:
        rgb = part[:3] if len(part) >= 3 else part[:1].expand(3, -1, -1, -1)
        rgb = 0.5 + 0.5 * rgb / rgb.abs().max().clamp_min(1e-12)
        tiles.append((255 * rgb).round().permute(2, 1, 3, 0).flatten(1, 2).to(torch.uint8).numpy())  # h (t w) c
    return tiles


def signed_tile(values: Float[Tensor, "h w"], largest: float) -> np.ndarray:
    """Positive values warm, negative ones cold, nothing white."""
    share = (values.numpy() / max(largest, 1e-12)).clip(-1, 1)[..., None]
    return (255 + np.where(share > 0, share * (_WARM - 255), -share * (_COLD - 255))).round().astype(np.uint8)


def heat_tile(values: Float[Tensor, "h w"], low: float, high: float) -> np.ndarray:
    """Values from low to high in the colours of `heat_figure`."""
    share = (values.numpy() - low) / max(high - low, 1e-12)
    return (255 * matplotlib.colormaps["cividis"](share.clip(0, 1))[..., :3]).round().astype(np.uint8)


def position_tiles(space: Float[Tensor, "h w h w"], most: int = 14) -> tuple[list[np.ndarray], int]:
    """For every place how alike its position is to all others, at most `most` places along a side, and the tiles in a row."""
    h, w = space.shape[:2]
    rows, columns = (torch.linspace(0, n - 1, min(n, most)).round().long() for n in (h, w))
    off = ~torch.eye(h * w, dtype=torch.bool).view(h, w, h, w)
    low, high = space[off].min().item(), space[off].max().item()
    return [heat_tile(space[y, x], low, high) for y in rows.tolist() for x in columns.tolist()], len(columns)
