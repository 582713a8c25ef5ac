"""What is inspected: a model with its preprocessing and class names, and the pictures or clips it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vitrail.config import ConfigError, DataConfig, Preprocess
from vitrail.data import open_data
from vitrail.data.arrow import is_dataset_folder
from vitrail.data.clips import clips_for_eval
from vitrail.data.embedded import NAMES as EMBEDDED
from vitrail.data.footage import Footage
from vitrail.data.images import MAX_PIXELS
from vitrail.data.tables import SUFFIXES as TABLES
from vitrail.data.transforms import Normalise, decode_for_eval
from vitrail.inference.inputs import Asked, expand
from vitrail.layers.route import MEAN, Cells
from vitrail.models import Model


class Sample(NamedTuple):
    """A picture (c, h, w), or a clip (c, t, h, w), as the model gets it but not yet normalised."""

    name: str
    pixels: UInt8[Tensor, "c *t h w"]


@dataclass(frozen=True)
class Subject:
    """A model under inspection. name: what pages call it; samples: what it is shown."""

    name: str
    model: Model
    preprocess: Preprocess
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def normalised(self, samples: Sequence[Sample]) -> Float[Tensor, "b c *t h w"]:
        """Samples as the model's input, on its device."""
        device = next(self.model.parameters()).device
        return Normalise(self.preprocess).to(device)(torch.stack([sample.pixels for sample in samples]).to(device))


def subject(model: Model, name: str, inputs: Sequence[str], most: int) -> tuple[Subject, list[str]]:
    """A model with at most `most` of the pictures or clips that `inputs` stand for, and what could not be read.

    inputs: files, folders, patterns, or one data set (a table, tar shards, an Arrow folder, an embedded set), of which samples
    spread evenly over its test split are taken. Raises ConfigError where nothing can be read.
    """
    card, config = model.card, model.config
    preprocess = (card.preprocess if card else None) or Preprocess(
        image_size=config.image_size, channels=config.in_channels, frames=model.input_shape[1] if model.takes_clips else 0
    )
    classes = (card.classes if card else ()) or tuple(str(i) for i in range(config.num_classes))
    samples: list[Sample] = []
    problems: list[str] = []
    asked = _asked(inputs, preprocess, most) if inputs else ()
    for item in asked:
        if len(samples) == most:
            break
        try:
            if item.picture is None:
                raise ValueError(item.error)
            samples.append(Sample(_new_name(Path(item.name).name, samples), _read(item, preprocess)))
        except (OSError, ValueError) as problem:
            problems.append(f"{item.name}: {problem}")
    if inputs and not samples:
        raise ConfigError(problems[0] if problems else f"nothing to look at in {' '.join(inputs)}")
    return Subject(name, model, preprocess, classes, tuple(samples)), problems


def _asked(inputs: Sequence[str], preprocess: Preprocess, most: int) -> Iterable[Asked]:
    first, path = inputs[0], Path(inputs[0])
    is_data = first in EMBEDDED or path.suffix.lower() in (*TABLES, ".tar") or is_dataset_folder(path)
    if len(inputs) > 1 or not is_data:
        return expand(list(inputs), videos=bool(preprocess.frames))
    data = open_data(first, DataConfig())
    dataset = next(split for split in (data.test, data.val, data.train) if split is not None and len(split))
    if dataset.video != bool(preprocess.frames):
        wanted = "clips" if preprocess.frames else "pictures"
        raise ConfigError(f"the model takes {wanted}, but the samples of {first} are {dataset.noun}s")
    places = torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().long().tolist()
    return (Asked(dataset.names(place), dataset.read(place)) for place in places)


def _new_name(name: str, samples: Sequence[Sample]) -> str:
    """Files are called after samples, so two of one name, from two folders, must not be the same."""
    taken = {Path(sample.name).stem for sample in samples}
    stem, suffix, number = Path(name).stem, Path(name).suffix, 2
    while Path(name).stem in taken:
        name, number = f"{stem}-{number}{suffix}", number + 1
    return name


def _read(item: Asked, preprocess: Preprocess) -> Tensor:
    if isinstance(item.picture, Footage):
        views = clips_for_eval(item.picture, preprocess, MAX_PIXELS)
        return views[len(views) // 2]
    return decode_for_eval(item.picture, preprocess, max_pixels=MAX_PIXELS)  # type: ignore[arg-type]


def token_names(cells: Cells, asked: Iterable[str]) -> list[str]:
    """What to call the tokens without a place; `asked` are the readout's words, in the order of their tokens."""
    words = [word for word in asked if word != MEAN]
    if cells.prefix == cells.grid[0] > 1:
        return [f"class token of frame {t + 1}" for t in range(cells.prefix)]
    named = [words[i].removeprefix("the ") if i < len(words) else f"token {i + 1}" for i in range(cells.prefix)]
    return [name.replace("class tokens of all frames", "class token") for name in named]
