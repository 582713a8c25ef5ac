"""Judge backbones by what simple classifiers make of their frozen features: which one to fine-tune, and what it should give."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.checkpoints import create_model, load_model
from vitrail.checkpoints import pretrained as published
from vitrail.checkpoints.hub import is_remote
from vitrail.checkpoints.weights import SUFFIXES
from vitrail.config import ConfigError, DataConfig, Preprocess, nearest, unknown
from vitrail.cost import count_flops, count_parameters, pick_device, pick_precision
from vitrail.data import Data, ImageDataset, open_data
from vitrail.evaluation import fewshot, knn, linear
from vitrail.evaluation.features import Features, cache_folder, extract_features
from vitrail.evaluation.probe_report import Backbone, ProbeReport, Score
from vitrail.models import MODELS, Model

METHODS = ("ridge", "knn", "logistic", "sgd")
DEFAULTS = {"ridge": fewshot.L2, "knn": 10.0, "logistic": 1e-2, "sgd": 0.1}  # where nothing is left to choose a setting on
ALL = 0  # the number of shots that stands for all training samples
_HELD = 0.15  # of the training samples, to choose settings on where the data has no split for it


@dataclass(frozen=True)
class Pools:
    """Features to learn from, to choose a method's setting on (None: there are too few), and to judge on."""

    train: Features
    choose: Features | None
    test: Features


def probe(
    models: Any,
    data: Any,
    *,
    shots: Sequence[int] = fewshot.SHOTS,
    full: bool = True,
    seeds: int = 5,
    methods: Sequence[str] = METHODS,
    image_size: int | tuple[int, int] | None = None,
    cache: str | Path | None = "",
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = -1,
    progress: bool = True,
    **settings: Any,
) -> ProbeReport:
    """What frozen features of one or several models give on a data set, few-shot and with all training samples.

    models: a model, a run, checkpoint, hub id, URL or registered name (its published weights), several of them, or {label:
    any of these}. data: anything a run takes, or opened `Data`; `settings` are fields of `DataConfig`. methods: `ridge` (the
    ViT paper's closed form), `knn`, `logistic`, `sgd`, each with a sweep of its one setting, chosen on validation samples and
    judged on the test split (where there is none, on validation, and chosen on a part of the training samples). shots: per
    class, drawn `seeds` times; full: learn from all training samples too. cache: folder of kept features, "" for the user's
    cache, None for none. Raises ConfigError for data without a class per sample, classes without training samples, features
    that are not finite, and unknown names.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if seeds < 1 or not (shots or full):
        raise ConfigError(f"there is nothing to learn from: shots {tuple(shots)}, full {full}, {seeds} seeds")
    sources = _labelled(models)
    for source in sources.values():  # named wrongly, the last of them would be found out after all others were judged
        check_backbone(source)
    opened = data if isinstance(data, Data) else open_data(data, _data_config(settings))
    train, choose, test, notes = _pools(opened)
    where = pick_device(device)
    folder = None if cache is None else Path(cache) if cache else cache_folder()
    asked: dict[str, Any] = {
        "cache": folder, "device": where, "precision": pick_precision(precision, where), "batch_size": batch_size,
        "workers": workers,
    }  # fmt: skip
    backbones, scores, right = [], [], {}
    for label, source in sources.items():
        start = time.perf_counter()
        model = open_backbone(source, image_size)
        preprocess = preprocessing(model)
        found = [
            extract_features(model, part, preprocess, progress=f"{label}: {name} features" if progress else None, **asked)
            for name, part in (("train", train), ("validation", choose), ("test", test))
            if part is not None
        ]
        seconds = time.perf_counter() - start
        pools = _pooled(found, opened.classes)
        backbones.append(Backbone(
            label, model.family, count_parameters(model), count_flops(model), preprocess.image_size,
            pools.train.features.shape[1], seconds, all(part.kept for part in found),
        ))  # fmt: skip
        for score, hits in _scores(label, pools, len(opened.classes), tuple(shots), full, seeds, methods):
            scores.append(score)
            right[label, score.method, score.shots] = hits
    sizes = {"train": len(pools.train.targets), "choose": len(pools.choose.targets) if pools.choose else 0}
    return ProbeReport.made(
        data=opened.name, classes=opened.classes, sizes={**sizes, "test": len(pools.test.targets)},
        judged_on="test" if opened.test is not None else "validation", seeds=seeds, backbones=tuple(backbones),
        scores=tuple(scores), right=right, notes=(*opened.notes, *notes),
    )  # fmt: skip


def open_backbone(source: Any, image_size: int | tuple[int, int] | None = None) -> Model:
    """A model from whatever names one: itself, a registered name with its published weights, or what `load_model` takes."""
    if isinstance(source, Model):
        return source
    changes: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
    name, _, tag = str(source).partition(".")
    if name in MODELS and not Path(source).exists():
        return create_model(name, tag or True, quiet=True, **changes)
    return load_model(source, quiet=True, **changes)


def check_backbone(source: Any) -> None:
    """Raises ConfigError for a name without published weights, and for a path that does not exist."""
    if not isinstance(source, (str, Path)) or Path(source).expanduser().exists():
        return
    name, _, tag = str(source).partition(".")
    if name in MODELS:
        published.choose(name, tag)
    elif not is_remote(str(source)):  # what is there, only the network knows
        raise ConfigError(f"{source}: no such file, folder or model; nearest: {', '.join(nearest(str(source), MODELS))}")


def preprocessing(model: Model) -> Preprocess:
    """How samples enter: as the model's card says, or plainly at the size it was built for."""
    return (model.card.preprocess if model.card else None) or Preprocess(
        image_size=model.config.image_size,
        channels=model.config.in_channels,
        frames=model.input_shape[1] if model.takes_clips else 0,
    )


def _data_config(settings: Mapping[str, Any]) -> DataConfig:
    names = list(DataConfig.__dataclass_fields__)
    for name in settings:
        if name not in names:
            raise unknown("setting", name, names)
    return DataConfig(**settings)


def _labelled(models: Any) -> dict[str, Any]:
    """{label: source}, labels as short as they can be told apart."""
    if isinstance(models, Mapping):
        return dict(models)
    sources = list(models) if isinstance(models, (list, tuple)) else [models]
    long = [(s.name or s.family) if isinstance(s, Model) else str(s).rstrip("/") for s in sources]
    short = [Path(text).stem if Path(text).suffix in SUFFIXES else Path(text).name for text in long]
    labels = short if len(set(short)) == len(short) else long
    if len(set(labels)) < len(labels):
        raise ConfigError(f"the same model is named twice: {', '.join(labels)}; give them as {{label: model}}")
    return dict(zip(labels, sources, strict=True))


def _pools(data: Data) -> tuple[ImageDataset, ImageDataset | None, ImageDataset, tuple[str, ...]]:
    """The splits to learn from, to choose on and to judge on, and what to say about them."""
    if data.multi_label:
        raise ConfigError(f"a probe needs one class per sample; {data.name} gives several labels")
    test = data.test if data.test is not None else data.val
    if data.train is None or test is None:
        missing = "learn from" if data.train is None else "judge on"
        raise ConfigError(f"{data.name} has nothing to {missing}; a probe needs both")
    choose = data.val if data.val is not None and data.val is not test else None
    notes: tuple[str, ...] = ()
    if choose is None:
        notes = (f"no split to choose settings on: {_HELD:.0%} of the training samples of each class serve, and teach nothing",)
    return data.train, choose, test, notes


def _pooled(found: Sequence[Features], classes: Sequence[str]) -> Pools:
    train, test = found[0], found[-1]
    if len(found) == 3:
        fewshot.refuse_empty(train.targets.numpy(), classes)
        return Pools(train, found[1], test)
    held = _held_out(train.targets.numpy(), len(classes))
    kept, chosen = (_rows(train, torch.from_numpy(rows)) for rows in (~held, held))
    fewshot.refuse_empty(kept.targets.numpy(), classes)
    return Pools(kept, chosen if held.any() else None, test)


def _rows(found: Features, rows: Tensor) -> Features:
    return Features(found.features[rows], found.targets[rows], found.indices[rows], found.kept)


def _held_out(targets: NDArray[np.int64], classes: int) -> NDArray[np.bool_]:
    """A fixed share of every class, rounded down: a class keeps at least one sample."""
    rng, held = np.random.default_rng(0), np.zeros(len(targets), bool)
    for number in range(classes):
        members = rng.permutation(np.flatnonzero(targets == number))
        held[members[: int(_HELD * len(members))]] = True
    return held


def _scores(
    label: str, pools: Pools, classes: int, shots: tuple[int, ...], full: bool, seeds: int, methods: Sequence[str]
) -> Iterator[tuple[Score, Bool[Tensor, " m"]]]:
    """Every method at every number of shots, its setting chosen; and which test samples the first draw got right."""
    targets, names = pools.train.targets.numpy(), [str(number) for number in range(classes)]
    for count in (*shots, *((ALL,) if full else ())):
        draws = [fewshot.draw_shots(targets, names, count, seed) for seed in range(seeds if count else 0)]
        subsets = [torch.from_numpy(rows) for rows in draws] or [torch.arange(len(targets))]
        for method in methods:
            tables = [_accuracies(method, pools, rows, classes, seed) for seed, rows in enumerate(subsets)]
            settings = list(tables[0])
            chosen = {s: [float(t[s][0].float().mean()) for t in tables] for s in settings if pools.choose is not None}
            judged = {s: [float(t[s][1].float().mean()) for t in tables] for s in settings}
            best = _choose(method, {s: fmean(values) for s, values in chosen.items()}) if chosen else DEFAULTS[method]
            yield Score(label, method, count, best, tuple(judged[best]), judged, chosen), tables[0][best][1]


def _choose(method: str, accuracies: Mapping[float, float]) -> float:
    """The best setting; among equals the one nearest to the default."""
    top = max(accuracies.values())
    return min((s for s, a in accuracies.items() if a == top), key=lambda s: abs(np.log(s / DEFAULTS[method])))


def _accuracies(
    method: str, pools: Pools, rows: Int[Tensor, " n"], classes: int, seed: int
) -> dict[float, tuple[Bool[Tensor, " v"], Bool[Tensor, " m"]]]:
    """{setting: (right on the choosing samples, right on the test samples)} of a method that learned from some rows."""
    x, y = pools.train.features[rows], pools.train.targets[rows]
    asked = [pools.choose or pools.test, pools.test]
    sizes = [len(part.targets) for part in asked]
    queries, truth = torch.cat([part.features for part in asked]), torch.cat([part.targets for part in asked])
    found: dict[float, Any] = {}
    for setting, scores in _answers(method, x, y, queries, classes, seed):
        found[setting] = (scores.argmax(1) == truth).split(sizes)
    return found


def _answers(
    method: str, x: Float[Tensor, "n c"], y: Int[Tensor, " n"], queries: Float[Tensor, "m c"], classes: int, seed: int
) -> Iterator[tuple[float, Tensor]]:
    """(setting, scores of the queries) over the method's sweep."""
    if method == "ridge":
        yield from zip(fewshot.L2_SWEEP, fewshot.Ridge(x, y, classes).sweep(queries, fewshot.L2_SWEEP), strict=True)
        return
    if method == "knn":
        ks = [float(k) for k in knn.K_SWEEP]
        yield from zip(ks, knn.knn_scores(x, y, queries, classes, knn.K_SWEEP), strict=True)
        return
    standardise = linear.Standardise(x)
    x, queries = standardise(x), standardise(queries)
    sweep = linear.logistic_sweep(x, y, classes) if method == "logistic" else linear.sgd_sweep(x, y, classes, seed=seed)
    for setting, weight, bias in sweep:
        yield setting, queries @ weight.T + bias
