"""The house keeps its rules: modules stand alone, starting is light, and each concern has one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "vitrail").rglob("*.py"))
HEAVY = ("torch", "matplotlib", "datasets", "pyarrow", "torchmetrics", "tensorboard", "timm", "transformers", "av")
MAX_LINES, MAX_FUNCTION = 400, 70


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def test_every_module_imports_on_its_own(run_python: Callable[..., str]) -> None:
    """No module relies on a sibling having been imported first; rooms cannot rely on others, import-linter sees to that.

    Importing a module begins with its room, so what the room itself imports has been tried with it.
    """
    names = [module_name(path) for path in SOURCES]
    code = """
import importlib, sys

def fresh(name):
    for loaded in [m for m in sys.modules if m.split(".")[:2] == name.split(".")[:2]]:
        del sys.modules[loaded]
    importlib.import_module(name)

tried = set()
for name in sys.argv[1:]:
    room = ".".join(name.split(".")[:2])
    if room not in tried:
        fresh(room)
        tried |= {m for m in sys.modules if m.split(".")[:2] == room.split(".")}
    if name not in tried:
        fresh(name)
        tried.add(name)
print(len(tried & set(sys.argv[1:])))
"""
    assert run_python(code, *names).split()[-1] == str(len(names))


@pytest.mark.parametrize("module", ["vitrail", "vitrail.cli", "vitrail.config"])
def test_starting_is_light(run_python: Callable[..., str], module: str) -> None:
    loaded = run_python(f"import {module}, sys; print(*sys.modules)", fresh=True).split()
    assert not set(HEAVY) & set(loaded)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_files_and_functions_stay_readable() -> None:
    long_files = [str(path) for path in SOURCES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    long_functions = [
        f"{path}: {f.name}" for path in SOURCES for f in functions(path) if (f.end_lineno or 0) - f.lineno >= MAX_FUNCTION
    ]
    assert not long_files
    assert not long_functions


def test_attention_is_computed_in_one_place() -> None:
    users = [path.name for path in SOURCES if "scaled_dot_product_attention" in path.read_text(encoding="utf-8")]
    assert users == ["attention.py"]


def test_nothing_is_unpickled() -> None:
    """torch.load only with weights_only=True; pickle itself only for the names of its errors."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.(loads?|Unpickler)\b|allow_pickle=True|weights_only=False", text), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    assert not [str(path) for path in SOURCES if later.search(path.read_text(encoding="utf-8"))]
    assert not [path for path in SOURCES if path.name in ("utils.py", "helpers.py", "misc.py", "common.py")]
