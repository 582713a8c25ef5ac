"""Called by test_kill.py in a process of its own: trains the same micro run again and again, each time killed elsewhere.

Every training happens in a fork of this process, so that importing torch is paid for once. Writes a JSON report.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vitrail.checkpoints import save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.cost import Memory, matmul_peak
from vitrail.models import create_model
from vitrail.training import loop, plan, step
from vitrail.training.evaluators import SplitEvaluator
from vitrail.training.log import Log
from vitrail.training.setup import Job
from vitrail.training.state import newest_checkpoint

SETTINGS: dict[str, Any] = {
    "model": "vit_micro_patch4_16", "overrides": {"depth": 2, "dropout": 0.1, "drop_path": 0.2}, "batch_size": 16,
    "accumulate": 2, "steps": 14, "ema": 0.9, "mixup": 0.4, "cutmix": 0.5, "label_smoothing": 0.1, "save_every_steps": 3,
    "keep_last": 2, "precision": "fp32", "device": "cpu", "layer_decay": 0.9, "affine_degrees": 10.0, "val_fraction": 0.25,
}  # fmt: skip
# Families with modules of their own: what SETTINGS becomes (and 8 steps, two epochs). The teacher is made by main().
FAMILIES: dict[str, dict[str, Any]] = {
    "swin_micro": {"overrides": {"dropout": 0.1, "drop_path": 0.2}, "optimizer": "muon"},
    "cvt_micro": {"overrides": {"dropout": 0.1, "drop_path": 0.2}},
    "deit_micro": {"teacher": "teacher", "distill": "soft", "distill_temperature": 3.0, "distill_weight": 0.3},
}
TIMES = ("seconds", "images_per_second", "data_wait", "mfu")  # of a record: the only values that may differ


def samples() -> list[tuple[torch.Tensor, int]]:
    """96 pictures of 3 classes: 72 to train on (4 steps an epoch) and 24 to validate on."""
    pixels = torch.randint(0, 256, (96, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [(image // (1 + i % 3), i % 3) for i, image in enumerate(pixels)]


class Events:
    """Calls `act` at the `number`-th instrumented moment; else only writes down what the moments are."""

    def __init__(self, number: int | None, act: Callable[[], None], journal: Path):
        self.number, self.act, self.journal = number, act, journal.open("w")
        self.count = 0

    def moment(self, name: str) -> None:
        self.journal.write(name + "\n")
        self.journal.flush()
        self.count += 1
        if self.count - 1 == self.number:
            self.act()

    def around(self, owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.moment(f"{name} begins")
            result = original(*args, **kwargs)
            self.moment(f"{name} done")
            return result

        setattr(owner, attribute, called)


def training(
    folder: Path, number: int | None, act: Callable[[], None], workers: int, resume: bool, settings: dict[str, Any]
) -> None:
    """In a fork: train (or resume) in `folder`, with `act` at the given moment."""
    events = Events(number, act, folder.with_suffix(".events"))
    events.around(step, "micro_step", "micro-step")
    events.around(step, "_update", "update")
    events.around(loop, "save_checkpoint", "checkpoint")
    events.around(loop, "save_model", "weights")
    events.around(SplitEvaluator, "report", "evaluation")
    events.around(Log, "record", "record")
    events.around(pathlib.Path, "rename", "folder rename")
    events.around(pathlib.Path, "replace", "file rename")
    if resume:
        loop.train(resume=folder, data=samples(), workers=workers)
    else:
        loop.train(data=samples(), out=str(folder), workers=workers, **settings)


def forked(folder: Path, number: int | None = None, act: Callable[[], None] = lambda: None, *,
           workers: int = 0, resume: bool = False,
           settings: dict[str, Any] = SETTINGS) -> tuple[int, str]:  # fmt: skip
    """(exit code, what it printed) of a training in a fork; a negative code is the signal that ended it."""
    output = folder.with_suffix(".out")
    child = os.fork()
    if child == 0:
        os.setpgrp()
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            training(folder, number, act, workers, resume, settings)
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        except OSError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output.read_text()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a finished run leaves in tensors: final and best weights, optimiser and average of the last checkpoint."""
    last = newest_checkpoint(folder)
    assert last is not None
    files = [folder / "model" / "model.safetensors", folder / "best" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {f"{file.parent.name}/{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def compared(folder: Path, whole: Path) -> dict[str, Any]:
    """How a run differs from the uninterrupted one."""
    mine, theirs = tensors(folder), tensors(whole)
    unequal = [name for name in theirs if name not in mine or not torch.equal(mine[name], theirs[name])]
    rows = [line.split(",")[:2] for line in (folder / "metrics.csv").read_text().splitlines()]
    return {
        "unequal": unequal,
        "tensors": len(theirs),
        "same_records": records(folder) == records(whole),
        "same_table": rows == [line.split(",")[:2] for line in (whole / "metrics.csv").read_text().splitlines()],
        "left_over": [str(path) for path in folder.rglob(".*")],
    }


def resumed(folder: Path, whole: Path, workers: int) -> dict[str, Any]:
    """Go on with a run (or start it, if it was killed before there was anything) and compare."""
    code, output = forked(folder, workers=workers, resume=(folder / "config.yaml").exists())
    return {"resumed": code, "output": output, **(compared(folder, whole) if code == 0 else {})}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon() -> None:
    """A little later, wherever training is by then; the run's own clock, so that a slow or a busy machine changes nothing."""
    threading.Timer(0.003, die).start()


def full_disk() -> None:
    """From now on no file of this process may grow beyond 40 kB: less than a checkpoint's, more than the log's."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


def torn_line(folder: Path) -> Callable[[], None]:
    def act() -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')
        die()

    return act


def choose(events: list[str]) -> dict[str, int]:
    """Moments to die at: early and late ones of every kind that matters, and a few drawn at random."""

    def nth(name: str, which: float) -> int:
        found = [i for i, event in enumerate(events) if event == name]
        return found[int(which * (len(found) - 1))]

    rng = random.Random(2)
    chosen = {
        "between micro-steps": nth("micro-step done", 0.62),
        "before an update": nth("update begins", 0.5),
        "after an update": nth("update done", 0.8),
        "checkpoint written, not renamed": nth("folder rename begins", 0.6),
        "checkpoint half written": nth("folder rename begins", 0.6) - 3,
        "checkpoint renamed, old ones not removed": nth("folder rename done", 0.6),
        "first checkpoint not renamed": nth("folder rename begins", 0.0),
        "epoch end, before the evaluation": nth("evaluation begins", 0.5),
        "best weights half written": nth("weights begins", 0.3) + 1,
        "final weights": nth("weights begins", 1.0) + 1,
    }
    return chosen | {f"drawn {i}": rng.randrange(len(events)) for i in range(2)}


def main(folder: Path, report: Path) -> None:
    torch.set_num_threads(1)
    matmul_peak("cpu", "fp32")
    memory = Memory(1, 1, 1, 1, 1)
    plan.count_flops, plan.forecast_memory = (lambda *_: 1), (lambda *_, **__: memory)  # a third of such a short run
    Job.record_steps = property(lambda job: 4)  # type: ignore[assignment, method-assign] # checkpoints fall between records
    result: dict[str, Any] = {"killed": {}}
    whole = folder / "whole"
    result["whole"] = forked(whole)
    events = whole.with_suffix(".events").read_text().splitlines()
    result["events"] = len(events)

    for i, (name, number) in enumerate(choose(events).items()):
        run, (before, after) = folder / f"killed{i}", [(0, 0), (2, 0), (0, 0), (0, 2)][i % 4]
        code, _ = forked(run, number, torn_line(run) if name == "drawn 1" else die, workers=before)
        result["killed"][f"{name} ({events[number]})"] = {"code": code, **resumed(run, whole, after)}
    for fraction in (0.5, 0.8):
        run = folder / f"timed{fraction}"
        code, _ = forked(run, int(fraction * len(events)), die_soon, workers=2)
        result["killed"][f"soon after {fraction:.0%} of the moments"] = {"code": code, **resumed(run, whole, 0)}

    moments = {signal.SIGTERM: "between micro-steps", signal.SIGINT: "epoch end, before the evaluation"}
    for sent, moment in moments.items():
        run = folder / sent.name
        code, output = forked(run, choose(events)[moment], lambda sent=sent: os.killpg(0, sent), workers=2)
        saved = newest_checkpoint(run)
        result[sent.name] = {"code": code, "said": output, "saved": saved.name if saved else "", **resumed(run, whole, 0)}

    run = folder / "full"
    second = [i for i, event in enumerate(events) if event == "checkpoint begins"][1]
    code, output = forked(run, second, full_disk)
    left = [path.name for path in (run / "checkpoints").iterdir()]
    result["full"] = {"code": code, "said": output, "left": left, **resumed(run, whole, 0)}

    teacher = create_model("resnet_micro", num_classes=3)
    torch.nn.init.normal_(teacher.head.linear.weight)
    teacher.card = ModelCard(classes=("0", "1", "2"), preprocess=Preprocess((16, 16)))
    save_model(teacher, folder / "teacher")
    result["families"] = {}
    for model, changes in FAMILIES.items():
        settings = {**SETTINGS, "steps": 8, "model": model, **changes}
        if "teacher" in changes:
            settings["teacher"] = str(folder / "teacher")
        whole, run = folder / model, folder / f"{model}-killed"
        ended, output = forked(whole, settings=settings)
        events = whole.with_suffix(".events").read_text().splitlines()
        code, _ = forked(run, choose(events)["between micro-steps"], die, settings=settings)
        result["families"][model] = {"whole": ended, "said": output, "code": code, **resumed(run, whole, 0)}
    report.write_text(json.dumps(result, indent=1))
