"""Shared by all tests: shapes and types checked at every call, one thread, small generated picture folders.

VITRAIL_TYPECHECK=0 switches the checking off; code that torch.compile or torch.export traces runs through `run_python`,
in a process without it.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if os.environ.get("VITRAIL_TYPECHECK", "1") != "0":
    from jaxtyping import install_import_hook

    # The modules that state shapes: elsewhere mypy has checked the types already, and checking every small function at every
    # call, too, took 18 % of the time of the tests that were measured.
    SOURCES = Path(__file__).parents[1] / "src"
    SHAPED = [path for path in SOURCES.rglob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
    install_import_hook([".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in SHAPED], "beartype.beartype")

import numpy as np
from PIL import Image
from tests import proofs
from tests.peers import pairs
from tests.zygote import Zygote

PEERS = ("timm", "transformers", "pytorchvideo")
COLOURS = {"blue": (40, 60, 200), "green": (60, 170, 70), "red": (210, 50, 40)}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whichever tests its worker ran before."""
    import torch  # not by the process that only hands tests to workers

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip by name what this machine cannot run; peers are never skipped, they must be there when asked for."""
    import torch  # not by the process that only hands tests to workers

    torch.set_num_threads(1)
    compiler = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    for item in items:
        if "compiler" in item.keywords and compiler is None:
            item.add_marker(pytest.mark.skip(reason="needs a C++ compiler"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests against peers fail at once when a peer is missing."""
    missing = [name for name in PEERS if find_spec(name) is None]
    if missing and any("peers" in item.keywords for item in session.items):
        raise pytest.UsageError(f"the tests marked peers need {' and '.join(missing)}: pip install -e '.[peers]'")
    gc.collect()
    gc.freeze()  # what the modules hold stays: no collection looks at it again, and the others are rarer
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish() -> None:
    """Give the modules' objects back, so that the interpreter can end as usual."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests have proven against peers and golden cases, as tables."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    if found := pairs.gather(reports):
        terminalreporter.section("pairs proven against peers")
        terminalreporter.write_line("\n".join(pairs.table(found)))
    if proven := proofs.gather(reports):
        terminalreporter.section("golden cases")
        terminalreporter.write_line("\n".join(proofs.text(proofs.rows(proven, everything=False))))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders: 3 colours, 12 PNG pictures of 20x24 pixels each, easily told apart."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}-{i:02}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def zygote(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process whose forks run snippets, started in good time where a test will need it."""
    own = tmp_path_factory.getbasetemp()
    shared = Zygote(own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own)
    if hasattr(os, "fork") and any("run_python" in getattr(item, "fixturenames", ()) for item in request.session.items):
        shared.start()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def run_python(zygote: Zygote) -> Callable[..., str]:
    """run_python(code, *arguments): stdout of another process without type checking; fails with its stderr.

    The process is a fork of one that has imported torch and the models; `fresh=True` gives a new interpreter.
    """

    def run(code: str, *arguments: str, timeout: float = 240, fresh: bool = False) -> str:
        if fresh or not hasattr(os, "fork"):
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=timeout)
            assert done.returncode == 0, done.stderr
            return done.stdout
        answer = zygote.ask(code, arguments, timeout)
        assert answer["code"] == 0, answer["err"]
        return answer["out"]

    return run
