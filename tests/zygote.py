"""Runs snippets of code in forks of one process that has already imported torch and the models, without the typing hook.

Importing torch takes seconds, a fork milliseconds. Reads one JSON request a line from a socket ({"code", "arguments",
"timeout", "environment"}) and answers each with one JSON line ({"code", "out", "err"}); a snippet sees `sys.argv` as after
`python -c`, and the environment of who asks.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any


def serve(path: str, taken: str) -> None:
    """Answer at a socket until all who asked have gone; then the file that says that somebody serves goes, too."""
    import torch
    import torch._dynamo.backends.debugging
    import torch._functorch.aot_autograd
    import torch._inductor.lowering  # this and the next two take seconds where they are first needed
    import torch.utils.tensorboard
    import torchmetrics.functional.classification  # noqa: F401

    import vitrail.checkpoints
    import vitrail.cost
    import vitrail.models  # noqa: F401

    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    gc.collect()
    gc.freeze()  # shared by all forks: no collection touches it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        listener.settimeout(600)  # for the first: nobody comes where the session was killed
        os.rename(f"{path}.new", path)  # who finds it can connect
        asking = [listener.accept()[0]]
        while asking:
            for ready in select.select([listener, *asking], [], [], 1.0)[0]:
                if ready is listener:
                    asking.append(listener.accept()[0])
                elif line := read_line(ready):
                    if os.fork() == 0:
                        ready.sendall(json.dumps(answer(json.loads(line))).encode() + b"\n")
                        os._exit(0)
                else:
                    asking.remove(ready)
            while reap():
                pass
        os.unlink(path)
        os.unlink(taken)
    os._exit(0)  # taking all modules apart would take seconds


def read_line(connection: socket.socket) -> bytes:
    """Up to a newline; nothing when the other side has gone."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := connection.recv(2**16)):
            return b""
        line += more
    return line


def reap() -> bool:
    """Whether a child had ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request in a fork; it is killed when its time is over."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            run(request, out, err)
        end, code = time.monotonic() + request["timeout"], None
        while code is None:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            else:
                time.sleep(0.01)
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read(), "err": err.read()}


def run(request: dict[str, Any], out: IO[str], err: IO[str]) -> None:
    """In the fork: the snippet as __main__, its output into files."""
    for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, err.fileno())):
        os.dup2(source, descriptor)
    sys.argv = ["-c", *request["arguments"]]
    os.environ.clear()
    os.environ.update(request["environment"])
    code = 0
    try:
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Zygote:
    """The process; the workers of a test session share one, started by the first of them."""

    def __init__(self, folder: Path) -> None:
        self.path, self.taken = folder / "zygote", folder / "zygote.taken"
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None

    def ask(self, code: str, arguments: tuple[str, ...], timeout: float) -> dict[str, Any]:
        """{"code", "out", "err"} of a snippet."""
        if self.connection is None:
            self.connection = self.connect()
        request = {"code": code, "arguments": arguments, "timeout": timeout, "environment": dict(os.environ)}
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(read_line(self.connection))

    def start(self) -> None:
        """Start the process where nobody has; it takes seconds until it answers."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            if code:
                self.taken.unlink(missing_ok=True)  # so that the other worker tries for itself, and does not wait
                raise RuntimeError(f"the process that runs snippets ended with exit status {code}")
        try:
            self.taken.touch(exist_ok=False)
        except FileExistsError:
            return
        command = [sys.executable, "-c", f"from tests.zygote import serve; serve({str(self.path)!r}, {str(self.taken)!r})"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def connect(self) -> socket.socket:
        """Wait for the process."""
        for _ in range(2400):
            self.start()
            if connection := self.try_to_connect():
                return connection
            time.sleep(0.05)
        raise TimeoutError("the process that runs snippets does not answer")

    def try_to_connect(self) -> socket.socket | None:
        """None while nobody serves."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self.path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Leave; the process ends when nobody is left, but not before somebody was there."""
        while self.connection is None and self.process is not None and self.process.poll() is None:
            time.sleep(0.05)
            self.connection = self.try_to_connect()
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.wait()
