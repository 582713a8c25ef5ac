"""Run a classifier over a data set and judge it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, DataConfig, ModelCard, Preprocess, RunConfig, load, unknown
from vitrail.cost import autocast, memory_format, pick_device, pick_precision
from vitrail.data import Batch, Data, ImageDataset, eval_batches, open_data
from vitrail.data.clips import average_views, view_count, with_views
from vitrail.data.images import DecodeMode
from vitrail.data.transforms import Normalise
from vitrail.evaluation.metrics import Outputs, Report, classification_report
from vitrail.models import Model
from vitrail.models.deit import DeiT, check_prediction

SPLITS = ("test", "val", "train")
ALL = "all"  # of data without splits that the model was not trained on
PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal


def predict_dataset(
    model: Model,
    dataset: ImageDataset,
    preprocess: Preprocess,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    decode: DecodeMode = "exact",
    rank: int = 0,
    world: int = 1,
    progress: str | None = None,
) -> Outputs:
    """The model's scores of every readable sample, in the data set's order; pictures stream through, only scores are kept.

    Of a video with several views the scores are the logarithms of the views' averaged probabilities (see `average_views`).

    The model runs where it is moved to, in eval mode, and gets its mode back. Of several processes each answers its share
    (`rank` of `world`). `progress` names the bar on stderr (plain lines where that is no terminal); None shows nothing.
    Raises DataError if no sample can be read.
    """
    batches = answer_dataset(
        model, dataset, preprocess, model, device=device, precision=precision, batch_size=batch_size, workers=workers,
        decode=decode, rank=rank, world=world, progress=progress,
    )  # fmt: skip
    views = view_count(preprocess)
    logits, targets, indices = [], [], []
    for scores, batch in batches:
        logits.append(average_views(scores, views, dataset.multi_label))
        targets.append(batch.targets)
        indices.append(batch.indices)
    if not logits:  # more processes than samples
        nothing = torch.empty(0, dtype=torch.long)
        return Outputs(torch.empty(0, model.config.num_classes), torch.from_numpy(dataset.targets[:0]), nothing)
    return Outputs(torch.cat(logits), torch.cat(targets), torch.cat(indices))


def answer_dataset(
    model: Model,
    dataset: ImageDataset,
    preprocess: Preprocess,
    ask: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    decode: DecodeMode = "exact",
    rank: int = 0,
    world: int = 1,
    progress: str | None = None,
) -> Iterator[tuple[Float[Tensor, "v c"], Batch]]:
    """(what `ask` answers to the normalised inputs, in float32 on the CPU, the batch) for all readable samples, in order.

    Of videos every view has an answer of its own, those of one sample one after the other. The model is in eval mode meanwhile
    and gets its mode back. The other arguments, and what is raised, are those of `predict_dataset`.
    """
    device, was_training = torch.device(device), model.training
    layout, normalise = memory_format(model, precision), Normalise(preprocess).to(device)
    model.to(device).eval()
    batches = eval_batches(
        dataset, preprocess=preprocess, batch_size=max(batch_size // view_count(preprocess), 1), workers=workers,
        mode=decode, rank=rank, world=world,
    )  # fmt: skip
    found = False
    try:
        with _shown(progress, len(dataset) // world) as advance:
            for batch in batches:
                answers = []
                for part in batch.images.split(batch_size):
                    images = normalise(part.to(device, non_blocking=True)).contiguous(memory_format=layout)
                    with torch.no_grad(), autocast(device, precision):
                        answers.append(ask(images).float().cpu())
                found = True
                yield torch.cat(answers), batch
                advance(len(batch.targets))
    finally:
        model.train(was_training)
    if not found and world == 1:
        raise ConfigError(f"none of the {len(dataset)} {dataset.noun}s could be read; {dataset.bad.summary()}")


def evaluate(
    model: Model | str | Path,
    data: Any,
    *,
    split: str = "",
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = -1,
    seed: int = 0,
    progress: bool = True,
    clips: int | None = None,
    crops: int | None = None,
    prediction: str = "",
    **settings: Any,
) -> Report:
    """How good a model (or the checkpoint, folder or run at a path) is on a data set, with 95 % intervals.

    data: anything a run takes (a path, the name of an embedded set, a torch Dataset, [(path, label), ...]) or opened `Data`;
    `settings` are fields of `DataConfig`; where a run is judged on the data it was trained on, its own are the defaults.
    split: test, val or train; "" is test where there is one, then val, then train. A validation split is cut only from data
    that the model was trained on (as its run or its card says), or where split or val_fraction asks for it: of other data
    without named splits all samples are judged, and the report calls that split "all".
    clips, crops: views of a video, in time and space, whose probabilities are averaged; by default what the model's card says.
    The classes must be those of the checkpoint: a data set that differs is refused and the difference named (ConfigError).
    prediction: of a distilled DeiT, which heads answer: joint, class or distillation; "" is as the model says.
    Unreadable pictures are left out, counted and named in the report's notes, or refused with bad_files="refuse".
    """
    run = _run_of(model) if isinstance(model, (str, Path)) else None
    model = model if isinstance(model, Model) else load_model(model)
    card = model.card
    if isinstance(data, Data):
        opened, held_out, everything = data, False, False
    else:
        opened, held_out, everything = _opened(data, split, settings, card or ModelCard(), run)
    _check_fit(model, opened)
    dataset, name = _choose(opened, split)
    preprocess = (card.preprocess if card else None) or Preprocess(
        image_size=model.config.image_size,
        channels=model.config.in_channels,
        frames=model.input_shape[1] if model.takes_clips else 0,
    )
    preprocess = with_views(preprocess, clips, crops)
    where = pick_device(device)
    with _answering_by(model, prediction):
        outputs = predict_dataset(
            model,
            dataset,
            preprocess,
            device=where,
            precision=pick_precision(precision, where),
            batch_size=batch_size,
            workers=workers,
            decode="scaled" if settings.get("decode") == "scaled" else "exact",
            progress=f"evaluating {name}" if progress else None,
        )
    report = classification_report(outputs.logits, outputs.targets, opened.classes, opened.multi_label, seed)
    told = tuple(note for note in opened.notes if held_out and name != "test" and "held out" in note)
    notes = report.notes + told + ((dataset.bad.summary(),) if len(dataset.bad) else ())
    called = ALL if everything and list(opened.splits()) == ["train"] else name  # nothing tells its samples apart
    return dataclasses.replace(report, split=called, notes=notes, outputs=outputs)


@contextmanager
def _answering_by(model: Model, prediction: str) -> Iterator[None]:
    """A distilled model answers by the named heads within the block."""
    if not prediction:
        yield
        return
    if not isinstance(model, DeiT):
        raise ConfigError(
            f"{model.name or model.family} has one head; prediction={prediction!r} is for distilled models (deit_*_distilled_*)"
        )
    check_prediction(prediction)
    before, model.head.prediction = model.head.prediction, prediction
    try:
        yield
    finally:
        model.head.prediction = before


def _run_of(path: str | Path) -> RunConfig | None:
    """The settings of the training run that a path is, or lies in."""
    here = Path(path).expanduser()
    for folder in (here, *here.absolute().parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            with suppress(ConfigError, OSError):
                return load(RunConfig, folder / "config.yaml")
    return None


def _opened(data: Any, split: str, settings: dict[str, Any], card: ModelCard, run: RunConfig | None) -> tuple[Data, bool, bool]:
    """The data, whether the model was trained on it, and whether all of it is to be judged.

    It was trained on where the run says so, or where the card tells of training on data of that name: better too few samples
    judged than some that were seen. It is then read as it was then, so that the same part is held out.
    """
    names = [f.name for f in dataclasses.fields(DataConfig)]
    for name in settings:
        if name not in names:
            raise unknown("setting", name, names)
    classes = tuple(card.classes) or None
    as_asked = DataConfig(**{"multi_label": card.multi_label, **settings})
    as_then = as_asked
    if run is not None:
        free = {"workers": -1, "decode": "auto", "unlabelled": False}
        as_then = dataclasses.replace(run.data_config, **{**free, **settings})
    same = run is not None and isinstance(data, (str, Path)) and _one_place(run.data, data)
    if not same and not split and "val_fraction" not in settings:
        whole = open_data(data, dataclasses.replace(as_asked, val_fraction=0.0), classes=classes)
        same = any(f"by vitrail on {whole.name}, " in line for line in card.provenance)
        if not same:
            return whole, False, not as_asked.train_split
    return open_data(data, as_then if same else as_asked, classes=classes), same, False


def _one_place(stored: str, data: str | Path) -> bool:
    return bool(stored) and (stored == str(data) or Path(stored).resolve() == Path(data).expanduser().resolve())


def _check_fit(model: Model, data: Data) -> None:
    """Data that was opened without the model's class names may number other classes, or the same ones otherwise."""
    if model.card and model.card.multi_label != data.multi_label:
        kinds = {True: "any number of labels", False: "one class"}
        raise ConfigError(
            f"the model gives a picture {kinds[model.card.multi_label]}, the data set {data.name} {kinds[data.multi_label]}"
        )
    if not model.config.num_classes:
        raise ConfigError(
            "the model answers no classes (it was trained without labels, or its classifier was taken off); give it some: "
            "vitrail train DATA --from RUN"
        )
    count, names = model.config.num_classes, tuple(model.card.classes) if model.card else ()
    if count != len(data.classes):
        raise ConfigError(f"the model answers {count} classes, the data set {data.name} has {len(data.classes)}")
    if names and names != data.classes:
        other = [name for name in data.classes if name not in names]
        found = f"unknown to the model: {', '.join(map(repr, other[:8]))}" if other else "the same ones in another order"
        raise ConfigError(f"the classes of {data.name} are not those of the model: {found}; open it with the model's classes")


def _choose(data: Data, split: str) -> tuple[ImageDataset, str]:
    there = {name: dataset for name in SPLITS if (dataset := getattr(data, name)) is not None}
    name = split or next(iter(there))
    if name not in there:
        raise ConfigError(f"{data.name} has no split {name!r}; it has: {', '.join(there)}")
    return there[name], name


@contextmanager
def _shown(label: str | None, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many more samples are done."""
    console = Console(stderr=True)
    if label is None:
        yield lambda count: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        done, last = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last >= PLAIN_SECONDS:
                last = time.monotonic()
                print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield advance
