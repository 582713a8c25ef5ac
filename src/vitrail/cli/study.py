"""`vitrail study`: an experiment over many runs, as one resumable command with a page at the end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from vitrail.cli.parse import parse
from vitrail.config import unknown
from vitrail.studies import STUDIES

EXAMPLES = """\
vitrail study pooling photos/ --budget 1e12
vitrail study pooling --help                      the settings of one study"""


@dataclass(frozen=True)
class Arguments:
    """Run an experiment over many models, sizes and seeds; `vitrail study NAME --help` explains one."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The study."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, table, tar shards, Arrow data set or embedded set."""
    out: str = ""  # directory of the runs and of study.html; by default studies/<data>-<study>
    seeds: tuple[int, ...] = (0, 1, 2)  # of the weights, the order and, where sizes are compared, the subset


def run(words: Sequence[str]) -> int:
    """Run one study and say what it found, or list the studies."""
    if not words or words[0] in ("-h", "--help"):
        print(help_page())
        return 0 if words else 2
    if words[0] not in STUDIES:
        raise unknown("study", words[0], STUDIES)
    from vitrail.studies.study import run_study, study

    module = study(words[0])
    config = parse(module.Config, words[1:], prog=f"vitrail study {words[0]}", examples=module.EXAMPLES)
    findings, out = run_study(words[0], config, command=shlex.join(["vitrail", "study", *words]))
    from vitrail.cli import show

    print()
    for table in findings.tables:
        show.table(table.columns, table.rows, title=table.title, right=table.columns[1:])
    for sentence in (findings.answer, *findings.sentences):
        print(sentence)
    print(f"page      {out / 'study.html'}  (open it in a browser)")
    return 0


def help_page() -> str:
    """What `vitrail study --help` prints."""
    lines = ["usage: vitrail study NAME DATA [OPTIONS]", "", (Arguments.__doc__ or "").strip(), ""]
    lines += [f"  {name:<14} {entry.summary}" for name, entry in STUDIES.items()]
    lines += ["", "Every study goes on where it was stopped when the same command is given again.", ""]
    lines += ["options", "  -h, --help     show this page, or after NAME the settings of one study", ""]
    return "\n".join([*lines, "Examples", *(f"  {line}" for line in EXAMPLES.splitlines())])
