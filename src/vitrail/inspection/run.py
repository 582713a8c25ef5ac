"""What a run directory tells about a run: its settings, its history, how to repeat it, and where this page was made."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitrail.config import ConfigError, RunConfig, load
from vitrail.cost import processor

CONFIG, RECORDS, REPORT = "config.yaml", "metrics.jsonl", "evaluation.json"
_PACKAGES = ("vitrail", "torch", "torchvision", "numpy", "pillow")


@dataclass(frozen=True)
class RunRecord:
    """A run directory: resolved settings and the records of metrics.jsonl (kind train, eval, refused, final)."""

    path: Path
    config: RunConfig
    records: tuple[dict[str, Any], ...]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def minutes(self) -> float | None:
        """Time spent on training steps, None if nothing was recorded."""
        seconds = [record["seconds"] for record in self.of_kind("train") if record.get("seconds") is not None]
        return seconds[-1] / 60 if seconds else None

    @property
    def command(self) -> str:
        """The command that repeats the run with the settings as they became, in another directory."""
        words = ["vitrail", "train", "--config", str(self.path / CONFIG), "--out", f"{self.path}-again"]
        if self.config.schedule.time_budget:  # it became a number of steps, which is stored
            words += ["--time-budget", "0"]
        return shlex.join(words)


def read_run(path: str | Path) -> RunRecord:
    """Read a run directory. Raises ConfigError where there is no run, or its files cannot be read."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} holds no run (no {CONFIG} in it)")
    records = []
    if (path / RECORDS).is_file():
        whole = (path / RECORDS).read_text(encoding="utf-8").split("\n")[:-1]  # a line cut short by a kill is left out
        try:
            records = [json.loads(line) for line in whole]
        except ValueError as problem:
            raise ConfigError(f"{path / RECORDS}: not readable as JSON lines ({problem})") from None
    return RunRecord(path, load(RunConfig, path / CONFIG), tuple(records))


def environment(device: str) -> list[tuple[str, str]]:
    """Versions and the machine this process runs on, as (name, value)."""
    rows = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    if commit := source_commit(Path(__file__)):
        rows.append(("vitrail commit", commit))
    rows += [("system", platform.platform(terse=True)), ("processor", processor()), ("threads", str(torch.get_num_threads()))]
    if device.startswith("cuda") and torch.cuda.is_available():
        rows.append(("accelerator", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"))
    return rows


def source_commit(file: Path) -> str:
    """The git commit that a source file belongs to, marked if the checkout has changes; "" for an installed package."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:  # lies in somebody's checkout without belonging to it
        return ""
    commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return "" if commit is None else f"{commit}{' with changes' if changes else ''}"
