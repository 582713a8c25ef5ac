"""Runs snippets of code in forks of one process that has already imported torch and the models, without the typing hook.

Importing torch takes seconds, a fork milliseconds. Reads one JSON request a line from stdin ({"code", "arguments",
"timeout", "environment"}) and answers each with one JSON line ({"code", "out", "err"}); a snippet sees `sys.argv` as after
`python -c`, and the environment of who asks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import IO, Any


def serve() -> None:
    """Answer requests until stdin ends."""
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
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


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
    """The process, started when first asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, code: str, arguments: tuple[str, ...], timeout: float) -> dict[str, Any]:
        """{"code", "out", "err"} of a snippet."""
        if self.process is None:
            command = [sys.executable, "-c", "from tests.zygote import serve; serve()"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"code": code, "arguments": arguments, "timeout": timeout, "environment": dict(os.environ)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
