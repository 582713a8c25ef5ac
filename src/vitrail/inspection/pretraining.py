"""The page of a run without labels: how well hidden patches are guessed, as numbers, curves and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.checkpoints.pretext import load_pretext
from vitrail.config import Preprocess, dump
from vitrail.cost import count_parameters
from vitrail.data import Data, ImageDataset
from vitrail.data.decoded import as_batch
from vitrail.data.loader import load_for_eval
from vitrail.data.transforms import Normalise
from vitrail.inspection import draw, training_data
from vitrail.inspection.run import RunRecord, environment
from vitrail.inspection.sections import Context, as_count, as_time, line, percent
from vitrail.models import Model
from vitrail.models.masked import MaskedPatches
from vitrail.models.pretext import Pretext

TITLES = {"result": "Result", "guesses": "Guesses", "training": "Training", "data": "Data", "reproduce": "Reproduce"}
SHOWN = 12  # pictures
SPLITS = ("test", "val", "train")


def context(run: RunRecord, model: Model, data: Data | None, problem: str) -> Context:
    """What the page says. Raises CheckpointError where the run has not ended."""
    c, card = model.config, model.card
    preprocess = (card.preprocess if card else None) or Preprocess(c.image_size, c.in_channels)
    pretext = load_pretext(run.path, run.config, model, preprocess).to(next(model.parameters()).device)
    source = data.name if data else Path(run.config.data).stem or run.path.name
    return {
        "title": f"{source} · {model.name or model.family}, without labels",
        "subtitle": _subtitle(run, data),
        "result": _result(run, model, pretext, problem),
        "guesses": None if data is None else guesses(pretext, data, preprocess),
        "training": curves(run.of_kind("train"), run.of_kind("eval")),
        "data": None if data is None else training_data.summary(data, run.config, preprocess),
        "reproduce": {
            "about": "The same machine, versions and number of threads give the same weights, bit for bit on a CPU.",
            "command": run.command if run.config.data else "",
            "environment": environment(run.config.device),
            "config": dump(run.config),
        },
    }


def _subtitle(run: RunRecord, data: Data | None) -> str:
    steps = max((record["step"] for record in run.records), default=0)
    epochs = max((record.get("epoch") or 0 for record in run.records), default=0)
    told = "Hidden patches guessed from the others"
    if data is not None and data.train is not None:
        told += f", learned on {len(data.train):,} pictures"
    start = f", starting from {run.config.init_from}" if run.config.init_from else ""
    return f"{told} for {epochs:.3g} epochs ({steps:,} steps){start}, seed {run.config.seed}."


def _result(run: RunRecord, model: Model, pretext: Pretext, problem: str) -> Context:
    final: Mapping[str, Any] = next(iter(run.of_kind("final")), {})
    split = {"val": "validation", "test": "test"}.get(str(final.get("split", "")), "")
    if isinstance(pretext, MaskedPatches) and not pretext.regression:
        name, told = "masked_accuracy", "of the corrupted patches' colours guessed rightly"
        reference = f"Guessing evenly among {pretext.colours:,} colours gives {percent(1 / pretext.colours, 1, 2)} %."
    else:
        name, told = "explained", "of the hidden pixels' mean square explained by the guesses"
        reference = "Answering zero everywhere, the mean grey, explains 0 %; guessing every pixel, 100 %."
    value, loss = (final.get(key) for key in (name, "masked_loss"))
    facts = [
        {"name": "loss", "value": "–" if loss is None else f"{loss:.3f}", "note": f"on the {split} pictures" if split else ""},
        {"name": "parameters kept", "value": as_count(count_parameters(model)), "note": "the model, for fine-tuning"},
        {
            "name": "parameters left",
            "value": as_count(count_parameters(pretext) - count_parameters(model)),
            "note": "what guesses",
        },
    ]
    if run.minutes is not None:
        facts.append({"name": "training time", "value": as_time(run.minutes), "note": ""})
    what = pretext.describe()
    return {
        "about": f"{what[0].upper()}{what[1:]}. What is hidden of a picture is the same in every evaluation.",
        "value": "–" if value is None else percent(value, 1),
        "name": told,
        "reference": reference,
        "split": f"the {split} pictures" if split else "no picture: there was no validation or test split",
        "facts": facts,
        "notes": (f"The data could not be opened, so no pictures are shown: {problem}",) if problem else (),
        "go_on": f"vitrail train DATA --from {run.path}",
    }


@torch.no_grad()
def guesses(pretext: Pretext, data: Data, preprocess: Preprocess, shown: int = SHOWN) -> Context:
    """Pictures spread evenly over the test (else validation, else training) split: masked, predicted, original."""
    split = next(name for name in SPLITS if getattr(data, name) is not None)
    dataset: ImageDataset = getattr(data, split)
    pictures, numbers = [], []
    for index in np.unique(np.linspace(0, len(dataset) - 1, shown).astype(int)).tolist():
        try:
            sample = load_for_eval(dataset.read(index), preprocess, "exact", dataset.max_pixels)
        except (OSError, ValueError) as problem:
            dataset.bad.add(dataset.names(index), str(problem))
            continue
        pictures.append(as_batch(sample[None]))
        numbers.append(index)
    about = {"test": "Pictures of the test set", "val": "Pictures of the validation set", "train": "Training pictures"}[split]
    about += ", spread evenly over it: what the model saw, what it guessed, and what was there. Grey patches are hidden. "
    if isinstance(pretext, MaskedPatches):
        about += "Of the corrupted patches a tenth shows another patch and a tenth is as it was; all of them are guessed."
    else:
        about += "The encoder never saw the grey patches."
        if pretext.patch_norm:
            about += " Guesses are of patches normalised one by one: their mean and contrast are taken from the original."
    if not pictures:
        return {"about": about, "cards": [], "hard": False}
    was_training = pretext.training
    device = next(pretext.parameters()).device
    images = Normalise(preprocess).to(device)(torch.cat(pictures).to(device))
    original, hidden, guessed = pretext.eval().show(images, pretext.draw_for(numbers).to(device))
    pretext.train(was_training)
    cards = [
        {
            "name": dataset.names(number),
            "parts": [
                {"what": what, "uri": draw.data_uri(_pixels(picture))}
                for what, picture in (("masked", hidden[i]), ("predicted", guessed[i]), ("original", original[i]))
            ],
        }
        for i, number in enumerate(numbers)
    ]
    return {"about": about, "cards": cards, "hard": max(preprocess.image_size) <= draw.SMALL_PICTURE}


def _pixels(picture: Tensor) -> Tensor:
    return (255 * picture).round().clamp(0, 255).to(torch.uint8).cpu()


def curves(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Context | None:
    """Charts of loss, quality of the guesses and learning rate from the run's records; None if there are none."""
    steps = [{**record, "explained": _explained(record)} for record in steps]
    charts = {"Loss": {"training": line(steps, "loss"), "validation": line(evaluations, "masked_loss")}}
    for title, trained, judged in (("Accuracy", "accuracy", "masked_accuracy"), ("Explained", "explained", "explained")):
        if any(record.get(trained) is not None for record in steps):
            charts[title] = {"training": line(steps, trained), "validation": line(evaluations, judged)}
    charts["Learning rate"] = {"learning rate": line(steps, "lr")}
    drawn = []
    for title, lines in charts.items():
        there = {name: points for name, points in lines.items() if points[0]}
        if there:
            drawn.append(draw.curves(there, title, percent=title in ("Accuracy", "Explained")))
    about = "Training values are means over the augmented pictures of the steps before each point, validation values of the "
    about += "whole validation set."
    return {"charts": drawn, "about": about} if drawn else None


def _explained(record: Mapping[str, Any]) -> float | None:
    loss, baseline = record.get("loss"), record.get("baseline")
    return 1 - loss / baseline if loss is not None and baseline else None
