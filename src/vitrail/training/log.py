"""What a run writes down (metrics.jsonl, metrics.csv, TensorBoard) and what it shows while it runs."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vitrail.checkpoints.io import write_text

RECORDS, TABLE, EVENTS = "metrics.jsonl", "metrics.csv", "tensorboard"
PLAIN_SECONDS = 10.0  # between two plain lines where there is no terminal
LIVE_SECONDS = 0.25  # between two looks of the live line
RECENT_STEPS = 32  # that speeds are taken over


class Log:
    """The records of a run, one JSON object a line: {"kind": train | eval | probe | refused | final, "step", "epoch", ...}.

    Opening cuts the files back to what was known at step `step` (and to whole lines), so that a resumed run has neither gap
    nor duplicate. The CSV table is always made anew from the records; TensorBoard forgets the steps after `step`. Only the
    main process writes.
    """

    def __init__(self, run: Path, step: int = 0, tensorboard: bool = True, main: bool = True):
        self.run, self.main = run, main
        path = run / RECORDS
        self.history = [r for r in read_records(path) if r["step"] <= step and r["kind"] != "final"]
        if main:
            write_text(path, "".join(map(_line, self.history)))
        self.file = (path if main else Path(os.devnull)).open("a", encoding="utf-8")
        self.events: Any = None
        if tensorboard and main:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(run / EVENTS), purge_step=step + 1)

    def record(self, kind: str, step: int, **values: float | str | None) -> None:
        """Append one record; numbers that are not finite are written as null."""
        entry = {"kind": kind, "step": step, **{name: _rounded(value) for name, value in values.items()}}
        self.history.append(entry)
        self.file.write(_line(entry))
        self.file.flush()
        if self.events is not None:
            for name, value in entry.items():
                if name not in ("kind", "step", "epoch") and isinstance(value, (int, float)):
                    self.events.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Make everything recorded so far survive a power cut, and bring the table up to date."""
        if not self.main:
            return
        os.fsync(self.file.fileno())
        write_text(self.run / TABLE, as_table(self.history))
        if self.events is not None:
            self.events.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None or not issubclass(kind, OSError):  # a full disk would only complain once more
            self.sync()
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def as_table(records: Iterable[Mapping[str, Any]]) -> str:
    """CSV text with one row per record and a column for every name that occurs."""
    rows = list(records)
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns) or ["kind", "step"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _rounded(value: float | str | None) -> float | str | None:
    """Seven digits are more than any of these numbers means; not a number is null."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


class Meter:
    """What happened since the last train record, in `sums` (kept in checkpoints, so that means stay exact), and how fast."""

    def __init__(self, sums: dict[str, float]):
        self.sums = sums
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT_STEPS)  # seconds, of which waiting, pictures

    def add(self, values: Mapping[str, float], seconds: float, wait: float, pictures: int) -> None:
        """Count one step."""
        self.recent.append((seconds, wait, pictures))
        for name, value in {**values, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def speed(self) -> float:
        """Pictures a second lately."""
        return sum(pictures for _, _, pictures in self.recent) / max(sum(seconds for seconds, _, _ in self.recent), 1e-9)

    @property
    def waiting(self) -> float:
        """Share of the time lately that was spent waiting for data."""
        return sum(wait for _, wait, _ in self.recent) / max(sum(seconds for seconds, _, _ in self.recent), 1e-9)

    def means(self) -> dict[str, float]:
        """The mean of every value since the last record."""
        steps = self.sums.get("steps", 0.0)
        return {name: total / steps for name, total in self.sums.items() if name != "steps"}


class Screen:
    """The live line on a terminal; plain lines, a few a minute, anywhere else. Silent on all but the main process."""

    def __init__(self, main: bool = True):
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(Text(""), console=self.console, auto_refresh=False, transient=True)
        self.last = time.monotonic()

    def __enter__(self) -> Screen:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(Text(text))

    @property
    def due(self) -> bool:
        """Whether it is time for another `show`."""
        return time.monotonic() - self.last >= (PLAIN_SECONDS if self.live is None else LIVE_SECONDS)

    def show(self, text: str) -> None:
        """The line of the moment."""
        self.last = time.monotonic()
        if self.live is None:
            self.say(text)
        else:
            self.live.update(Text(text), refresh=True)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
