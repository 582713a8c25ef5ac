"""Each view of one model drawn: blocks for the page, and the same as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.checkpoints.io import replacing, write_text
from vitrail.inspection import charts, clips, draw
from vitrail.inspection.attention import PLAIN, Placed, look, run_recorded, spans
from vitrail.inspection.attention import distance as distance_of
from vitrail.inspection.attention import even_distance as even_of
from vitrail.inspection.gradients import grad_cam, gradient_rollout
from vitrail.inspection.hover import hover_maps
from vitrail.inspection.layers import CKA, logit_lens, run_blocks, token_similarity
from vitrail.inspection.subject import Sample, Subject, token_names
from vitrail.inspection.weights import bias_tables, filter_components, position_similarity

Block = dict[str, Any]  # of the page: kind strip, figure, table, hover or text
PAGE_BYTES = 16_000_000  # of interactive maps


def attention(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Interactive maps of every layer and head."""
    blocks: list[Block] = []
    packed = {}
    chosen = subject.samples[:shown]
    for number, sample in enumerate(chosen):
        maps = hover_maps(subject.model, subject.normalised([sample]), PAGE_BYTES // max(len(chosen), 1))
        route = subject.model.attention_route(tuple(sample.pixels.shape[1:]))
        by_name = {name.removesuffix(".site"): site for name, site in route.sites.items()}
        for layer in maps["layers"]:
            layer["tokens"] = token_names(by_name[layer["name"]].asking, route.readout)
        packed[sample.name] = maps
        tiles = route.first.grid[0] if sample.pixels.ndim == 4 else 1
        frames = clips.frames_of(sample.pixels, tiles)
        coarse = max(layer["every"] for layer in maps["layers"])
        payload = {**maps, "frames": [draw.data_uri(frame, 448) for frame in frames]}
        note = "" if coarse == 1 else (
            f"Too many tokens to keep every map in this page: in some layers one patch in {coarse} along each side can be "
            "asked, and the nearest of these answers."
        )  # fmt: skip
        blocks.append({"kind": "hover", "name": sample.name, "sample": number, "note": note, "json": _script_json(payload)})
    write_text(out / "attention.json", json.dumps(packed) + "\n")
    return blocks


def rollout(subject: Subject, out: Path, shown: int) -> list[Block]:
    """The last layer's attention and rollout with and without the shortcut, over the pictures."""
    blocks: list[Block] = []
    rows = []
    for sample in subject.samples[:shown]:
        inputs = subject.normalised([sample])
        whole, plain = look(subject.model, inputs), look(subject.model, inputs, PLAIN)
        assert whole is not None
        assert plain is not None
        maps = {"last layer": whole.last, "rollout": whole.rollout, "rollout without shortcut": plain.rollout}
        blocks += _strip(subject, sample, maps, out, "rollout")
        rows += [row for what, placed in maps.items() for row in _shares(sample.name, what, placed)]
    _write_csv(out / "rollout.csv", ("picture", "map", "frame", "row", "column", "share"), rows)
    return blocks


def relevance(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Grad-CAM, and where there is a path of attention rollout weighted by gradients, of the likeliest class."""
    blocks: list[Block] = []
    rows = []
    route = subject.model.attention_route(subject.model.input_shape[1:])
    for sample in subject.samples[:shown]:
        inputs = subject.normalised([sample])
        with torch.no_grad():
            answer = subject.model.eval()(inputs).argmax(1)
        maps = {"Grad-CAM": grad_cam(subject.model, inputs, answer)}
        if route.readout:
            maps["gradient-weighted rollout"] = gradient_rollout(subject.model, inputs, answer)
        blocks += _strip(subject, sample, maps, out, "relevance")
        rows += [row for what, placed in maps.items() for row in _shares(sample.name, what, placed)]
    _write_csv(out / "relevance.csv", ("picture", "map", "frame", "row", "column", "value"), rows)
    return blocks


def distance(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Mean attention distance by head and layer over all samples, in pixels and in frames."""
    sites = subject.model.attention_route(tuple(subject.samples[0].pixels.shape[1:])).sites
    axes = {"space": "pixels", "time": "frames"}
    reach = {name: dict(zip(("time", "space"), spans(site), strict=True)) for name, site in sites.items()}
    far: dict[str, dict[str, list[Tensor]]] = {axis: {} for axis in axes}

    def reduce(name: str, weights: Tensor) -> Tensor:
        if sites[name].asking.tokens > sites[name].asking.prefix:
            for axis in axes:
                if reach[name][axis]:
                    far[axis].setdefault(name, []).append(distance_of(weights, sites[name], axis).cpu())
        return weights[:0]

    with torch.no_grad():
        for sample in subject.samples:
            run_recorded(subject.model, subject.normalised([sample]), reduce)
    blocks, rows = [], []
    for axis, unit in axes.items():
        if not far[axis]:
            continue
        means = {name: torch.cat(values).mean(0) for name, values in far[axis].items()}
        even = [even_of(sites[name], axis) for name in means]
        for (name, heads), reached in zip(means.items(), even, strict=True):
            rows += [(axis, name, head, f"{value:.4f}", f"{reached:.4f}") for head, value in enumerate(heads.tolist())]
        blocks.append(_figure(lambda m=means, e=even, u=unit: charts.distance_figure(list(m.values()), e, u),  # type: ignore[misc]
                              f"mean attention distance in {unit}", out / f"distance-{axis}"))  # fmt: skip
    _write_csv(out / "distance.csv", ("axis", "site", "head", "distance", "even"), rows)
    return blocks


def filters(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Principal components of the first layer's filters."""
    found = filter_components(subject.model)
    picture = charts.mosaic(charts.filter_tiles(found.components), 7, 48)
    _save(picture, out / "filters.png")
    rows = [(number + 1, f"{share:.6f}") for number, share in enumerate(found.variance.tolist())]
    _write_csv(out / "filters.csv", ("component", "share of variance"), rows)
    what = f"{len(rows)} components of {found.name}, {100 * float(found.variance.sum()):.1f} % of the variance"
    return [{"kind": "strip", "title": "", "pictures": [_picture(picture, what, 640)], "wide": True}]


def positions(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Cosine similarity of every position with all others; for clips also of frames."""
    blocks: list[Block] = []
    rows: list[Sequence[Any]] = []
    for number, found in enumerate(position_similarity(subject.model)):
        if found.space is not None:
            tiles, columns = charts.position_tiles(found.space)
            picture = charts.mosaic(tiles, columns, 40)
            _save(picture, out / f"positions-{number}.png")
            blocks.append({"kind": "strip", "title": "", "pictures": [_picture(picture, found.name, 720)], "wide": True})
            rows += [(found.name, what, f"{value:.4f}") for what, value in found.structure().items()]
        if found.time is not None:
            matrix = found.time
            blocks.append(_figure(lambda m=matrix: charts.heat_figure(m, "Frames alike", "frame", "frame", -1.0, 1.0),  # type: ignore[misc]
                                  "similarity of frame positions", out / f"positions-{number}-time"))  # fmt: skip
    _write_csv(out / "positions.csv", ("table", "compared with places of", "mean cosine similarity"), rows)
    if rows:
        columns_ = ["table", "compared with places of", "mean cosine similarity"]
        blocks.append({"kind": "table", "columns": columns_, "rows": rows})
    return blocks


def biases(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Every table of relative position as pictures, a tile per head."""
    pictures: list[dict[str, str]] = []
    rows: list[Sequence[Any]] = []
    for table in bias_tables(subject.model):
        largest = table.contrast.abs().max().item()
        picture = charts.mosaic([charts.signed_tile(head, largest) for head in table.contrast], 4, 64)
        _save(picture, out / f"bias-{table.name}.png")
        pictures.append(_picture(picture, f"{table.name}: {table.unit}, up to {largest:.2f}", 640))
        rows += [(table.name, head, y, x, f"{value:.5f}") for head, part in enumerate(table.heads)
                 for y, line in enumerate(part.tolist()) for x, value in enumerate(line)]  # fmt: skip
    _write_csv(out / "biases.csv", ("table", "head", "row", "column", "value"), rows)
    return [{"kind": "strip", "title": "", "wide": False, "pictures": pictures}]


def tokens(subject: Subject, out: Path, shown: int) -> list[Block]:
    """Cosine similarity of class and distillation token after every block, mean over all samples."""
    found = [token_similarity(subject.model, subject.normalised([sample])) for sample in subject.samples]
    means = {name: float(torch.cat([part[name] for part in found]).mean()) for name in found[0]}
    _write_csv(out / "tokens.csv", ("block", "cosine similarity"), [(n, f"{v:.4f}") for n, v in means.items()])
    line = {"class and distillation token": list(means.values())}
    title = "Cosine similarity of the two tokens"
    return [_figure(lambda: charts.depth_figure(line, title), title, out / "tokens")]


def lens(subject: Subject, out: Path, shown: int) -> list[Block]:
    """What the classifier says after every block that it can read, for the pictures shown."""
    rows: list[Sequence[Any]] = []
    depth: dict[str, list[float]] = {}
    try:
        for sample in subject.samples[:shown]:
            read = logit_lens(subject.model, subject.normalised([sample]))
            answer = int(read[-1].logits[0].argmax())
            depth[sample.name] = []
            for entry in read:
                shares = entry.logits[0].softmax(0)
                depth[sample.name].append(float(shares[answer]))
                best = int(shares.argmax())
                rows.append((sample.name, entry.name, subject.classes[best], f"{float(shares[best]):.3f}",
                             f"{float(shares[answer]):.3f}"))  # fmt: skip
    except ValueError as reason:
        return [{"kind": "text", "text": f"Not shown: {reason}."}]
    columns = ["picture", "block", "says", "probability", "of the final answer"]
    _write_csv(out / "lens.csv", columns, rows)
    return [{"kind": "table", "columns": columns, "rows": rows}]


def cka(subject: Subject, out: Path, shown: int, other: Subject | None = None) -> list[Block]:
    """How alike the states after all blocks are, of one model or between two, over the same samples."""
    partner = other or subject
    found, count = CKA(), min(len(subject.samples), len(partner.samples))
    batches = [range(start, min(start + 16, count)) for start in range(0, count, 16)]
    for batch in batches if len(batches) == 1 else [b for b in batches if len(b) >= 4]:
        passed = [run_blocks(one.model, one.normalised([one.samples[i] for i in batch])) for one in (subject, partner)]
        found.add(passed[0], passed[1], len(batch))
    matrix = found.result()
    name = "cka" if other is None else "cka-between"
    rows = [(one, two, f"{matrix[i, j]:.4f}") for i, one in enumerate(found.names[0]) for j, two in enumerate(found.names[1])]
    _write_csv(out / f"{name}.csv", (subject.name, partner.name, "CKA"), rows)
    across = f"blocks of {partner.name}", f"blocks of {subject.name}"
    title = f"Linear CKA, {count} {'clips' if subject.preprocess.frames else 'pictures'}"
    return [_figure(lambda: charts.heat_figure(matrix, title, *across, 0.0, 1.0), title, out / name)]


DRAWERS: dict[str, Callable[[Subject, Path, int], list[Block]]] = {
    "attention": attention, "rollout": rollout, "relevance": relevance, "distance": distance, "filters": filters,
    "positions": positions, "biases": biases, "tokens": tokens, "lens": lens, "cka": cka,
}  # fmt: skip


def _strip(subject: Subject, sample: Sample, maps: dict[str, Placed], out: Path, kind: str) -> list[Block]:
    """The sample and each map over it; of a clip, frames beside each other on one scale, and their share over time."""
    stem, clip = f"{kind}-{Path(sample.name).stem}", sample.pixels.ndim == 4
    shown = len(clips.frames_shown(sample.pixels, maps))
    pictures = []
    for what, picture in clips.strips(sample.pixels, maps).items():
        if what == clips.INPUT:
            what = clips.numbered(sample.pixels, maps)
        else:
            _save(picture, out / f"{stem}-{what.lower().replace(' ', '-')}.png")
        pictures.append(_picture(picture, what, 320 * min(shown, clips.ACROSS)))
    with torch.no_grad():
        logits = subject.model.eval()(subject.normalised([sample]))[0] if subject.classes else None
    title = sample.name
    if logits is not None:
        best = logits.softmax(0).topk(min(3, len(logits)))
        said = ", ".join(f"{subject.classes[int(i)]} {100 * float(p):.1f} %" for p, i in zip(*best, strict=True))
        title = f"{sample.name}: {said}"
    blocks: list[Block] = [{"kind": "strip", "title": title, "pictures": pictures, "wide": shown > 1}]
    if clip and max(placed.cells.grid[0] for placed in maps.values()) > 1:
        spread = {what: clips.over_time(placed) for what, placed in maps.items()}
        frames, name = sample.pixels.shape[1], f"Over time, {sample.name}"
        blocks.append(_figure(lambda: charts.time_figure(spread, frames, "Share of each frame"), name, out / f"{stem}-time"))
    return blocks


def _picture(picture: Image.Image, what: str, side: int) -> dict[str, str]:
    return {"uri": draw.data_uri(picture.copy(), side), "what": what}


def _figure(make: Callable[[], Any], title: str, path: Path) -> Block:
    return {"kind": "figure", "svg": charts.publish(make, title, path)}


def _shares(name: str, what: str, placed: Placed) -> list[Sequence[Any]]:
    values = np.round(placed.shares[0].cpu().numpy().astype(float), 6)
    return [(name, what, *place, f"{value:.6g}") for place, value in np.ndenumerate(values)]


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
