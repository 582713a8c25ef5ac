"""`vitrail completion`: a shell script that completes verbs and flags."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from vitrail.cli import VERBS
from vitrail.cli.parse import OPTIONS, parse

EXAMPLES = """\
vitrail completion bash > ~/.local/share/bash-completion/completions/vitrail
vitrail completion zsh > ~/.zfunc/_vitrail       # with ~/.zfunc in fpath
vitrail completion fish > ~/.config/fish/completions/vitrail.fish"""


@dataclass(frozen=True)
class Arguments:
    """Print a script that completes verbs, flags and choices on TAB."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]  # the shell that reads it


def run(words: Sequence[str]) -> None:
    """Print the script."""
    arguments = parse(Arguments, words, prog="vitrail completion", examples=EXAMPLES)
    tyro.cli(all_verbs(), prog="vitrail", args=["--tyro-write-completion", arguments.shell, "-"], **OPTIONS)


def all_verbs() -> Any:
    """The union of every verb's arguments, as tyro spells a command with subcommands."""
    tree: dict[str, dict[str, Any]] = {}
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        tree.setdefault(first, {})[second] = importlib.import_module(f"vitrail.cli.{verb.module}").Arguments
    options = []
    for first, inner in tree.items():
        if "" in inner:
            kind = inner[""]
        else:
            verbs = _either(_named(kind, second) for second, kind in inner.items())
            kind = make_dataclass(first, [("verb", Annotated[verbs, tyro.conf.arg(name="")])])
        options.append(_named(kind, first))
    return _either(options)


def _either(kinds: Iterable[Any]) -> Any:
    return Union.__getitem__(tuple(kinds))


def _named(kind: Any, name: str) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name=name, prefix_name=False)]
