"""How trained models stand corrupted, moved, covered and shuffled pictures: the tests of their inductive biases."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.config import ConfigError, unknown
from vitrail.studies.statistics import by
from vitrail.studies.study import Chart, Findings, JudgeConfig, Row, Series, Table, directory

EXAMPLES = """\
vitrail study robustness photos/ --runs runs/photos-resnet18 runs/photos-vit_tiny_patch16_224
vitrail study robustness photos/ --runs runs/a runs/b --corruptions shift occlusion shuffle"""

BIASES = {
    "shift": "moved pictures", "occlusion": "covered patches", "shuffle": "shuffled patches",
}  # fmt: skip


@dataclass(frozen=True)
class Config(JudgeConfig):
    """Compare trained models on their test pictures made worse in five steps; nothing is trained."""

    runs: tuple[str, ...] = ()  # run directories or checkpoints whose classes are those of the data
    corruptions: tuple[str, ...] = ()  # which, by default all: eight common ones, shift, occlusion, shuffle
    split: str = ""  # test, val or train; by default test where there is one, then val


def measure(config: Config) -> list[Row]:
    """Judge every run on every corruption and level, or read what was judged before. Prints progress."""
    from vitrail.checkpoints import load_model
    from vitrail.checkpoints.io import read_json, write_text
    from vitrail.studies.corruptions import CORRUPTIONS, LEVELS

    if not config.runs:
        raise ConfigError("--runs names no trained model: give one or more run directories or checkpoints")
    for name in config.corruptions:
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)
    wanted = [("none", 0), *((name, level) for name in config.corruptions or tuple(CORRUPTIONS) for level in LEVELS)]
    out, rows = directory("robustness", config), []
    for label, run in labels(config.runs).items():
        path = out / f"{label}.json"
        asked = {"weights": digest(run), "data": config.data, "split": config.split}
        known = read_json(path)
        done: list[Row] = known["rows"] if known and known["asked"] == asked else []  # of other weights: judged again
        model = dataset = None
        for name, level in wanted:
            if any((row["corruption"], row["level"]) == (name, level) for row in done):
                continue
            if model is None:
                model = load_model(run, quiet=True)
                dataset = _pictures(config, model)
            print(f"{label}: {name} {level or ''}", flush=True)
            done.append(
                {"model": label, "corruption": name, "level": level, **judge(model, dataset, config.batch_size, name, level)}
            )
            write_text(path, json.dumps({"asked": asked, "rows": done}, indent=1) + "\n")
        rows += [row for row in done if (row["corruption"], row["level"]) in wanted]
    _write_examples(config, out, [name for name, level in wanted if level == LEVELS[2]])
    return rows


def labels(runs: Sequence[str]) -> dict[str, str]:
    """{short name: run}: the last part of each path, more of it where two are alike."""
    found: dict[str, str] = {}
    for run in dict.fromkeys(runs):
        parts = [part for part in Path(run).parts if part not in ("/", ".", "..")]
        length = next((k for k in range(1, len(parts) + 1) if "-".join(parts[-k:]) not in found), len(parts))
        found["-".join(parts[-length:])] = run
    return found


def digest(run: str) -> str:
    """A short text that changes with the weights of a run directory or a checkpoint. Raises ConfigError if there are none."""
    path = Path(run)
    files = [path] if path.is_file() else [*sorted((path / "model").rglob("*")), *sorted(path.glob("*.safetensors"))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ConfigError(f"{run} holds no weights: give a run directory or a checkpoint on this machine")
    mixed = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as opened:
            mixed.update(hashlib.file_digest(opened, "blake2b").digest())
    return mixed.hexdigest()


def judge(model: Any, dataset: Any, batch_size: int, name: str, level: int) -> Row:
    """Accuracy on the corrupted pictures, with a 95 % Wilson interval."""
    import torch

    from vitrail.data import eval_batches
    from vitrail.data.transforms import Normalise
    from vitrail.studies.corruptions import corrupt

    normalise, right, n = Normalise(model.card.preprocess), 0, 0
    with torch.inference_mode():
        for batch in eval_batches(dataset, preprocess=model.card.preprocess, batch_size=batch_size, workers=0):
            images = corrupt(batch.images, name, level, int(batch.indices[0]))
            right += int((model.eval()(normalise(images)).argmax(1) == batch.targets).sum())
            n += len(batch.targets)
    low, high = wilson(right, n)
    return {"top1": right / n, "low": low, "high": high, "n": n}


def _pictures(config: Config, model: Any) -> Any:
    """The split of the data that judges. Raises ConfigError for models that do not fit it."""
    from vitrail.data import open_data

    if model.card is None or not model.card.classes or model.card.preprocess is None:
        raise ConfigError("a model without class names and preprocessing cannot be judged; give a run of vitrail train")
    if model.takes_clips or model.card.multi_label:
        raise ConfigError("robustness is measured on pictures with one class each")
    data = open_data(config.data, classes=model.card.classes)
    there = {split: data.splits()[split] for split in ("test", "val", "train") if split in data.splits()}
    split = config.split or next(iter(there))
    if split not in there:
        raise ConfigError(f"{data.name} has no split {split!r}; it has: {', '.join(there)}")
    return there[split]


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.96
    middle = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return middle - half, middle + half


def _write_examples(config: Config, out: Path, names: Sequence[str]) -> None:
    """One picture under every corruption at the middle level, as data URIs for the page."""
    from vitrail.checkpoints import load_model
    from vitrail.checkpoints.io import read_json, write_text
    from vitrail.data import eval_batches
    from vitrail.inspection.draw import data_uri
    from vitrail.studies.corruptions import LEVELS, corrupt

    path = out / "examples.json"
    if (known := read_json(path)) and list(known) == ["none", *names]:
        return
    model = load_model(config.runs[0], quiet=True)
    batches = eval_batches(_pictures(config, model), preprocess=model.card.preprocess, batch_size=1, workers=0)
    image = next(iter(batches)).images
    shown = {"none": data_uri(image[0]), **{name: data_uri(corrupt(image, name, LEVELS[2])[0]) for name in names}}
    write_text(path, json.dumps(shown) + "\n")


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """Which model keeps most of its accuracy, over the common corruptions and in each test of a bias."""
    models = by(rows, "model")
    clean = {name: next(row for row in group if not row["level"]) for name, group in models.items()}
    kinds = list(dict.fromkeys(row["corruption"] for row in rows if row["level"]))
    kept = {
        name: {
            kind: _mean(row["top1"] for row in group if row["corruption"] == kind) / max(clean[name]["top1"], 1e-9)
            for kind in kinds
        }
        for name, group in models.items()
    }
    common = [kind for kind in kinds if kind not in BIASES]
    overall = {name: _mean(kept[name][kind] for kind in common or kinds) for name in models}
    ranked = sorted(overall, key=lambda name: -overall[name])
    what = "the common corruptions" if common else "what was tested"
    answer = f"Over {what} {ranked[0]} keeps {overall[ranked[0]]:.0%} of its accuracy"
    answer += f", {', '.join(f'{name} {overall[name]:.0%}' for name in ranked[1:])}." if len(ranked) > 1 else "."
    sentences = [
        f"{name}: {100 * row['top1']:.1f} % on the pictures as they are (n = {row['n']:,})." for name, row in clean.items()
    ]
    for kind in (kind for kind in kinds if kind in BIASES):
        order = sorted(models, key=lambda name: -kept[name][kind])
        sentences.append(f"Of {BIASES[kind]}: {', '.join(f'{name} keeps {kept[name][kind]:.0%}' for name in order)}.")
    if len(models) > 1:
        sentences.append("One run each: the intervals are those of the pictures, not of another training.")
    table = Table(
        "Share of the clean accuracy that is kept, in percent, mean over five levels",
        ["corruption", *models],
        [["clean, top-1", *(f"{100 * clean[name]['top1']:.1f}" for name in models)]]
        + [[kind, *(f"{100 * kept[name][kind]:.0f}" for name in models)] for kind in kinds],
    )
    example = directory("robustness", config) / "examples.json"
    pictures = json.loads(example.read_text()) if example.is_file() else {}
    return Findings(
        answer=answer,
        sentences=sentences,
        tables=[table],
        charts=[_chart(kind, models, clean) for kind in kinds],
        numbers={"clean": {name: row["top1"] for name, row in clean.items()}, "kept": kept, "overall": overall},
        pictures=[{"uri": uri, "name": name} for name, uri in pictures.items()],
        pictures_about="One test picture as it is and under every corruption at the third of five levels.",
    )


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _chart(kind: str, models: Mapping[str, Sequence[Mapping[str, Any]]], clean: Mapping[str, Mapping[str, Any]]) -> Chart:
    series = []
    for name, group in models.items():
        line = [clean[name], *sorted((row for row in group if row["corruption"] == kind), key=lambda row: row["level"])]
        series.append(
            Series(
                name,
                [row["level"] for row in line],
                [row["top1"] for row in line],
                [row["low"] for row in line],
                [row["high"] for row in line],
            )
        )
    return Chart(
        kind, kind.capitalize(), "level", "top-1", series, percent=True, note="Bars: 95 % intervals over the pictures."
    )
