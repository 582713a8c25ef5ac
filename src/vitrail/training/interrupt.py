"""SIGTERM and SIGINT end a run cleanly: the step in flight is finished and saved, then the process leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """A run that was asked to stop and has been saved; the exit code is 130 after SIGINT and 143 after SIGTERM."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Abandoned(Exception):  # noqa: N818 - not an error: how a wait inside `Interruption.at_once` ends
    """A signal came during work that need not be finished."""


class Interruption:
    """Remembers the first signal that asks to stop; the second one of the same kind acts as it would without us.

    Handlers can only be set in the main thread; elsewhere nothing is caught.
    """

    def __init__(self) -> None:
        self.number = 0
        self.raising = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self.previous[number])
        if self.raising:
            raise Abandoned

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """In this block a signal raises Abandoned where it strikes, if that is `allowed`."""
        self.raising = allowed
        try:
            if allowed and self.number:
                raise Abandoned
            yield
        finally:
            self.raising = False
