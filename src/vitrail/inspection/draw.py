"""Figures and pictures for a page: charts as SVG that takes the page's colours and fonts, pictures as data URIs."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrail.evaluation.metrics import CalibrationBin

# Placeholders drawn by matplotlib and replaced in the SVG by the page's own colours, so that one figure fits light and dark.
INK, MUTED, LINE, ACCENT, WRONG = "#010203", "#010204", "#010205", "#010206", "#010207"
_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", ACCENT: "var(--accent)", WRONG: "var(--wrong)"}
LIGHT = {INK: "#1c222d", MUTED: "#646c7a", LINE: "#e5e1d7", ACCENT: "#1f4fa3", WRONG: "#a5313c"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, and any script a class name is written in
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a class may be called "$"
}
_CELL_RIGHT, _CELL_WRONG = (0.25, 0.45, 0.79), (0.79, 0.26, 0.25)  # pixels cannot follow the page: tones for both of its modes
_AMBER = (255, 176, 46)
_GOLD = "#c78a1e"  # seen on light and dark alike
_SMALL = (3.2, 2.5)  # inches: three beside each other on a wide page, one on a phone
SMALL_PICTURE = 64  # pictures up to this side are kept without loss and shown in hard pixels


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, *, percent: bool = False) -> Markup:
    """A chart of named lines {name: (x, y)} over epochs; values that are not finite leave a gap."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SMALL, layout="constrained")
        axes = figure.subplots()
        for (name, (x, y)), colour, style in zip(lines.items(), (ACCENT, WRONG, MUTED), ("-", "-", "--"), strict=False):
            values = np.asarray(y, dtype=float)
            few = np.isfinite(values).sum() < 3
            axes.plot(np.asarray(x, float), values, style, color=colour, label=name, marker="o" if few else None, markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.margins(x=0.01)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=9.5)
        return svg(figure, title)


def series(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    title: str,
    x_label: str,
    *,
    ticks: Mapping[float, str] | None = None,
    log: bool = False,
) -> Markup:
    """Named lines {name: (x, y, half height of the error bar)} of shares, y in percent; `ticks` names places on x.

    Six lines can be told apart; further ones repeat colours.
    """
    looks = [(ACCENT, "o-"), (WRONG, "s-"), (_GOLD, "^-"), (MUTED, "D--"), (ACCENT, "v:"), (WRONG, "P:")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SMALL, layout="constrained")
        axes = figure.subplots()
        for number, (name, (x, y, error)) in enumerate(lines.items()):
            colour, style = looks[number % len(looks)]
            bars = np.nan_to_num(np.asarray(error, float))
            axes.errorbar(np.asarray(x, float), np.asarray(y, float), bars, fmt=style, color=colour, label=name, markersize=4)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        if log:
            axes.set_xscale("log")
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=8.5)
        return svg(figure, title)


def calibration(bins: Sequence[CalibrationBin]) -> Markup:
    """Reliability diagram: how often right against how sure, above the number of answers per bin."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 4.0), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        filled = [part for part in bins if part.count]
        top.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
        sure, right, counts = (np.array([getattr(b, name) for b in filled]) for name in ("confidence", "accuracy", "count"))
        top.vlines(sure, sure, right, color=WRONG, linewidth=1)
        top.scatter(sure, right, s=12 + 48 * counts / counts.max(), color=ACCENT, zorder=3, linewidth=0)
        top.set(ylim=(-0.03, 1.03), ylabel="how often right")
        top.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        middles, width = [(b.low + b.high) / 2 for b in bins], bins[0].high - bins[0].low
        bottom.bar(middles, [b.count for b in bins], width * 0.86, color=ACCENT, linewidth=0)
        bottom.set(xlim=(0, 1), xlabel="how sure the model was", ylabel="answers")
        bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        bottom.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        return svg(figure, "calibration diagram")


def distances(layers: Sequence[Float[Tensor, " _"]], even: Sequence[float], unit: str = "pixels") -> Markup:
    """Mean attention distance of every head, layer by layer; `even`: if all patches in reach got the same."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SMALL, layout="constrained")
        axes = figure.subplots()
        plot_distances(axes, layers, even, ACCENT, MUTED)
        axes.set_xlabel("layer")
        axes.set_title(f"Mean distance in {unit}")
        return svg(figure, f"mean attention distance in {unit} by layer")


def spread_over_time(maps: Mapping[str, tuple[Float[Tensor, " e"], Float[Tensor, " t"]]], frames: int, name: str) -> Markup:
    """How maps {name: (edges, shares)} of a clip spread over its frames; `name`: the clip, for who cannot see the chart."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 1.7), layout="constrained")
        plot_over_time(figure.subplots(), maps, frames, (ACCENT, _GOLD, MUTED))
        return svg(figure, f"attention over time, {name}")


def plot_over_time(
    axes: Axes, maps: Mapping[str, tuple[Float[Tensor, " e"], Float[Tensor, " t"]]], frames: int, tones: Sequence[str]
) -> None:
    """Each map's share per frame: bars of the first one, steps of the others, and dotted what all frames alike would get."""
    highest = 0.0
    for number, (name, (edges, shares)) in enumerate(maps.items()):
        # Every frame belongs to the nearest cell, so the outermost cells reach to both ends.
        inside = torch.cat([edges.new_tensor([0.5]), edges[1:-1], edges.new_tensor([frames + 0.5])])
        values, tone = (shares / inside.diff()).numpy(), tones[number % len(tones)]
        if number == 0:
            axes.stairs(values, inside.numpy(), fill=True, color=tone, alpha=0.45, label=name, linewidth=0)
        else:
            axes.stairs(values, inside.numpy(), color=tone, label=name, linewidth=1.8, linestyle="-" if number == 1 else "--")
        highest = max(highest, float(values.max()))
    axes.axhline(1 / frames, color=tones[-1], linewidth=1, linestyle=":")
    axes.set(xlim=(0.5, frames + 0.5), ylim=(0, 1.12 * max(highest, 1 / frames)), xlabel="frame", ylabel="per frame")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1, 1))


def plot_distances(axes: Axes, layers: Sequence[Float[Tensor, " _"]], even: Sequence[float], tone: str, grey: str) -> None:
    """A dot for every head, a line through the layers' means, and dashed what attention to all in reach alike would give."""
    depth = np.arange(1, len(layers) + 1)
    for layer, heads in zip(depth, layers, strict=True):
        axes.scatter([layer] * len(heads), heads.tolist(), s=18, color=tone, alpha=0.75, linewidth=0)
    edges = np.repeat(np.arange(len(layers) + 1) + 0.5, 2)[1:-1]
    axes.plot(edges, np.repeat(even, 2), linestyle="--", color=grey, linewidth=1)
    axes.plot(depth, [float(heads.mean()) for heads in layers], color=tone, linewidth=1)
    highest = max(*even, *(float(heads.max()) for heads in layers))
    axes.set(ylim=(0, 1.08 * max(highest, 1e-6)), xlim=(0.5, len(layers) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def similar_order(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of the classes that puts those confused with each other side by side.

    Spectral ordering (Atkins et al., SIAM J. Comput. 28, 1998): along the second eigenvector of the graph's Laplacian.
    """
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    mixed = shares + shares.T
    np.fill_diagonal(mixed, 0)
    mixed += 1e-6  # joins classes that are confused with nothing, so that the graph has one component
    laplacian = np.diag(mixed.sum(1)) - mixed
    return np.argsort(np.linalg.eigh(laplacian)[1][:, 1], kind="stable")


def confusion_chart(confusion: NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """A matrix for many classes in `similar_order`: the colour is a row's share, the diagonal in the accent, errors in red."""
    order = similar_order(confusion)
    counts = confusion[order][:, order]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.diag(np.diag(shares))
    pixels = np.where(right[..., None] > 0, [*_CELL_RIGHT, 0.0], [*_CELL_WRONG, 0.0])
    pixels[..., 3] = np.where(shares > 0, 0.15 + 0.85 * (right + np.sqrt(shares - right)), 0.0)
    named = len(classes) <= 60
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(7.6, 7.4), layout="constrained")
        axes = figure.subplots()
        axes.imshow(pixels.clip(0, 1), interpolation="none", aspect="equal")
        names = [str(classes[i])[:24] for i in order] if named else []
        size = max(5.0, min(9.0, 300 / len(classes)))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set(xlabel="answer", ylabel="truth")
        return svg(figure, "confusion matrix")


def light(style: Mapping[Any, Any]) -> dict[Any, Any]:
    """The settings of `style` that name a placeholder, with the colour of a light page instead: for files outside of pages."""
    return {name: LIGHT[value] for name, value in style.items() if isinstance(value, str) and value in LIGHT}


def svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG: the page's colours, no fixed size, no ids that could meet another figure's."""
    buffer = io.StringIO()
    empty: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}), warnings.catch_warnings():
        # Matplotlib measures with its own font, which lacks some scripts; the browser draws with the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group() if found.group(1) in used else "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening(label), text, count=1)
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    return Markup(text)


def _opening(label: str) -> str:
    kind = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return rf'<svg class="chart" role="img" aria-label="{Markup.escape(label)}" viewBox="\1" {kind}>'


def data_uri(picture: UInt8[Tensor, "c h w"] | Image.Image, side: int = 224) -> str:
    """A picture as a data URI, shrunk so that no side is longer than `side`; small ones keep every pixel."""
    image = picture if isinstance(picture, Image.Image) else to_pil(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= SMALL_PICTURE:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=86)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def still(sample: UInt8[Tensor, "c *t h w"]) -> UInt8[Tensor, "c H W"]:
    """A picture as it is; of a clip four frames, spread over it, in reading order."""
    if sample.ndim == 3:
        return sample
    chosen = torch.linspace(0, sample.shape[1] - 1, 4).round().long()
    first, second, third, fourth = sample[:, chosen].unbind(1)
    return torch.cat([torch.cat([first, second], 2), torch.cat([third, fourth], 2)], 1)


def to_pil(picture: UInt8[Tensor, "c h w"]) -> Image.Image:
    """A picture of any number of channels as grey or RGB: the first three channels, or the first if there are two."""
    array = picture.cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] < 3 else np.ascontiguousarray(array[:3].transpose(1, 2, 0)))


def enlarged(picture: UInt8[Tensor, "c h w"]) -> Image.Image:
    """A picture in colour; a small one with every pixel as a square, so that its longer side has 128 at least."""
    image = to_pil(picture).convert("RGB")
    scale = max(1, -(-SMALL_PICTURE * 2 // max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def overlay(
    picture: UInt8[Tensor, "c h w"], attention: Float[Tensor, "rows columns"], largest: float | None = None
) -> Image.Image:
    """Attention shown as light through the panes of a window: each patch is as bright as its share of the largest one.

    largest: what is as bright as can be, where several pictures share a scale; by default the largest of this one.
    """
    image = enlarged(picture)
    top = float(attention.max()) if largest is None else largest
    strength = (attention / max(top, 1e-12)).float().cpu().numpy()
    panes = Image.fromarray((255 * strength).round().astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    light = np.asarray(panes, dtype=np.float32)[..., None] / 255
    shown = np.asarray(image, dtype=np.float32) * (0.22 + 0.78 * light)
    glow = np.array(_AMBER, np.float32) * 0.65 * light * (1 - shown / 255)  # black glass has to show its light too
    return Image.fromarray((shown + glow).clip(0, 255).astype(np.uint8))
