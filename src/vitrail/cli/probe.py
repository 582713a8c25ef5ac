"""`vitrail probe`: what simple classifiers make of the frozen features of one or several models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vitrail.cli.parse import parse
from vitrail.config import ConfigError, DataConfig

if TYPE_CHECKING:
    from vitrail.evaluation.probe_report import ProbeReport

EXAMPLES = """\
vitrail probe photos/ --model vit_tiny_patch16_224,vit_small_patch16_224     published weights: which to fine-tune?
vitrail probe photos/ --model runs/photos-resnet18,checkpoint.safetensors --out probe/    a page, JSON and CSV
vitrail probe photos/ --model runs/photos-vit --shots 1,5 --methods ridge --no-full       the ViT paper's few-shot measure
vitrail probe clips/ --model vivit_base_16x2                                videos: the mean over the views of its card"""


@dataclass(frozen=True)
class Arguments:
    """Judge models by their frozen features: few-shot ridge regression, nearest neighbours, logistic regression, linear SGD."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set or embedded set, of pictures or videos."""
    model: str  # A,B,C: run directories, checkpoints, hub ids, or names that `vitrail models --weights` lists
    shots: tuple[int, ...] = (1, 5, 10, 25)  # training samples per class
    full: bool = True  # learn from all training samples too
    seeds: int = 5  # subsets drawn for every number of shots
    methods: str = "ridge,knn,logistic,sgd"  # which classifiers, by commas
    image_size: tuple[int, int] | None = None  # height,width; by default that of the weights, positions are resized
    cache: str = ""  # folder of kept features, by default the user's cache; they are never used for other weights or data
    no_cache: bool = False  # extract the features anew and keep none
    out: str = ""  # folder for probe.html, probe.json and probe.csv
    json: bool = False  # print everything as JSON
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of products under autocast
    batch_size: int = 64  # pictures or clips at once
    data_config: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def run(words: Sequence[str]) -> None:
    """Probe and print."""
    arguments = parse(Arguments, words, prog="vitrail probe", examples=EXAMPLES)
    models = [part.strip() for part in arguments.model.split(",") if part.strip()]
    if not models:
        raise ConfigError("--model names no model; give a run, a checkpoint, a hub id or a name, several by commas")
    from vitrail.cli import show
    from vitrail.evaluation.probing import probe

    settings = {f.name: getattr(arguments.data_config, f.name) for f in dataclasses.fields(DataConfig)}
    settings.pop("workers")
    report = probe(
        models,
        arguments.data,
        shots=arguments.shots,
        full=arguments.full,
        seeds=arguments.seeds,
        methods=[part.strip() for part in arguments.methods.split(",") if part.strip()],
        image_size=arguments.image_size,
        cache=None if arguments.no_cache else arguments.cache,
        device=arguments.device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        workers=arguments.data_config.workers,
        **settings,
    )
    if arguments.out:
        from vitrail.inspection.probe import write_probe

        page = write_probe(report, Path(arguments.out))
        report.save(Path(arguments.out) / "probe.json")
        report.save(Path(arguments.out) / "probe.csv")
    if arguments.json:
        show.as_json(report.to_dict())
        return
    print_report(report)
    if arguments.out:
        print(f"page      {page}  (open it in a browser)")


def print_report(report: ProbeReport) -> None:
    """Tables of accuracies, the ranking, and the advice."""
    from vitrail.cli import show
    from vitrail.evaluation.probe_report import NAMES

    show.notes(report.notes)
    shots = list(dict.fromkeys(score.shots for score in report.scores))
    columns = ["model", *(f"{count} a class" if count else "all" for count in shots)]
    for method in dict.fromkeys(score.method for score in report.scores):
        rows = []
        for backbone in report.backbones:
            found = [report.score(backbone.label, method, count) for count in shots]
            spread = [f" ± {100 * score.spread:.1f}" if len(score.accuracies) > 1 else "" for score in found]
            cells = [f"{100 * s.mean:.1f}{more} ({s.setting:.3g})" for s, more in zip(found, spread, strict=True)]
            rows.append((backbone.label, *cells))
        show.table(columns, rows, title=f"{NAMES[method]}: top-1 in percent", right=columns[1:])
    print(
        f"mean ± standard deviation over {report.seeds} subsets, the setting chosen in brackets; learned from up to "
        f"{report.sizes['train']:,}, judged on {report.sizes['test']:,} {report.judged_on} samples\n"
    )
    cost = {backbone.label: backbone for backbone in report.backbones}
    ranks = [
        (
            str(place), rank.label, f"{rank.accuracy:.1%}", f"{rank.low:.1%} to {rank.high:.1%}",
            f"{cost[rank.label].parameters / 1e6:.3g}", f"{cost[rank.label].flops / 2e9:.3g}",
            f"{cost[rank.label].seconds:.1f}{' (kept)' if cost[rank.label].kept else ''}",
        )
        for place, rank in enumerate(report.ranking, 1)
    ]  # fmt: skip
    columns = ["", "model", "top-1", "95 % interval", "parameters (M)", "GMACs", "features (s)"]
    show.table(columns, ranks, title=f"ranked by {NAMES[report.ranked_by[0]]}", right=columns[2:])
    print(report.advice)
