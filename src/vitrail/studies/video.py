"""Every family of video models at equal training cost: who sees the direction of time, and what that costs.

ViViT's four models (arXiv 2103.15691, Table 2), TimeSformer's five schemes (2102.05095, Table 1), MViT (2104.11227) and the
convolutional nets that they are compared with (X3D 2004.04730, SlowFast 1812.03982); and what ViViT and TimeSformer gain by
starting from an image ViT (ViViT, section 3.4 and Table 1).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from vitrail.config import ConfigError, RunConfig, flat, unknown
from vitrail.recipes import RECIPES
from vitrail.recipes.motion import ENCODER
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, directory, train_runs

if TYPE_CHECKING:
    from vitrail.models import Model

EXAMPLES = """\
vitrail study video motion --budget 4e11
vitrail study video motion --contenders vivit --starts random,central_frame,average --image-data emoji
vitrail study video clips/ --contenders vivit,timesformer,mvit,x3d --train sampling=dense stride=4"""

TIMESFORMER: dict[str, Any] = {**ENCODER, "patch": [8, 8], "init": "xavier"}
# name: (recipe, another model than the recipe's, changes of the recipe's model or all settings of the other one)
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vivit": ("motion", "", {}),
    "vivit_encoder": ("motion", "", {"model": "factorised_encoder", "temporal_depth": 1}),
    "vivit_attention": ("motion", "", {"model": "factorised_self_attention", "pool": "mean"}),
    "vivit_product": ("motion", "", {"model": "factorised_dot_product", "pool": "mean"}),
    "timesformer": ("motion", "timesformer_micro", TIMESFORMER),
    "timesformer_space": ("motion", "timesformer_micro", {**TIMESFORMER, "attention": "space"}),
    "timesformer_joint": ("motion", "timesformer_micro", {**TIMESFORMER, "attention": "joint"}),
    "timesformer_local_global": ("motion", "timesformer_micro", {**TIMESFORMER, "attention": "local_global"}),
    "timesformer_axial": ("motion", "timesformer_micro", {**TIMESFORMER, "attention": "axial"}),
    "mvit": ("motion_mvit", "", {}),
    "x3d": ("motion_x3d", "", {}),
    "slowfast": ("motion_slowfast", "", {}),
}
RANDOM, IMAGE = "random", "image"
KERNELS = ("central_frame", "average", "rank_pooling")  # of `inflate`
STARTABLE = tuple(name for name, (recipe, _, _) in CONTENDERS.items() if recipe == "motion")  # ViViT and TimeSformer
OF_CLIPS = ("frames", "sampling", "stride", "fps", "clips", "crops")  # settings that a run on pictures has not
PASSES = 7  # of a batch, to take the median time of


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare video models, trained as the recipe `motion` says, at equal training FLOPs.

    On `motion` it also says how well each tells a motion from its reversal: half of the time, for a model that does not look at
    the order of frames.
    """

    image_size: tuple[int, int] = (32, 32)  # height,width in pixels that models see; one number for a square
    contenders: tuple[str, ...] = tuple(CONTENDERS)  # which of them take part
    starts: tuple[str, ...] = (RANDOM,)
    """random; or from an image ViT, its patch kernel inflated by central_frame, average or rank_pooling."""
    image_data: str = "emoji"  # what the image ViT of each seed is trained on
    image_budget: float = 0.0  # training FLOPs of an image ViT, 0 = as many as a video model's


def plan(config: Config) -> list[Runs]:
    """All contenders from random weights. Raises ConfigError for an unknown one, and where a start does not exist for any."""
    return [Runs(models=_contenders(config))] if RANDOM in config.starts else []


def _contenders(config: Config) -> dict[str, dict[str, Any]]:
    """{name: settings}."""
    for start in config.starts:
        if start not in (RANDOM, *KERNELS):
            raise unknown("start", start, (RANDOM, *KERNELS))
    models = {}
    kept = {"data", "image_size", "batch_size", "precision", "eval_every", "epochs", "warmup_epochs", *config.settings}
    defaults = flat(RunConfig())
    for name in config.contenders:
        if name not in CONTENDERS:
            raise unknown("contender", name, CONTENDERS)
        if name not in STARTABLE and RANDOM not in config.starts:
            raise ConfigError(f"{name} cannot start from an image ViT; those that can: {', '.join(STARTABLE)}")
        recipe, model, changes = CONTENDERS[name]
        settings = flat(RECIPES[recipe]())
        chosen = {key: value for key, value in settings.items() if key not in kept and value != defaults[key]}
        overrides = changes if model else {**settings["overrides"], **changes}
        models[name] = {**chosen, "model": model or settings["model"], "overrides": overrides}
    return models


def image_model() -> dict[str, Any]:
    """Settings of the image ViT whose blocks and patches are those of the contenders that can start from it."""
    return {
        "model": "vit_tiny_patch16_224", "overrides": {**ENCODER, "patch": [8, 8]},
        "lr": 1e-3, "weight_decay": 0.05, "hflip": 0.0,
    }  # fmt: skip


def from_images(config: Config, images: Mapping[int, str]) -> list[tuple[int, Runs]]:
    """(seed, runs) of the contenders that start from that seed's image ViT, a folder; TimeSformer has no tubelets, so one
    kernel is as good as another and the first is taken."""
    kernels = [start for start in config.starts if start != RANDOM]
    models = {name: kind for name, kind in _contenders(config).items() if name in STARTABLE}
    sets = {"clips": ([n for n in models if n.startswith("vivit")], kernels),
            "frames": ([n for n in models if not n.startswith("vivit")], kernels[:1])}  # fmt: skip
    return [
        (seed, Runs(
            models={name: _pinned(models[name]) for name in names}, variants={kernel: {"inflate": kernel} for kernel in chosen},
            settings={"init_from": folder}, folder=f"from-image-seed{seed}-{kind}",
        ))
        for seed, folder in images.items() for kind, (names, chosen) in sets.items() if names and chosen
    ]  # fmt: skip


def _pinned(kind: Mapping[str, Any]) -> dict[str, Any]:
    """The family's own activation, which the image model would decide otherwise: all starts are of one architecture.

    And TimeSformer's published start, whose steps over time change nothing of an image model.
    """
    own = {"activation": "gelu_tanh"} if kind["model"].startswith("vivit") else {"activation": "gelu", "init": "normal"}
    return {**kind, "overrides": {**kind["overrides"], **own}}


def measure(config: Config) -> list[Row]:
    """Train, or go on; then judge what was trained by its reversals, and measure time and memory beside each other."""
    from vitrail.checkpoints import load_model
    from vitrail.evaluation.metrics import Report

    rows = [{**row, "start": RANDOM} for row in train_runs("video", config, plan(config))]
    pictures, out = [], directory("video", config)
    if any(start != RANDOM for start in config.starts) and from_images(config, {0: ""}):
        settings = {name: value for name, value in config.settings.items() if name not in OF_CLIPS}
        image = replace(config, data=config.image_data, out=str(out), settings=settings)
        runs = Runs(models={IMAGE: image_model()}, budget=config.image_budget or None, folder=IMAGE)
        pictures = [{**row, "start": IMAGE} for row in train_runs("video", image, [runs])]
    for seed, runs in from_images(config, {row["seed"]: str(out / row["folder"]) for row in pictures}):
        started = train_runs("video", replace(config, seeds=(seed,)), [runs])
        rows += [{**row, "start": row["variant"]} for row in started]
    models = {}
    for row in rows:
        folder = directory("video", config) / row["folder"]
        report = Report.load(folder / "evaluation.json")
        row |= {name: right / max(answered, 1) for name, (right, answered) in reversals(report).items()}
        if row["model"] not in models:
            models[row["model"]] = load_model(folder, quiet=True)
    costs = measure_costs(models, config.batch_size)
    return [{**row, **costs[row["model"]]} for row in rows] + pictures


def reversals(report: Any) -> dict[str, tuple[int, int]]:
    """Of every pair of opposite motions, and of all ("reversals"), (right, all) of the answers within it; {} for other data."""
    from vitrail.data.embedded.motion import MOTIONS

    if tuple(report.classes) != MOTIONS:
        return {}
    found = {f"{a}/{b}": report.between(a, b) for a, b in zip(MOTIONS[::2], MOTIONS[1::2], strict=True)}
    return {"reversals": (sum(right for right, _ in found.values()), sum(n for _, n in found.values())), **found}


def measure_costs(models: Mapping[str, Model], batch_size: int) -> dict[str, dict[str, float]]:
    """Per model: MFLOPs and milliseconds of a clip in a forward pass (models take turns), MiB that training a batch takes."""
    import torch

    from vitrail.cost import count_flops, forecast_memory

    inputs = {name: torch.randn(batch_size, *model.input_shape) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(PASSES + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model.eval()(inputs[name])
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "mflops": count_flops(model) / 1e6,
            "milliseconds": 1e3 * median(seconds[name][1:]) / batch_size,
            "mebibytes": forecast_memory(model, batch_size).activations / 2**20,
        }
        for name, model in models.items()
    }


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """Accuracy beside cost; on `motion` how often a motion and its reversal are told apart; what the starts make of it."""
    pictures = [row for row in rows if row.get("start") == IMAGE]
    rows = [row for row in rows if row.get("start") != IMAGE]
    groups = by(rows, _name)
    tops = {name: mean(row["top1"] for row in group) for name, group in groups.items()}
    best = sorted(groups, key=lambda name: -tops[name].value)
    cheapest = min(groups, key=lambda name: groups[name][0]["mflops"])
    answer = (
        f"Best after {config.budget:.1e} training FLOPs: {best[0]}, top-1 {tops[best[0]].percent()} %; "
        f"cheapest per clip: {cheapest} ({groups[cheapest][0]['mflops']:.1f} MFLOPs), top-1 {tops[cheapest].percent()} %."
    )
    motion = all("reversals" in row for row in rows)
    sentences = []
    if motion:
        apart = {name: mean(row["reversals"] for row in group) for name, group in groups.items()}
        blind = [name for name in best if apart[name].low <= 0.5]
        sentences.append(
            "A motion and its reversal, among the answers that named one of the two: "
            + ", ".join(f"{name} {apart[name].percent()} %" for name in best)
            + "."
        )
        if blind:
            sentences.append(f"Not better than a coin beyond doubt by that measure: {', '.join(blind)}.")
    sentences += _starts(groups, pictures)
    columns = ["model", "parameters", "MFLOPs a clip", "ms a clip", "MiB a batch", "steps", "top-1", "spread", "seeds"]
    table = Table(
        "Top-1 accuracy in percent, mean and 95 % interval",
        [*columns, "reversals"] if motion else columns,
        [_row(name, groups[name], motion) for name in best],
        note="MFLOPs and ms of a forward pass; MiB of activations while training a batch, a forecast; spread: sample standard "
        "deviation over seeds; reversals: of the answers that named a motion or its reversal, how many were right",
    )
    points = [Series.of_means(name, [groups[name][0]["mflops"]], [tops[name]], line=False)
              for name in best]  # fmt: skip
    chart = Chart("video", "Accuracy and cost", "MFLOPs of a clip", "top-1", points, logx=True, percent=True)
    numbers = {"top1": {name: tops[name]._asdict() for name in best}}
    return Findings(answer=answer, sentences=sentences, tables=[table], charts=[chart], numbers=numbers)


def _name(row: Mapping[str, Any]) -> str:
    start = row.get("start", RANDOM)
    return str(row["model"]) if start == RANDOM else f"{row['model']} from {start}"


def _starts(groups: Mapping[str, Sequence[Mapping[str, Any]]], pictures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every start from pictures against random weights and, of ViViT, against the start before it."""
    found = []
    for name, group in groups.items():
        model, _, start = name.partition(" from ")
        others = [other for other in groups if other.partition(" from ")[0] == model]
        for other in others[: others.index(name)] if start else []:
            found.append(f"{verdict(difference(group, groups[other]), name, other)}.")
    if pictures:
        top, flops = mean(row["top1"] for row in pictures), pictures[0]["flops"]
        found.append(
            f"The image ViTs, one per seed, give top-1 {top.percent()} % on {Path(pictures[0]['data']).name} after {flops:.1e} "
            "training FLOPs, which are not counted in the budget of what starts from them."
        )
    return found


def _row(name: str, rows: Sequence[Mapping[str, Any]], motion: bool) -> list[Any]:
    first, top = rows[0], mean(row["top1"] for row in rows)
    cells = [
        name, f"{first['parameters'] / 1e3:.0f} k", f"{first['mflops']:.1f}", f"{first['milliseconds']:.2f}",
        f"{first['mebibytes']:.0f}", f"{first['steps']:,}", top.percent(),
        f"{100 * _spread([row['top1'] for row in rows]):.1f}", ", ".join(f"{100 * row['top1']:.1f}" for row in rows),
    ]  # fmt: skip
    return [*cells, mean(row["reversals"] for row in rows).percent()] if motion else cells


def _spread(values: Sequence[float]) -> float:
    middle = fmean(values)
    return (sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
