"""From settings to everything a run needs: `resolve` the settings, `prepare` the parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from vitrail.checkpoints import load_checkpoint_card
from vitrail.checkpoints.pretext import build_pretext, needs_labels
from vitrail.config import (
    ConfigError,
    ModelCard,
    Preprocess,
    RunConfig,
    flat,
    load,
    replace_flat,
    to_dict,
)
from vitrail.cost import memory_format, pick_precision
from vitrail.data import Data, ImageDataset, TrainLoader, open_data
from vitrail.data.embedded import NAMES as EMBEDDED
from vitrail.data.images import DecodeMode
from vitrail.limits import check_limits
from vitrail.models.deit import BothLogits, DeiT
from vitrail.models.pretext import Pretext

from . import schedule
from .build import build_model, make_card, settle_preprocess, start_weights
from .distillation import Distill
from .distributed import Ranks
from .evaluators import Evaluator, FewShotEvaluator, SplitEvaluator
from .idle import idle_settings
from .inputs import Inputs
from .objectives import Objective, build_objective, sampler_weights
from .optim import build_ema, build_optimizer, scaled_lr
from .preset import choose, side_in_names
from .progressive import Progressive, plan_sizes
from .selfsupervision import GuessPatches, PretextEvaluator, check_settings, without_label_settings
from .state import MODEL, Progress, TrainState, newest_checkpoint
from .teacher import Teacher, build_teacher, store_answers
from .transfer import prepare_transfer

CONFIG = "config.yaml"
# What may differ when a run is resumed: none of these changes its result.
FREE = frozenset({
    "data", "out", "device", "workers", "save_every_steps", "save_every_minutes", "keep_last", "max_nonfinite", "report",
    "tensorboard", "teacher", "teacher_cache",
})  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What was asked for: the settings, which of them explicitly, the data if it is an object, and whether to resume."""

    config: RunConfig
    explicit: frozenset[str]
    path: Path
    source: Any  # a path, the name of an embedded set, or a Python collection
    checkpoint: Path | None = None  # to go on from
    resumed: bool = False


def resolve(config: RunConfig | None, data: Any, settings: Mapping[str, Any], resume: bool | str | Path) -> Request:
    """The settings of a new or resumed run; nothing is opened yet.

    `settings` are fields of any section by their own name. resume: the directory of a run, or True for "go on if the run's
    directory holds one, else start". Raises ConfigError for unknown settings, a missing run, a directory that already holds
    a run when `resume` is off, and changed settings of a resumed run.
    """
    named = {**settings, **({"data": str(data)} if isinstance(data, (str, Path)) else {})}
    given = replace_flat(config or RunConfig(), named)
    check_limits(flat(given))
    if given.data and given.data not in EMBEDDED:
        given = dataclasses.replace(given, data=str(Path(given.data).expanduser().absolute()))
    if given.init_from and Path(given.init_from).expanduser().exists():
        given = dataclasses.replace(given, init_from=str(Path(given.init_from).expanduser().absolute()))
    if given.distillation.teacher and (teacher := Path(given.distillation.teacher).expanduser()).exists():
        given = replace_flat(given, {"teacher": str(teacher.absolute())})
    collection = None if isinstance(data, (str, Path)) else data
    defaults = flat(RunConfig())
    explicit = frozenset(named) | {name for name, value in flat(given).items() if value != defaults[name]}
    if isinstance(resume, (str, Path)):
        path = Path(resume)
        if not (path / CONFIG).exists():
            raise ConfigError(f"{path} holds no run to resume (no {CONFIG} in it)")
    else:
        path = Path(given.out or Path("runs") / _run_name(given, explicit, collection))
    if not (path / CONFIG).exists():
        if collection is None and not given.data:
            raise ConfigError("no data was named: give a folder, a table, tar shards, or digits, emoji or motion (embedded)")
        given = dataclasses.replace(given, out=str(path))
        return Request(given, explicit, path, given.data if collection is None else collection)
    if not resume:
        raise ConfigError(
            f"{path} already holds a run ({_how_far(path)}); go on with it: vitrail train --resume {path} "
            f'(resume="{path}" from Python), or name another directory: --out'
        )
    stored = load(RunConfig, path / CONFIG)
    _refuse_changes(stored, given, explicit, path)
    changed = {name: value for name, value in flat(given).items() if name in explicit & FREE}
    stored = replace_flat(stored, {**changed, "out": str(path)})
    if collection is None and not stored.data:
        raise ConfigError(f"{path} was trained on a Python collection; hand it over again as data to resume")
    source = stored.data if collection is None else collection
    return Request(stored, explicit, path, source, newest_checkpoint(path), resumed=True)


def _run_name(config: RunConfig, explicit: frozenset[str], collection: Any) -> str:
    data = Path(config.data).name.split(".")[0] if collection is None else type(collection).__name__.lower()
    model = f"from-{Path(config.init_from).name}" if config.init_from and "model" not in explicit else config.model
    return f"{data}-{model}"


def _how_far(path: Path) -> str:
    newest = newest_checkpoint(path)
    return f"saved at step {int(newest.name.removeprefix('step-')):,}" if newest else "nothing saved yet"


def _refuse_changes(stored: RunConfig, given: RunConfig, explicit: frozenset[str], path: Path) -> None:
    before, now = flat(stored), flat(given)
    shortened = {"steps"} if stored.schedule.time_budget else set()  # a budget may have become fewer steps
    changed = [name for name in sorted(explicit - FREE - shortened) if not _agrees(before[name], now[name])]
    if changed:
        listed = ", ".join(f"{name} ({before[name]} there, {now[name]} asked for)" for name in changed)
        raise ConfigError(
            f"a resumed run keeps its settings, but these differ in {path}: {listed}; "
            "start another run with --out, from these weights with --init-from"
        )


def _agrees(stored: Any, asked: Any) -> bool:
    """Whether a stored setting is what is asked for: the value, what "auto" became, or the model's settings and more."""
    stored, asked = to_dict(stored), to_dict(asked)
    if isinstance(asked, dict):
        return all(name in stored and stored[name] == value for name, value in asked.items())
    return asked in (stored, "auto")


@dataclass
class Job:
    """Everything a run works with. `runner` is the model as it is called: compiled, its gradients averaged over processes."""

    config: RunConfig
    path: Path
    ranks: Ranks
    data: Data
    card: ModelCard
    state: TrainState
    runner: nn.Module
    inputs: Inputs
    objective: Objective
    evaluators: Sequence[Evaluator]
    loader: TrainLoader
    notes: tuple[str, ...]
    progressive: Progressive = field(default_factory=Progressive)
    probe: Evaluator | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for group in self.state.optimizer.param_groups for p in group["params"]]

    @property
    def peak_lr(self) -> float:
        """The learning rate after scaling to the total batch."""
        return scaled_lr(self.config.optim, self.config.batch_size)

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return schedule.warmup_steps(self.config.schedule, self.loader.steps_per_epoch, self.state.progress.total)

    @property
    def evaluation_steps(self) -> int:
        """Optimiser steps between evaluations."""
        return max(round(self.config.eval_every * self.loader.steps_per_epoch), 1)

    @property
    def probe_steps(self) -> int:
        """Optimiser steps between few-shot probes."""
        return max(round(self.config.probe_every * self.loader.steps_per_epoch), 1)

    @property
    def record_steps(self) -> int:
        """Optimiser steps between train records."""
        return max(min(self.loader.steps_per_epoch // 10, 50), 1)

    @property
    def epoch(self) -> float:
        """Epochs done, with fraction."""
        return self.state.progress.step / self.loader.steps_per_epoch

    @property
    def micro_batch(self) -> int:
        """Pictures that one process sees at a time."""
        return self.config.batch_size // (self.config.accumulate * self.ranks.world)

    def split_evaluator(self, split: str) -> SplitEvaluator | PretextEvaluator | None:
        """The evaluator of val or test, None where there is no such split."""
        dataset = getattr(self.data, split)
        if dataset is None:
            return None
        assert self.card.preprocess is not None
        c, workers, pretext = self.config, self.config.data_config.workers, self.state.pretext
        if pretext is not None:
            return PretextEvaluator(pretext, dataset, self.card.preprocess, self.ranks, c.precision, self.micro_batch, workers)
        return SplitEvaluator(dataset, self.card.preprocess, self.ranks, c.precision, 2 * self.micro_batch, workers)


def prepare(request: Request, ranks: Ranks, objective: Objective | None, evaluators: Sequence[Evaluator]) -> Job:
    """Open the data, build the model and all that trains it; the job stands at step 0 or at the request's checkpoint.

    Raises ConfigError (a ValueError) for whatever of the settings, data or weights cannot be used.
    """
    config, data, notes = _settle(request, ranks, custom=objective is not None)
    assert data.train is not None
    labelled = needs_labels(config.objective)
    torch.manual_seed(config.seed)
    model = build_model(config, request.explicit, data.classes if labelled else ())
    if not config.pretrained:  # whose name may hold a tag
        config = dataclasses.replace(config, model=model.name or config.model)
    preprocess = settle_preprocess(config, model)
    pretext = None if labelled else build_pretext(config.objective.objective, config.self_supervision, model, preprocess)
    precision = pick_precision(config.precision, ranks.device)
    trained = model if pretext is None else pretext
    trained.to(ranks.device)
    model.set_checkpointing(config.checkpointing)
    layout = memory_format(model, precision)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    config = replace_flat(config, {"preset": "none", "device": ranks.device.type, "precision": precision})
    mode: DecodeMode = "exact" if config.data_config.decode == "exact" else "scaled"
    loader = TrainLoader(
        data.train, preprocess=preprocess, augment=config.augment, batch_size=config.batch_size,
        accumulate=config.accumulate, seed=config.seed, rank=ranks.rank, world=ranks.world,
        workers=config.data_config.workers, mode=mode,
        weights=sampler_weights(config.objective, data.train), pin_memory=ranks.device.type == "cuda",
    )  # fmt: skip
    teacher = _teacher(config, data, preprocess, ranks, loader, mode, objective)
    if teacher is None and objective is None and labelled and isinstance(model, DeiT):
        notes += (_leave_to_the_labels(model),)
    if labelled:
        source = start_weights(config)
        notes += prepare_transfer(model, config, source, data, preprocess, ranks, resumed=request.resumed)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(trained, config.optim, ranks.device),
        ema=build_ema(model, config.optim.ema) if config.optim.ema else None,
        scaler=GradScaler(ranks.device.type, enabled=config.precision == "fp16"),
        progress=Progress(total=schedule.total_steps(config.schedule, loader.steps_per_epoch), data=fingerprint(data.train)),
        pretext=pretext,
    )
    if teacher is not None:
        state.progress.teacher = teacher.identity
    # Each head of a distilled model is compared with a truth of its own, so the replica answers with both.
    replica = ranks.wrap(BothLogits(model) if teacher is not None and isinstance(model, DeiT) else trained)
    job = Job(
        config=config,
        path=request.path,
        ranks=ranks,
        data=data,
        card=make_card(config, model, data, preprocess, teacher),
        state=state,
        runner=torch.compile(replica) if config.compile else replica,  # type: ignore[arg-type]
        inputs=Inputs(preprocess, config.augment, len(data.classes), config.seed, layout, teacher).to(ranks.device),
        objective=objective or _objective(config, data.train, teacher, pretext).to(ranks.device),
        evaluators=evaluators,
        loader=loader,
        notes=notes,
        progressive=plan_sizes(model, config.schedule),
    )
    validation = job.split_evaluator("val")
    if not evaluators and validation is not None:
        job.evaluators = [validation]
    if config.probe_shots:
        job.probe = FewShotEvaluator(data.train, validation, config.probe_shots)
    return job


def _settle(request: Request, ranks: Ranks, custom: bool) -> tuple[RunConfig, Data, tuple[str, ...]]:
    """The settings that follow from the data, the data, and what is worth saying of both; `custom`: an objective was given."""
    config = request.config
    labelled = needs_labels(config.objective)
    if config.data_config.unlabelled == labelled:
        config = _with_labels_or_not(config, labelled)
    data = _open(request, config)
    notes = data.notes
    if config.preset == "auto" and not request.resumed:
        config, reasons = choose(config, request.explicit, data, ranks.device)
        notes += reasons
    if not labelled:
        config = without_label_settings(config, request.explicit)
        check_settings(config, custom)
    notes += idle_settings(config, request.explicit)
    if reason := why_not_to_mirror(config, request.explicit, data):
        config = replace_flat(config, {"hflip": 0.0})
        notes += (reason,)
    return config, data, notes


def _teacher(
    config: RunConfig, data: Data, preprocess: Preprocess, ranks: Ranks, loader: TrainLoader, mode: DecodeMode,
    objective: Objective | None,
) -> Teacher | None:  # fmt: skip
    """The teacher asked for, its answers stored where they are to be."""
    if not config.distillation.teacher:
        return None
    if objective is not None:
        raise ConfigError("a teacher and an objective of your own were given; give one of them")
    teacher = build_teacher(config.distillation, data, preprocess, ranks.device, config.precision)
    if config.distillation.teacher_cache:
        store_answers(teacher, loader, config.augment, config.distillation.teacher_cache, mode, ranks)
    return teacher


def _with_labels_or_not(config: RunConfig, labelled: bool) -> RunConfig:
    if labelled:
        raise ConfigError("unlabelled samples teach a classifier nothing; --objective masked and mae use them")
    return replace_flat(config, {"unlabelled": True})


def _open(request: Request, config: RunConfig) -> Data:
    """The data, its classes numbered as in the checkpoint to go on from."""
    classes = None
    if request.checkpoint is not None:
        card = load_checkpoint_card(request.checkpoint / MODEL)[1]
        classes = (card.classes or None) if card else None
    data = open_data(request.source, config.data_config, classes)
    if data.train is None:
        raise ConfigError(f"{data.name} has no training samples (splits: {', '.join(data.splits()) or 'none'})")
    return data


def _leave_to_the_labels(model: DeiT) -> str:
    """What the heads of a distilled model learn without a teacher; one that no label reaches is taken out of training.

    Replicas in several processes wait for the gradient of every trained parameter.
    """
    unread = model.head.unread
    if unread is None:
        return f"{model.name} without a teacher: both heads learn the labels, through the mean of their logits"
    unread.requires_grad_(False)
    kind = model.head.prediction
    return f"{model.name} without a teacher: the {kind} head learns the labels, the other one stays as it is"


def _objective(config: RunConfig, dataset: ImageDataset, teacher: Teacher | None, pretext: Pretext | None) -> nn.Module:
    if pretext is not None:
        return GuessPatches(pretext)
    labels = build_objective(config.objective, dataset)
    return labels if teacher is None else Distill(labels, config.distillation)


def fingerprint(dataset: ImageDataset) -> str:
    """A short text that changes when samples of a data set are added, removed, moved or labelled otherwise."""
    return hashlib.blake2b(np.ascontiguousarray(dataset.targets).tobytes(), digest_size=8).hexdigest()


def why_not_to_mirror(config: RunConfig, explicit: frozenset[str], data: Data) -> str:
    """Why flips are switched off, or "": mirroring would give samples of one side the label of the other.

    Asking for it by name is respected.
    """
    sided = side_in_names(data.classes)
    if not sided or "hflip" in explicit or not config.augment.hflip:
        return ""
    return f"no mirrored samples, because the class {sided!r} names a side; --hflip 0.5 mirrors all the same"
