"""What a trained model gives at other picture and patch sizes without training, and at what cost.

Positions are resized, the patch embedding by the pseudo-inverse (FlexiViT, arXiv 2212.08013). Where the classes are those of
the model, its own answers are judged; else a ridge regression on its frozen features, the ViT paper's few-shot measure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.config import ConfigError, to_dict
from vitrail.studies.statistics import by
from vitrail.studies.study import Chart, Findings, JudgeConfig, Row, Series, Table, directory

EXAMPLES = """\
vitrail study resolution photos/ --model runs/photos-vit_tiny_patch16_224
vitrail study resolution photos/ --model checkpoint.safetensors --sizes 160,224,288 --patches 12,16,24"""

POINTS = "points.json"
SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the model's own size, where no sizes are named
CLOSE = 0.01  # accuracies this near to the best count as good as it


@dataclass(frozen=True)
class Config(JudgeConfig):
    """Sweep picture and patch size of one trained model, and plot its accuracy against FLOPs; nothing is trained."""

    model: str = ""  # a run, a checkpoint, a hub id, or a name with published weights
    sizes: tuple[int, ...] = ()  # sides in pixels; by default from half to twice the model's own
    patches: tuple[int, ...] = ()  # sides of patches in pixels; by default the model's own


def measure(config: Config) -> list[Row]:
    """Judge the model at every size, or read what was judged before. Prints progress."""
    from vitrail.checkpoints.io import read_json, write_text
    from vitrail.data import open_data
    from vitrail.evaluation.probing import open_backbone

    if not config.model:
        raise ConfigError("--model names no trained model: give a run, a checkpoint, a hub id or a name with published weights")
    path = directory("resolution", config) / POINTS
    known = read_json(path)
    asked = json.loads(json.dumps({"model": config.model, "data": config.data}))
    if known and known["asked"] != asked:
        raise ConfigError(f"{path} is of another model or other data ({known['asked']}); name another --out")
    data, own = open_data(config.data), open_backbone(config.model)
    sizes, patches = plan(config, own.config.image_size, getattr(own.config, "patch", None))
    rows: list[Row] = list(known["rows"]) if known else []
    done = {(row["size"], row["patch"]) for row in rows}
    for patch in patches:
        for size in sizes:
            if (size, patch) in done or (patch and size % patch):
                continue
            print(f"{size} x {size} pixels" + (f", patches of {patch}" if patch else ""), flush=True)
            rows.append(judge(config, data, own, size, patch))
            write_text(path, json.dumps({"asked": asked, "rows": rows}, indent=1) + "\n")
    return sorted(rows, key=lambda row: (row["patch"], row["size"]))


def plan(config: Config, own: tuple[int, int], patch: tuple[int, int] | None) -> tuple[list[int], list[int]]:
    """Sizes and patches to judge; patch 0 stands for a model without patches. Raises ConfigError for what does not exist."""
    if patch is None and config.patches:
        raise ConfigError(f"{config.model} has no patches, so they cannot be resized; leave --patches out")
    patches = list(config.patches) or ([patch[0]] if patch else [0])
    step = patches[0] if len(patches) == 1 and patches[0] else 1
    sizes = list(config.sizes) or sorted({max(round(share * min(own) / step), 1) * step for share in SHARES})
    if patches != [0] and not any(size % p == 0 for p in patches for size in sizes):
        raise ConfigError(f"none of the sizes {sizes} is a multiple of a patch in {patches}")
    return sizes, patches


def judge(config: Config, data: Any, own: Any, size: int, patch: int) -> Row:
    """One point: the model at a size and patch, its cost and its accuracy."""
    from vitrail.checkpoints import create_model, load_model
    from vitrail.cost import count_flops
    from vitrail.evaluation.classify import evaluate
    from vitrail.evaluation.probing import probe
    from vitrail.models import MODELS

    changes: dict[str, Any] = {"image_size": (size, size), **({"patch": (patch, patch)} if patch else {})}
    name, _, tag = config.model.partition(".")
    if name in MODELS and not Path(config.model).exists():
        model = create_model(name, tag or True, quiet=True, **changes)
    else:
        model = load_model(config.model, quiet=True, **changes)
    flops = count_flops(model)
    row: Row = {
        "data": Path(config.data).name, "model": own.name or own.family, "size": size, "patch": patch,
        "tokens": (size // patch) ** 2 if patch else 0, "flops_picture": flops,
        "own": size == min(own.config.image_size) and patch in (0, getattr(own.config, "patch", (0,))[0]),
    }  # fmt: skip
    if own.card is not None and own.card.classes == data.classes:
        report = evaluate(model, data, batch_size=config.batch_size, workers=0)
        m = report.metrics
        return row | {"judged": "its answers", "top1": m["top1"], "low": m["top1_low"], "high": m["top1_high"], "n": m["n"]}
    found = probe({"model": model}, data, methods=("ridge",), shots=(), batch_size=config.batch_size, workers=0)
    rank = found.ranking[0]
    return row | {
        "judged": "ridge on its features", "top1": rank.accuracy, "low": rank.low, "high": rank.high, "n": found.sizes["test"],
    }  # fmt: skip


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """The best point, the cheapest one about as good, and what leaving the own size costs."""
    best = max(rows, key=lambda row: row["top1"])
    cheap = min((row for row in rows if row["top1"] >= best["top1"] - CLOSE), key=lambda row: row["flops_picture"])
    answer = f"Best: {_said(best)}."
    if cheap is not best:
        share = cheap["flops_picture"] / best["flops_picture"]
        answer += f" Within one point of it at {share:.0%} of the cost: {_said(cheap)}."
    own = [row for row in rows if row["own"]]
    sentences = [f"At its own size: {_said(row)}." for row in own]
    sentences.append(f"Judged by {rows[0]['judged']}, {rows[0]['n']:,.0f} samples; nothing was trained.")
    series = [
        Series(
            f"patch {patch}" if patch else "", [row["flops_picture"] / 1e9 for row in group], [row["top1"] for row in group],
            [row["low"] for row in group], [row["high"] for row in group],
        )
        for patch, group in by(rows, "patch").items()
    ]  # fmt: skip
    table = Table(
        "Top-1 in percent, with 95 % intervals over samples",
        ["size", "patch", "tokens", "GFLOPs a picture", "top-1", "interval"],
        [
            [row["size"], row["patch"] or "", row["tokens"] or "", f"{row['flops_picture'] / 1e9:.3g}",
             f"{100 * row['top1']:.1f}", f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"]
            for row in rows
        ],
    )  # fmt: skip
    chart = Chart("resolution", "Accuracy by cost", "GFLOPs a picture", "top-1", series, logx=True, percent=True)
    return Findings(answer, sentences, [table], [chart], {"points": [to_dict(row) for row in rows]})


def _said(row: Row) -> str:
    patches = f", patches of {row['patch']}" if row["patch"] else ""
    return f"{row['top1']:.1%} at {row['size']} x {row['size']} pixels{patches} ({row['flops_picture'] / 1e9:.3g} GFLOPs)"
