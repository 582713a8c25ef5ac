"""The pictures of a report: mistakes, and where the model looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.config import Preprocess
from vitrail.data import ImageDataset
from vitrail.data.decoded import as_batch
from vitrail.data.loader import load_for_eval
from vitrail.data.transforms import Normalise
from vitrail.evaluation.metrics import LABEL_THRESHOLD, Outputs
from vitrail.inspection import clips, draw
from vitrail.inspection.attention import AttentionView, NoPathError, look
from vitrail.inspection.sections import Context, percent
from vitrail.models import Model

CARDS = 10  # pictures in a group of mistakes
LOOKED_AT = 8  # pictures with attention maps
MEASURED = 32  # pictures behind the attention distances


@dataclass(frozen=True)
class Gallery:
    """A data set beside a model's answers to it; rows count the answers, which lack the unreadable pictures."""

    dataset: ImageDataset
    preprocess: Preprocess
    outputs: Outputs

    @property
    def probabilities(self) -> Float[Tensor, "n k"]:
        """Softmax of the scores, or their sigmoid for a multi-label set."""
        logits = self.outputs.logits
        return logits.sigmoid() if self.dataset.multi_label else logits.softmax(1)

    @property
    def hard(self) -> bool:
        """Whether pictures are so small that their pixels should be shown as squares."""
        return max(self.preprocess.image_size) <= draw.SMALL_PICTURE

    def sample(self, row: int) -> UInt8[Tensor, "c *t h w"]:
        """A picture as the model gets it, before normalisation; of a video its middle view."""
        found = load_for_eval(
            self.dataset.read(int(self.outputs.indices[row])), self.preprocess, "exact", self.dataset.max_pixels
        )
        views = as_batch(found[None])
        return views[len(views) // 2]

    def picture(self, row: int) -> UInt8[Tensor, "c h w"]:
        """The sample as one picture: of a video some frames, side by side."""
        return draw.still(self.sample(row))

    def name(self, row: int) -> str:
        """The sample's name."""
        return self.dataset.names(int(self.outputs.indices[row]))

    def find_unreadable(self) -> None:
        """Let the data set know which of its pictures the answers lack, and why: nobody may have read it in this process."""
        for index in sorted(set(range(len(self.dataset))) - set(self.outputs.indices.tolist())):
            try:
                load_for_eval(self.dataset.read(index), self.preprocess, "exact", self.dataset.max_pixels)
            except (OSError, ValueError) as problem:
                self.dataset.bad.add(self.dataset.names(index), str(problem))

    def labels(self, chosen: Tensor) -> str:
        """The names of the classes that are set in a row (k,) of 0 and 1."""
        return ", ".join(self.dataset.classes[i] for i in chosen.nonzero()[:, 0].tolist()) or "(no label)"


def mistakes(gallery: Gallery) -> Context:
    """The answers that were most confidently wrong, and the truths that were given the least probability."""
    if gallery.dataset.multi_label:
        return _label_mistakes(gallery)
    probabilities, truth = gallery.probabilities, gallery.outputs.targets
    sure, answers = probabilities.max(1)
    given = probabilities.gather(1, truth[:, None])[:, 0]
    wrong = (answers != truth).nonzero()[:, 0]
    confident = wrong[sure[wrong].argsort(descending=True, stable=True)][:CARDS].tolist()
    rest = torch.tensor([row for row in wrong.tolist() if row not in set(confident)], dtype=torch.long)
    hardest = rest[given[rest].argsort(stable=True)][:CARDS].tolist()

    def card(row: int) -> Context:
        return {
            "picture": draw.data_uri(gallery.picture(row)),
            "name": gallery.name(row),
            "answer": gallery.dataset.classes[int(answers[row])],
            "probability": _shown(sure[row]),
            "truth": gallery.dataset.classes[int(truth[row])],
            "truth_probability": _shown(given[row]),
        }

    groups = [
        {"title": "Most confidently wrong", "cards": [card(row) for row in confident]},
        {"title": "Worst of the others: the truth was given the least", "cards": [card(row) for row in hardest]},
    ]
    noun = gallery.dataset.noun
    about = f"{len(wrong):,} of {len(truth):,} {noun}s were answered wrongly; {len(confident) + len(hardest)} of them are "
    about += "shown, as the model gets them. In colour the answer and its probability, below the truth and what it was given."
    return {"about": about, "hard": gallery.hard, "noun": noun, "groups": [group for group in groups if group["cards"]]}


def _label_mistakes(gallery: Gallery) -> Context:
    probabilities, truth = gallery.probabilities, gallery.outputs.targets > LABEL_THRESHOLD
    extra = torch.where(truth, -1.0, probabilities)  # (n, k): a label that is wrong, by how sure it was given
    missed = torch.where(truth, 1 - probabilities, -1.0)
    threshold = 1 - LABEL_THRESHOLD

    def cards(scores: Tensor, kind: str) -> list[Context]:
        best = scores.flatten().argsort(descending=True, stable=True)[:CARDS].tolist()
        places = [divmod(place, scores.shape[1]) for place in best if scores.flatten()[place] > threshold]
        return [
            {
                "picture": draw.data_uri(gallery.picture(row)),
                "name": gallery.name(row),
                "answer": f"{kind} {gallery.dataset.classes[label]}",
                "probability": _shown(probabilities[row, label]),
                "truth": gallery.labels(truth[row]),
                "truth_probability": "",
            }
            for row, label in places
        ]

    groups = [
        {"title": "Most confidently wrong labels", "cards": cards(extra, "not")},
        {"title": "Most confidently missed labels", "cards": cards(missed, "missed")},
    ]
    wrong = int(((probabilities >= LABEL_THRESHOLD) != truth).any(1).sum())
    noun = gallery.dataset.noun
    about = f"{wrong:,} of {len(truth):,} {noun}s got at least one label wrong at a threshold of 50 %. "
    about += f"In colour the label and its probability, below all true labels of the {noun}."
    return {"about": about, "hard": gallery.hard, "noun": noun, "groups": [group for group in groups if group["cards"]]}


def attention(model: Model, gallery: Gallery) -> Context:
    """Attention over some pictures, or over the frames and the time of some videos, and how far the heads look.

    Of a model without attention, or one whose attention does not join to a map, it says so.
    """
    rows, chosen = _chosen(gallery)
    measured = np.unique(np.linspace(0, len(gallery.outputs.logits) - 1, MEASURED).astype(int)).tolist()
    try:
        views = {row: _look(model, gallery, row) for row in dict.fromkeys([*rows, *measured])}
    except NoPathError as reason:
        return {"about": "Where a transformer looks when it answers.", "none": f"No maps are shown: {reason}.", "cards": []}
    shown = [(row, view) for row in rows if (view := views[row]) is not None]
    if not shown:
        return {
            "about": "Where a transformer looks when it answers.",
            "none": f"A model of the family {model.family} has no attention, so there are no maps to show.",
            "cards": [],
        }
    looked = [views[row] for row in measured]
    height, width = gallery.preprocess.image_size
    noun, frames = gallery.dataset.noun, gallery.preprocess.frames
    return {
        "about": _about(shown[0][1].asking, noun, chosen),
        "cards": [_card(gallery, row, view) for row, view in shown],
        "hard": gallery.hard,
        "strips": gallery.dataset.video,
        "distances": _distances(looked),
        "distance_about": "Mean distance between a patch and what it attends to, weighted by attention: a dot is a head, the "
        "line the mean of a layer, the dashed line what attention to all patches in reach alike would give; layers that look "
        f"along one axis only are left out of the other; n = {len(measured)} {noun}s spread evenly over the set, "
        f"{f'{frames} frames of ' if frames else ''}{height} x {width} pixels.",
    }


def _about(asking: str, noun: str, chosen: str) -> str:
    about = (
        f"Each pane is one patch; the brighter it is, the more attention it gets from {asking}, relative to the "
        f"brightest pane of the same {noun}. Last layer: the last one that looks across the picture, averaged over its heads. "
        f"Rollout: all layers multiplied together, skip connections counted as half. Shown are {chosen}."
    )
    if asking.startswith("the mean"):
        about += " The model pools by the mean, so no single token is asked: the maps average over all asking patches."
    if noun == "video":
        about += " The chart says how the same attention spreads over the frames; dotted, an even spread."
    return about


def _distances(views: Sequence[AttentionView | None]) -> list[Any]:
    """Charts of the mean distances over views, in pixels and, of clips, in frames."""
    there = [view for view in views if view is not None]
    charts = []
    for unit in ("pixels", "frames"):
        parts = [view.distances if unit == "pixels" else view.frames for view in there]
        if parts and parts[0]:
            even = there[0].even_distances if unit == "pixels" else there[0].even_frames
            means = {name: torch.cat([part[name] for part in parts]).mean(0) for name in parts[0]}
            charts.append(draw.distances(list(means.values()), [even[name] for name in means], unit))
    return charts


def _look(model: Model, gallery: Gallery, row: int) -> AttentionView | None:
    """One sample at a time: the maps of all layers together grow with the square of the tokens."""
    device = next(model.parameters()).device
    normalise = Normalise(gallery.preprocess).to(device)
    return look(model, normalise(gallery.sample(row)[None].to(device)))


def _chosen(gallery: Gallery) -> tuple[list[int], str]:
    """Which pictures to look at, and in words how they were chosen."""
    probabilities = gallery.probabilities
    if gallery.dataset.multi_label:
        return list(range(min(LOOKED_AT, len(probabilities)))), f"the first {gallery.dataset.noun}s of the set"
    sure, answers = probabilities.max(1)
    truth = gallery.outputs.targets
    right = (answers == truth).tolist()
    first: dict[int, int] = {}
    for row, label in enumerate(truth.tolist()):
        if right[row]:
            first.setdefault(label, row)
    classes = sorted(first)
    picked = np.unique(np.linspace(0, len(classes) - 1, min(len(classes), LOOKED_AT - 2)).astype(int))
    wrong = (answers != truth).nonzero()[:, 0]
    confident = wrong[sure[wrong].argsort(descending=True, stable=True)][:2].tolist()
    rows = [*(first[classes[i]] for i in picked), *confident]
    noun = gallery.dataset.noun
    return rows, f"the first rightly answered {noun} of up to six classes, and the two most confident mistakes"


def _card(gallery: Gallery, row: int, view: AttentionView) -> Context:
    sample, maps = gallery.sample(row), {"last layer": view.last, "rollout": view.rollout}
    video = sample.ndim == 4
    drawn = clips.strips(sample, maps)
    names = {clips.INPUT: clips.numbered(sample, maps) if video else "picture"}
    parts = {names.get(what, what): draw.data_uri(picture, 960 if video else 224) for what, picture in drawn.items()}
    if not video:
        parts["picture"] = draw.data_uri(sample)  # a small one without loss
    over_time = {what: clips.over_time(placed) for what, placed in maps.items()} if video else {}
    probabilities = gallery.probabilities[row]
    if gallery.dataset.multi_label:
        given, truth = probabilities >= LABEL_THRESHOLD, gallery.outputs.targets[row] > LABEL_THRESHOLD
        answer, right = gallery.labels(given), gallery.labels(truth)
    else:
        answer = gallery.dataset.classes[int(probabilities.argmax())]
        right = gallery.dataset.classes[int(gallery.outputs.targets[row])]
    return {
        "parts": [{"what": what, "uri": uri} for what, uri in parts.items()],
        "time": draw.spread_over_time(over_time, sample.shape[1], gallery.name(row)) if video else None,
        "ok": answer == right,
        "answer": answer,
        "truth": right,
        "probability": _shown(probabilities.max()),
    }


def _shown(probability: Tensor) -> str:
    """One digit; a value that would round to 0 or 100 % but is not keeps a sign of it."""
    value = float(probability)
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{percent(value, 1)} %"
