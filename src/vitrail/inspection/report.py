"""report.html of a run: one page with everything about it that can be opened anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitrail.checkpoints import load_model
from vitrail.checkpoints.io import write_text
from vitrail.checkpoints.pretext import needs_labels
from vitrail.config import ConfigError, Preprocess, dump
from vitrail.cost import count_parameters, pick_device
from vitrail.data import Data, open_data
from vitrail.evaluation import Report, evaluate
from vitrail.inspection import pictures, pretraining, sections, training_data
from vitrail.inspection.page import render
from vitrail.inspection.run import REPORT, RunRecord, environment, read_run
from vitrail.models import Model

PAGE = "report.html"
_TITLES = {
    "result": "Result", "training": "Training", "confusion": "Confusion", "classes": "Classes", "mistakes": "Mistakes",
    "attention": "Attention", "calibration": "Calibration", "data": "Data", "reproduce": "Reproduce",
}  # fmt: skip


def write_report(run_dir: str | Path, *, model: Model | None = None, data: Any = None, report: Report | None = None) -> Path:
    """Write report.html into a run directory and return its path.

    model: default the run's final weights. data: opened `Data` or any source; default the source named in the run's settings.
    report: the evaluation to show; default that of the test split, else of validation. Where the data cannot be opened any
    more, the page shows the evaluation stored with the run and goes without pictures. Of a run without labels it shows guesses
    of hidden patches instead. Raises ConfigError if there is no run, or neither its data nor a stored evaluation.
    """
    run = read_run(run_dir)
    model = model if model is not None else load_model(run.path)
    opened, problem = _open(run, model, data)
    if not needs_labels(run.config.objective):
        page = render("pretraining.html.jinja", pretraining.TITLES, pretraining.context(run, model, opened, problem))
        write_text(run.path / PAGE, page)
        return run.path / PAGE
    if opened is not None and (report is None or report.outputs is None or not report.split):
        device = pick_device(run.config.device if report is None else "auto")
        report = evaluate(model, opened, split=report.split if report else "", device=str(device))
    elif report is None:
        if not (run.path / REPORT).is_file():
            raise ConfigError(f"{run.path}: the data cannot be opened and no evaluation is stored there; {problem}")
        report = Report.load(run.path / REPORT)
        report = replace(report, notes=(*report.notes, f"The data could not be opened, so no pictures are shown: {problem}"))
    write_text(run.path / PAGE, render("report.html.jinja", _TITLES, _context(run, model, opened, report)))
    return run.path / PAGE


def _open(run: RunRecord, model: Model, data: Any) -> tuple[Data | None, str]:
    """The run's data, or why there is none."""
    if isinstance(data, Data):
        return data, ""
    source = run.config.data if data is None else data
    if isinstance(source, str) and not source:
        return None, "the run was trained on a Python collection; hand it over as data"
    classes = model.card.classes if model.card else ()
    try:
        return open_data(source, run.config.data_config, classes or None), ""
    except (ValueError, OSError) as problem:
        if data is not None:
            raise
        return None, str(problem)


def _context(run: RunRecord, model: Model, data: Data | None, report: Report) -> dict[str, Any]:
    config = run.config
    preprocess = (model.card.preprocess if model.card else None) or Preprocess(
        image_size=model.config.image_size, channels=model.config.in_channels
    )
    noun = "video" if model.takes_clips else "picture"
    weights = "The moving average of the weights" if config.optim.ema else "The final weights"
    gallery = None if data is None or report.outputs is None else _gallery(data, report, preprocess)
    if gallery is not None and len(gallery.dataset.bad) and gallery.dataset.bad.summary() not in report.notes:
        report = replace(report, notes=(*report.notes, gallery.dataset.bad.summary()))
    context: dict[str, Any] = {
        "title": f"{data.name if data else Path(config.data).stem or run.path.name} · {model.name or model.family}",
        "subtitle": _subtitle(run, model, data, report),
        "result": sections.result(report, count_parameters(model), run.minutes, weights, _caution(data, report, noun), noun),
        "training": sections.training(run.of_kind("train"), run.of_kind("eval"), config.objective.loss, noun),
        "confusion": sections.confusion(report, noun),
        "classes": sections.classes(report, noun),
        "calibration": sections.calibration(report),
        "mistakes": None,
        "attention": None,
        "data": None,
        "reproduce": {
            "about": "The same machine, versions and number of threads give the same weights, bit for bit on a CPU. "
            "Versions and machine are those this page was made with.",
            "command": run.command if config.data else "",
            "environment": environment(config.device),
            "config": dump(config),
        },
    }
    if gallery is not None and data is not None:
        context["mistakes"] = pictures.mistakes(gallery)
        context["attention"] = pictures.attention(model, gallery)
        context["data"] = training_data.summary(data, config, preprocess)
    return context


def _gallery(data: Data, report: Report, preprocess: Preprocess) -> pictures.Gallery:
    """The pictures behind an evaluation. Raises ConfigError if it is one of other pictures."""
    dataset: Any = getattr(data, report.split, None)
    outputs = report.outputs
    assert outputs is not None
    fits = dataset is not None and (not len(outputs.indices) or int(outputs.indices.max()) < len(dataset))
    if not fits or not torch.equal(torch.from_numpy(dataset.targets)[outputs.indices], outputs.targets):
        raise ConfigError(f"the evaluation is of other pictures than the {report.split} split of {data.name}")
    gallery = pictures.Gallery(dataset, preprocess, outputs)
    gallery.find_unreadable()
    return gallery


def _subtitle(run: RunRecord, model: Model, data: Data | None, report: Report) -> str:
    kind = {"vit": "A Vision Transformer", "resnet": "A residual network"}.get(model.family, f"A {model.family} model")
    steps = max((record["step"] for record in run.records), default=0)
    epochs = max((record.get("epoch") or 0 for record in run.records), default=0)
    told = f"{kind} for {len(report.classes)} {'labels' if report.multi_label else 'classes'}"
    if data is not None and data.train is not None:
        told += f", trained on {len(data.train):,} {data.train.noun}s"
    if steps:
        told += f" for {epochs:.3g} epochs ({steps:,} steps)"
    start = run.config.init_from or ("published weights" if run.config.pretrained else "")
    origin = f", starting from {start}" if start else ""
    return f"{told}{origin}, seed {run.config.seed}."


def _caution(data: Data | None, report: Report, noun: str) -> str:
    """What the reader should know about how these samples were used before."""
    if report.split == "train":
        return f"These {noun}s were trained on: the numbers say how well they were learnt, not how well others are recognised."
    if report.split == "val":
        return f"These {noun}s were not trained on, but progress was judged by them; there is no separate test set."
    if data is not None and data.val is not None and data.val is data.test:
        return f"These {noun}s were not trained on, but progress was judged by them during training too."
    return f"These {noun}s were not used in training in any way."
