"""The command as users meet it: quick help, nearest valid names, plain errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail.cli import GROUPS, VERBS, main
from vitrail.studies import STUDIES


def vitrail(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vitrail", *words], capture_output=True, text=True, timeout=120)


def test_help_is_quick_and_starts_nothing_heavy(run_python: Callable[..., str]) -> None:
    def seconds() -> float:  # of the processor, which other work on the machine hardly changes
        before = os.times()
        assert vitrail("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert 0 < min(seconds() for _ in range(3)) < 0.5
    loaded = run_python("import sys, vitrail.cli; vitrail.cli.main(['--help']); print('modules:', *sys.modules)", fresh=True)
    assert not {"torch", "tyro", "numpy", "yaml"} & set(loaded.split("modules:")[1].split())


def test_help_names_every_verb_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    page = capsys.readouterr().out
    for title, verbs in GROUPS.items():
        assert title in page
        for name, verb in verbs.items():
            assert page.count(f"\n  {name:<12} {verb.summary}") == 1


HELP = """
import contextlib, io, json, sys
import vitrail.cli
pages = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as page:
        code = vitrail.cli.main([*words.split(), "--help"])
    pages[words] = (code, "torch" in sys.modules, page.getvalue())
print(json.dumps(pages))
"""


def test_every_verb_and_every_study_explains_itself_without_torch(run_python: Callable[..., str]) -> None:
    asked = [*VERBS, *(f"study {name}" for name in STUDIES)]
    pages = json.loads(run_python(HELP, json.dumps(asked), fresh=True))
    assert list(pages) == asked
    for words, (code, torch_is_loaded, page) in pages.items():
        assert (words, code, torch_is_loaded) == (words, 0, False)
        assert f"usage: vitrail {words}" in page
        assert f"vitrail {words}" in page.split("\nExamples\n")[1]


@pytest.mark.parametrize("name", VERBS)
def test_every_flag_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag whose help is only its default helps nobody."""
    assert main([*name.split(), "--help"]) == 0
    blocks: list[str] = [""]
    for line in capsys.readouterr().out.split("\nExamples")[0].translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).splitlines():
        text = line.strip()
        if re.match(r"-{1,2}\w", text):
            blocks.append(text)
        elif re.match(r" +\S", line) and not set(text) <= set("-"):
            blocks[-1] += f" {text}"
        else:
            blocks.append("")
    blocks = [block for block in blocks if block.startswith("-")]
    assert blocks
    for block in blocks:
        flags = re.compile(r"^(-{1,2}[\w-]+,? )+((\{\S*\}|[A-Z]+(=[A-Z]+)?(,[A-Z.]+)*) )?")
        explained = re.sub(r"\(default: .*?\)|\(required\)", "", flags.sub("", f"{block} "))
        assert len(explained.split()) > 1, block


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["trian"], "'train'"),
        (["data", "chekc"], "'data check'"),
        (["train", "digits", "--lrr", "1"], "--lr X"),
        (["train", "digits", "--precision", "bf61"], "bf16"),
        (["train", "digits", "--image-size", "3x4x5"], "expected 2 values"),
        (["train", "digits", "--lr", "fast"], "expected a number, got 'fast'"),
        (["train", "digits", "--set", "depth"], "expected name=value, got 'depth'"),
        (["completion", "bahs"], "bash"),
    ],
)
def test_wrong_words_are_answered_with_the_nearest(words: list[str], nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert nearest in said
    assert "Traceback" not in said


def test_unknown_models_and_settings_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "vit_smal_patch16_224"]) == 2
    assert "vit_small_patch16_224" in capsys.readouterr().err


def test_errors_are_one_message_unless_debugging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]
    (tmp_path / "nothing-else").mkdir()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert f"nothing: no such file or folder; nearest in {tmp_path}: nothing-else" in said
    assert len(said.splitlines()) == 1
    monkeypatch.setenv("VITRAIL_DEBUG", "1")
    with pytest.raises((OSError, ValueError), match="no such file or folder"):  # the interpreter prints where
        main(words)


def test_the_process_ends_with_what_main_returns() -> None:
    done = vitrail("trian")
    assert done.returncode == 2
    assert "'train'" in done.stderr


def test_a_closed_pipe_and_an_interrupt_are_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped = subprocess.run(f"{sys.executable} -m vitrail train --help | head -1", shell=True, capture_output=True, text=True)
    assert piped.stderr == ""
    from vitrail.cli import models

    def interrupt(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "run", interrupt)
    assert main(["models"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("predict", "weight-decay", "check", "logit-adjustment"):
        assert word in script
