"""The training loop: prepare, show the plan, take steps, evaluate, end."""

from __future__ import annotations

import dataclasses
import errno
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vitrail.checkpoints import save_model
from vitrail.checkpoints.io import write_text
from vitrail.checkpoints.pretext import save_pretext
from vitrail.config import ConfigError, RunConfig, dump
from vitrail.data import Batch
from vitrail.evaluation.metrics import Report
from vitrail.layers.lora import merge_lora
from vitrail.models import Model

from . import schedule
from .distributed import joined_ranks
from .evaluators import Evaluator
from .interrupt import Abandoned, Interruption, Stopped
from .log import Log, Meter, Screen
from .objectives import Objective
from .optim import set_lr
from .plan import Plan, hand_out, length_lines, make_plan, rehearse, steps_within
from .selfsupervision import PretextEvaluator
from .setup import CONFIG, Job, Request, prepare, resolve
from .state import SaveError, newest_checkpoint, remove_unfinished, restore, save_checkpoint
from .status import Clock, evaluation_line, status_line
from .step import NonFiniteError, StepResult, keep_refused, optimiser_step

BEST, FINAL = "best", "model"  # folders of a run, each loadable
REPORT = "evaluation.json"


@dataclass(frozen=True)
class Run:
    """A finished run. `model` holds the final weights (their moving average if that is on), `metrics` those of the report."""

    path: Path
    model: Model
    config: RunConfig
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)  # the records of metrics.jsonl
    report: Report | None = field(default=None, repr=False)  # of the test split, else of the validation split
    is_main: bool = True  # whether this process writes the run's files


def train(
    config: RunConfig | None = None,
    data: Any = None,
    *,
    resume: bool | str | Path = False,
    objective: Objective | str | None = None,
    evaluators: Sequence[Evaluator] = (),
    **settings: Any,
) -> Run:
    """Train a model as the settings say; they are a RunConfig, its fields by name (`lr=1e-3`), or both.

    data: a path or the name of an embedded set, or from Python a torch Dataset or [(picture, label), ...].
    resume: the directory of a run to go on with exactly, or True: go on if the run's directory holds one, else start.
    objective: called with (model, images, targets), returns a dict of means with "loss"; default: `build_objective`. Or the
    name of one: "classify", "masked", "mae".
    evaluators: called with a model, yield (name, value); the best is where "top1", "map" or else the first is largest.
    Default: all metrics of the validation split.

    Raises ConfigError for settings, data or weights that cannot be used, NonFiniteError when the loss diverges, SaveError
    when the disk is full, and leaves through Stopped (a SystemExit, 130 or 143) after SIGINT or SIGTERM, having saved.
    """
    clock = Clock()
    if isinstance(objective, str):
        settings, objective = {**settings, "objective": objective}, None
    request = resolve(config, data, settings, resume)
    with Interruption() as interruption, joined_ranks(request.config.device) as ranks, Screen(ranks.main) as screen:
        session = Session(screen, clock, interruption)
        with _stopping(session, "nothing to save yet"), interruption.at_once():
            job = prepare(request, ranks, objective, evaluators)
        with _plain_errors(job):
            with _stopping(session, "nothing to save yet"), interruption.at_once():
                plan, stream = _begin(job, request, session)
            with Log(job.path, job.state.progress.step, job.config.tensorboard, ranks.main) as log:
                with closing(stream):
                    _fit(job, plan, stream, log, session)
                again = f"all steps are done and saved; evaluate with: vitrail train --resume {job.path}"
                with _stopping(session, again), interruption.at_once():
                    return _finish(job, log, screen)


@dataclass
class Session:
    """What belongs to this process's part of a run."""

    screen: Screen
    clock: Clock
    interruption: Interruption


@contextmanager
def _stopping(session: Session, state: str) -> Iterator[None]:
    """A signal during work that `Interruption.at_once` lets go of leaves through Stopped."""
    try:
        yield
    except Abandoned:
        session.screen.say(f"stopped; {state}")
        raise Stopped(session.interruption.number) from None


def _begin(job: Job, request: Request, session: Session) -> tuple[Plan, Generator[Batch]]:
    """Start or restore, show the plan, and write down the settings as they became."""
    job.state.model.train()
    main, say, p = job.ranks.main, session.screen.say, job.state.progress
    if main:
        job.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(job.path)
    if request.checkpoint is not None:
        restore(request.checkpoint, job.state)
        p = job.state.progress
    session.clock.before = p.seconds
    plan = make_plan(job)
    for line in plan.lines:
        say(line)
    stream = hand_out([], job.loader.batches(p.step * job.config.accumulate))
    rehearsal = None
    if not request.resumed:
        rehearsal, stream = rehearse(job, stream)
        if budget := job.config.schedule.time_budget:
            affordable = steps_within(job, rehearsal, 60 * budget - session.clock.seconds)
            p.total = min(p.total, job.ranks.agree(affordable))
    for line in length_lines(job, rehearsal):
        say(line)
    if request.resumed:
        say(f"resumed  at step {p.step:,} of {p.total:,}")
    job.config = dataclasses.replace(job.config, schedule=dataclasses.replace(job.config.schedule, steps=p.total))
    if main:
        write_text(job.path / CONFIG, dump(job.config))
    return plan, stream


def _fit(job: Job, plan: Plan, stream: Iterator[Batch], log: Log, session: Session) -> None:
    """The loop: until the end, evaluate and save where due, take a step, write down what it measured."""
    config, p, clock = job.config, job.state.progress, session.clock
    meter = Meter(p.window)
    stopping = False
    while True:
        due = p.step == p.total or p.step % job.evaluation_steps == 0
        if job.evaluators and due and p.step > p.evaluated:
            with clock.measure("evaluating"):
                stopping |= not _evaluate(job, log, session)
        if job.probe is not None and (p.step == p.total or p.step % job.probe_steps == 0) and p.step > p.probed:
            with clock.measure("evaluating"):
                stopping |= not _probe(job, job.probe, log, session)
        ended = p.step >= p.total or 0 < config.schedule.patience <= p.stale
        if ended or stopping or _save_is_due(job, clock):
            with clock.measure("saving"):
                _save(job, log, clock)
        if ended or stopping:
            break
        with clock.measure("stepping"):
            batches = [next(stream) for _ in range(config.accumulate)]
            set_lr(job.state.optimizer, job.peak_lr * schedule.factor(config.schedule, p.step, p.total, job.warmup))
            result = optimiser_step(job, batches, p.step * config.accumulate, session.interruption.number > 0)
        p.step += 1
        p.seconds = clock.total
        stopping = result.stopping
        _account(job, result, batches, meter, log, session)
        if p.step % job.record_steps == 0 or p.step % job.evaluation_steps == 0 or p.step == p.total:
            _record(job, plan, meter, log)
        if session.screen.due:
            session.screen.show(status_line(job, plan, meter, clock, result))
    if stopping and not ended:
        session.screen.say(
            f"stopped at step {p.step:,} of {p.total:,} and saved; go on with: vitrail train --resume {job.path}"
        )
        raise Stopped(session.interruption.number or signal.SIGTERM)  # another process may be the one that was asked


def _account(job: Job, result: StepResult, batches: Sequence[Batch], meter: Meter, log: Log, session: Session) -> None:
    """Count a step; a refused one is written down, its batch kept, and too many in a row end the run."""
    p, loss = job.state.progress, result.values["loss"]
    if result.outcome == "done":
        p.refused = 0
        wait = sum(batch.wait for batch in batches)
        session.clock.waited(wait)
        meter.add({**result.values, "grad_norm": result.norm}, session.clock.last, wait, job.config.batch_size)
        return
    log.record(result.outcome, p.step, epoch=job.epoch, loss=loss, grad_norm=result.norm)
    if result.outcome == "rescaled":
        return
    p.refused += 1
    p.refused_total += 1
    kept = keep_refused(job, batches, result)
    what = f"step {p.step} refused: loss {loss:g}, gradient norm {result.norm:g}; weights unchanged"
    session.screen.say(what + (f", batch kept in {kept.name}" if kept else ""))
    if p.refused >= job.config.max_nonfinite:
        raise NonFiniteError(
            f"{p.refused} steps in a row gave a loss or gradient that is not a finite number (last: step {p.step}); "
            f"training stopped, the batches are in {job.path}/nonfinite-step-*. Try a lower --lr, a longer --warmup-epochs, "
            "--clip-norm 1, --precision fp32, or look at the kept pictures"
        )


def _record(job: Job, plan: Plan, meter: Meter, log: Log) -> None:
    p = job.state.progress
    log.record(
        "train", p.step, epoch=job.epoch, lr=max(group["lr"] for group in job.state.optimizer.param_groups), **meter.means(),
        images_per_second=meter.speed, data_wait=meter.waiting,
        mfu=plan.utilisation(meter.speed, job.ranks.world, job.progressive.cost(p.step - 1, p.total)),
        seconds=p.seconds,
    )  # fmt: skip
    meter.sums.clear()


def _evaluate(job: Job, log: Log, session: Session) -> bool:
    """Ask the evaluators and keep the best weights; False when a signal came before they had answered."""
    p, model = job.state.progress, job.state.averaged
    try:
        with session.interruption.at_once(job.ranks.world == 1):
            values = {name: float(value) for evaluator in job.evaluators for name, value in evaluator(model)}
    except Abandoned:
        return False
    finally:
        job.state.model.train()
    p.evaluated = p.step
    log.record("eval", p.step, epoch=job.epoch, **values)
    headline = next((name for name in ("top1", "map") if name in values), next(iter(values), ""))
    better = bool(headline) and (p.best is None or values[headline] > p.best)
    p.stale = 0 if better else p.stale + 1
    if better:
        p.best, p.best_step = values[headline], p.step
        if job.ranks.main:
            save_model(model, job.path / BEST, card=dataclasses.replace(job.card, metrics=values))
    session.screen.say(evaluation_line(job, log, values, headline, better))
    return True


def _probe(job: Job, probe: Evaluator, log: Log, session: Session) -> bool:
    """Few-shot probes of the features as they are by now; False when a signal came before they had answered."""
    p = job.state.progress
    try:
        with session.interruption.at_once(job.ranks.world == 1):
            values = dict(probe(job.state.averaged))
    except Abandoned:
        return False
    finally:
        job.state.model.train()
    p.probed = p.step
    log.record("probe", p.step, epoch=job.epoch, **values)
    told = "  ".join(f"{name.partition('_')[2]} shots {value:.4f}" for name, value in values.items())
    session.screen.say(f"epoch {job.epoch:g}  step {p.step:,}  few-shot probe: {told}")
    return True


def _save_is_due(job: Job, clock: Clock) -> bool:
    p, config = job.state.progress, job.config
    by_steps = config.save_every_steps > 0 and p.step > 0 and p.step % config.save_every_steps == 0
    return by_steps or (config.save_every_minutes > 0 and clock.since_save >= 60 * config.save_every_minutes)


def _save(job: Job, log: Log, clock: Clock) -> None:
    """Only the main process writes; the log is made safe first, so that it reaches as far as the checkpoint."""
    clock.saved()
    job.state.progress.seconds = clock.total
    if job.ranks.main:
        log.sync()
        save_checkpoint(job.path, job.state, job.card, max(job.config.keep_last, 1))


def _finish(job: Job, log: Log, screen: Screen) -> Run:
    """The final report (test split, else validation) in float32, the final weights, and where everything is."""
    model, p = job.state.averaged, job.state.progress
    split = next((split for split in ("test", "val") if getattr(job.data, split) is not None), "")
    report, evaluator = None, job.split_evaluator(split) if split else None
    metrics: dict[str, float] = {}
    if isinstance(evaluator, PretextEvaluator):
        metrics = dict(dataclasses.replace(evaluator, precision="fp32")(model))
    elif evaluator is not None:
        report = evaluator.report(model, precision="fp32", progress=f"evaluating {split}")
        metrics = job.ranks.agree(dict(report.metrics) if report else {})
    merge_lora(model)
    model.card = card = dataclasses.replace(job.card, metrics=metrics)
    if job.ranks.main:
        save_model(model, job.path / FINAL, card=card)
        if job.state.pretext is not None:
            save_pretext(job.state.pretext, job.path)
        bad = {name: dataset.bad.summary() for name, dataset in job.data.splits().items() if len(dataset.bad)}
        for name, summary in bad.items():
            screen.say(f"{name:<9}{summary}")
        if report is not None:
            report = dataclasses.replace(report, split=split, notes=(*report.notes, *bad.values()))
            report.save(job.path / REPORT)
            screen.say(f"\n{split}\n{report}")
        elif metrics:
            screen.say(f"{split:<9} {', '.join(f'{name} {value:.4f}' for name, value in metrics.items())}")
        if metrics:
            log.record("final", p.step, epoch=job.epoch, split=split, **metrics)
        if p.best is not None:
            screen.say(f"best      step {p.best_step:,}: {p.best:.4f}, in {job.path / BEST}")
        screen.say(f"final     step {p.step:,}, in {job.path / FINAL}")
        if job.state.pretext is not None:
            screen.say(f"go on     fine-tune with: vitrail train DATA --from {job.path}")
    return Run(job.path, model.eval(), job.config, metrics, log.history, report, job.ranks.main)


@contextmanager
def _plain_errors(job: Job) -> Iterator[None]:
    """A full disk gives one plain SaveError whatever was being written, a full device memory a ConfigError with ways out."""
    try:
        yield
    except SaveError:
        raise
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{job.ranks.device} has too little memory for {job.micro_batch} pictures at a time: --accumulate "
            f"{2 * job.config.accumulate} gives the same result in smaller parts, --checkpointing saves activations"
        ) from None
    except (OSError, SafetensorError) as problem:
        if isinstance(problem, OSError) and problem.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        where = newest_checkpoint(job.path)
        way = f"make room and go on with: vitrail train --resume {job.path}" if where else "nothing had been saved yet"
        raise SaveError(f"could not write to {job.path}, is the disk full? ({problem}); {way}") from None
