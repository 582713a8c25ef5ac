"""Where the time goes, and what the screen says about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .log import Log, Meter, duration

if TYPE_CHECKING:
    from .plan import Plan
    from .setup import Job
    from .step import StepResult

BOTTLENECK = 0.2  # share of the time from which on something that is not computing is worth a word


class Clock:
    """Seconds of this session, in all and by what they were spent on."""

    def __init__(self) -> None:
        self.began = self.last_save = time.monotonic()
        self.spent = {"stepping": 0.0, "waiting": 0.0, "evaluating": 0.0, "saving": 0.0}  # waiting is part of stepping
        self.steps = 0
        self.last = 0.0
        self.before = 0.0  # seconds of earlier sessions of the run

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    @property
    def total(self) -> float:
        """Of this and all earlier sessions of the run."""
        return self.before + self.seconds

    @property
    def since_save(self) -> float:
        """Since the last checkpoint."""
        return time.monotonic() - self.last_save

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Charge the block to one of the accounts; `last` holds its seconds afterwards."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.spent[what] += self.last
        self.steps += what == "stepping"

    def waited(self, seconds: float) -> None:
        """Part of the last step was waiting for data."""
        self.spent["waiting"] += seconds

    def saved(self) -> None:
        """A checkpoint is being written now."""
        self.last_save = time.monotonic()

    def remaining(self, steps: int) -> float:
        """Seconds that so many more steps will take, with what else has been going on between them."""
        busy = self.spent["stepping"] + self.spent["evaluating"] + self.spent["saving"]
        return steps * busy / self.steps if self.steps else float("nan")

    def share(self, what: str) -> float:
        """Part of the busy time that an account holds."""
        busy = self.spent["stepping"] + self.spent["evaluating"] + self.spent["saving"]
        return self.spent[what] / busy if busy else 0.0


def bottleneck(clock: Clock, waiting: float, workers: int, packable: bool = True) -> str:
    """What holds the run up and what to do about it; "" when it is busy computing. packable: see `Store`."""
    if waiting >= BOTTLENECK:
        more = "--workers 2 or more" if workers == 0 else "more --workers"
        return f"waiting for data {waiting:.0%}: {more}{', or `vitrail data pack`' if packable else ''}"
    if clock.share("evaluating") >= BOTTLENECK:
        return f"evaluating {clock.share('evaluating'):.0%} of the time: a larger --eval-every"
    if clock.share("saving") >= BOTTLENECK:
        return f"saving {clock.share('saving'):.0%} of the time: a larger --save-every-minutes or --save-every-steps"
    return ""


def status_line(job: Job, plan: Plan, meter: Meter, clock: Clock, result: StepResult) -> str:
    """The line of the moment: how far, how good, how fast, how long, and what holds it up."""
    p = job.state.progress
    means = meter.means() or {"loss": result.values["loss"]}
    parts = [
        f"step {p.step:,}/{p.total:,}",
        f"epoch {job.epoch:.2f}",
        f"loss {means['loss']:.4f}",
        *([f"accuracy {means['accuracy']:.1%}"] if "accuracy" in means else []),
        f"{meter.speed:,.0f} {'clips' if job.state.model.takes_clips else 'images'}/s",
        f"MFU {plan.utilisation(meter.speed, job.ranks.world, job.progressive.cost(p.step, p.total)):.0%}",
        f"data wait {meter.waiting:.0%}",
        f"ETA {duration(clock.remaining(p.total - p.step))}",
    ]
    held_up = bottleneck(clock, meter.waiting, job.loader.workers, job.loader.dataset.store.packable)
    return "  ".join([*parts, *([f"[{held_up}]"] if held_up else [])])


def evaluation_line(job: Job, log: Log, values: Mapping[str, float], headline: str, better: bool) -> str:
    """One line for the screen: the last training figures beside those of the evaluation."""
    p = job.state.progress
    trained: Mapping[str, float] = next((record for record in reversed(log.history) if record["kind"] == "train"), {})
    parts = [f"epoch {job.epoch:g}", f"step {p.step:,}"]
    if trained.get("loss") is not None:
        parts.append(f"loss {trained['loss']:.4f}")
    shown = dict.fromkeys([headline, *(name for name in ("top1", "map", "balanced_accuracy", "nll") if name in values)])
    for name in shown:
        bounds = ""
        if f"{name}_low" in values:
            bounds = f" ({values[f'{name}_low']:.4f} to {values[f'{name}_high']:.4f})"
        parts.append(f"{name} {values[name]:.4f}{bounds if name == headline else ''}")
    return "  ".join(parts) + ("  best" if better else "")
