"""What the README and the guides tell people to type works: the short commands run, the long ones are read."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitrail.cli import VERBS, main
from vitrail.cli.parse import parse
from vitrail.config import replace_dotted
from vitrail.models import MODELS
from vitrail.recipes import RECIPES
from vitrail.studies.study import study

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = ["--steps", "2", "--workers", "0", "--precision", "fp32", "--device", "cpu", "--no-tensorboard", "--set", "depth=1"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if line := re.sub(r"(^|\s+)#.*", "", line).strip():
            yield line


def vitrail_words(line: str) -> list[str] | None:
    """The words after `vitrail` in a shell line, up to a pipe or redirection."""
    for command in re.split(r"\s(?:\||>|&&)\s", line):
        words = shlex.split(command)
        if words[:1] == ["vitrail"]:
            return words[1:]
        if words[:1] == ["torchrun"]:
            return words[words.index("vitrail") + 1 :]
    return None


def examples() -> list[tuple[str, str]]:
    found = [(page.name, line) for page in PAGES for block in blocks(page, "bash") for line in lines(block)]
    for name, verb in VERBS.items():
        for line in importlib.import_module(f"vitrail.cli.{verb.module}").EXAMPLES.splitlines():
            found.append((name, re.sub(r"\s{3,}.*", "", line)))
    found += [("--help", line) for line in importlib.import_module("vitrail.cli").EXAMPLES.splitlines()]
    return [(where, line) for where, line in found if vitrail_words(line)]


@pytest.mark.parametrize(("where", "line"), examples())
def test_commands_can_be_read(where: str, line: str) -> None:
    """Verb, flags, models, recipes and model settings all exist."""
    words = vitrail_words(line)
    assert words
    name = next(name for length in (2, 1) if (name := " ".join(words[:length])) in VERBS)
    if words[-1] in ("-h", "--help"):
        with pytest.raises(SystemExit) as leaving:
            raise SystemExit(main(words))
        assert leaving.value.code == 0
        return
    module = importlib.import_module(f"vitrail.cli.{VERBS[name].module}")
    kind, rest = module.Arguments, words[len(name.split()) :]
    if name == "study":
        kind, rest = study(rest[0]).Config, rest[1:]
    arguments: Any = parse(kind, rest, prog="vitrail", examples="")
    if name == "train":
        assert arguments.model in MODELS
        assert not arguments.recipe or arguments.recipe in RECIPES
        model = RECIPES[arguments.recipe]().model if arguments.recipe and "--model" not in rest else arguments.model
        replace_dotted(MODELS[model], arguments.overrides)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for page in PAGES for word in re.findall(r"`?make ([a-z-]+)", "\n".join(blocks(page, "bash")))}
    assert named
    assert named <= targets


def test_files_that_pages_name_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def desk(picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders that the README speaks of."""
    shutil.copytree(picture_folder, tmp_path / "photos")
    shutil.copytree(picture_folder / "red", tmp_path / "holiday")
    for i in (1, 2):
        shutil.copy(picture_folder / "red" / f"red-0{i}.png", tmp_path / "holiday" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tour_of_the_readme_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tour = next(block for block in blocks(ROOT / "README.md", "bash") if "--preset auto" in block)
    for line in lines(tour):
        words = vitrail_words(line)
        assert words
        assert main([*words, *(QUICK if words[0] == "train" else [])]) == 0, line
    assert (desk / "runs" / "photos" / "report.html").exists()
    assert "holiday/1.jpg" in capsys.readouterr().out


def test_the_python_of_the_readme_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    quick = re.sub(r"epochs=\d+", 'steps=2, workers=0, precision="fp32", device="cpu", tensorboard=False', code)
    assert quick != code
    for name in re.findall(r"vit_\w+_224", quick):
        assert name in MODELS
        quick = quick.replace(name, "vit_micro_patch4_16")
    quick = quick.replace("image_size=96", "image_size=16")
    kept = [line for line in quick.splitlines() if ".npz" not in line]
    assert len(kept) == len(quick.splitlines()) - 1
    exec(compile("\n".join(kept), "README.md", "exec"), {})
    assert "holiday/1.jpg" in capsys.readouterr().out
