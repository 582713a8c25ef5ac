"""The command line: one thin module per verb, found by name and imported only when it is asked for.

Nothing heavy is imported here: `vitrail --help` neither starts torch nor reads a configuration.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

USAGE = "usage: vitrail VERB [OPTIONS]      (vitrail VERB --help explains one verb)"


class Verb(NamedTuple):
    """A row of the help page: the module with `Arguments`, `EXAMPLES` and `run`, and one line of what it does."""

    module: str
    summary: str


GROUPS: dict[str, dict[str, Verb]] = {
    "Learn": {
        "train": Verb("train", "train a model on a folder, a table, shards or an embedded set; or resume a run"),
        "eval": Verb("evaluate", "measure a trained model on a data set, with confidence intervals"),
        "probe": Verb("probe", "judge models by their frozen features, few-shot and linear; says which to fine-tune"),
        "report": Verb("report", "write report.html of a run again: curves, errors as pictures, attention"),
        "study": Verb("study", "run an experiment over many models, sizes and seeds, with a page at the end"),
    },
    "Use": {
        "inspect": Verb("inspect", "look into a model: attention, rollout, distances, filters, layers; one page"),
        "predict": Verb("predict", "name what is in pictures: files, folders, patterns or paths from stdin"),
        "convert": Verb("convert", "read any checkpoint and write it in another format"),
    },
    "Data": {
        "data check": Verb("data_check", "find broken files, duplicates and leakage between splits"),
        "data stats": Verb("data_stats", "count classes, sizes and formats; measure channel mean and std"),
        "data pack": Verb("data_pack", "write a pre-resized copy that trains faster"),
    },
    "Look up": {
        "models": Verb("models", "list models with size, cost and published weights, or the settings of one"),
        "models show": Verb("models_show", "show one model: parts, cost, published weights, settings"),
        "bench": Verb("bench", "measure speed and memory of one model on this machine"),
        "doctor": Verb("doctor", "show versions, devices and decoders, and what is missing"),
        "completion": Verb("completion", "print a completion script for bash, zsh or fish"),
    },
}

EXAMPLES = """\
vitrail train digits --model vit_tiny_patch16_224 --image-size 32 --set patch=4 depth=4
vitrail train photos/ --preset auto --time-budget 10
vitrail eval runs/photos-vit_tiny_patch16_224 photos/ --split test
vitrail predict runs/photos-vit_tiny_patch16_224 holiday/*.jpg --format csv"""

VERBS: dict[str, Verb] = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 it failed, 2 it was asked for wrongly, 130 interrupted."""
    # OpenMP's idle threads spin by default; on a machine with anything else to do that makes small products ten times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # read when torch is first imported
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_page())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"vitrail {version('vitrail')}")
        return 0
    name = next((name for length in (2, 1) if (name := " ".join(words[:length])) in VERBS), None)
    if name is None:
        return no_such_verb(words)
    return guarded(name, words[len(name.split()) :])


def no_such_verb(words: Sequence[str]) -> int:
    """Explain a family of verbs ("vitrail data"), or name the valid ones nearest to what was given."""
    family = {name: verb for name, verb in VERBS.items() if name.startswith(f"{words[0]} ")}
    if family and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(f"usage: vitrail {words[0]} {{{','.join(name.split()[1] for name in family)}}} [OPTIONS]\n")
        print("\n".join(verb_lines(family)))
        return 0 if len(words) > 1 else 2
    from vitrail.config import unknown

    given = " ".join(words[:2]) if family else words[0]
    complain(f"{unknown('verb', given, VERBS)}\n{USAGE}")
    return 2


def guarded(name: str, words: Sequence[str]) -> int:
    """Run a verb so that what a user can mend is one clear message, and what is our fault says how to see it."""
    from vitrail.config import ConfigError

    try:
        code = importlib.import_module(f"vitrail.cli.{VERBS[name].module}").run(words)
        sys.stdout.flush()
        return int(code or 0)
    except SystemExit as leaving:  # tyro's way out of --help (0) and of unreadable flags (2)
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as problem:
        if os.environ.get("VITRAIL_DEBUG"):
            raise
        complain(f"{explain(problem)}{'' if is_ours(problem) else '  (VITRAIL_DEBUG=1 shows where)'}")
        # What models refuse, who know no ConfigError, is a plain ValueError; checkpoints and pictures have errors of their own.
        return 2 if isinstance(problem, ConfigError) or (type(problem) is ValueError and is_ours(problem)) else 1


def explain(problem: Exception) -> str:
    """The message of an error as a sentence: an OSError names its file, an empty message its class."""
    if isinstance(problem, OSError) and problem.strerror and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem) or type(problem).__name__


def is_ours(problem: Exception) -> bool:
    """Whether this package raised the error knowingly: its innermost frame lies in our source."""
    frames = traceback.extract_tb(problem.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


def complain(message: str) -> None:
    """One message on stderr, its first word red on a terminal."""
    start, end = ("\033[1;31m", "\033[0m") if colours(sys.stderr.isatty()) else ("", "")
    print(f"{start}error:{end} {message}", file=sys.stderr)


def colours(terminal: bool) -> bool:
    """Whether to colour: on terminals, unless NO_COLOR asks otherwise."""
    return terminal and not os.environ.get("NO_COLOR")


def help_page() -> str:
    """What `vitrail --help` prints."""
    bold, end = ("\033[1m", "\033[0m") if colours(sys.stdout.isatty()) else ("", "")
    lines = [USAGE, "", "Vision Transformers on images and video: train, measure, use and look into them."]
    for title, verbs in GROUPS.items():
        lines += ["", f"{bold}{title}{end}", *verb_lines(verbs)]
    lines += ["", f"{bold}Examples{end}", *(f"  {line}" for line in EXAMPLES.splitlines())]
    lines += ["", "VITRAIL_DEBUG=1 shows the full traceback of an error."]
    return "\n".join(lines)


def verb_lines(verbs: dict[str, Verb]) -> list[str]:
    """One aligned line per verb."""
    return [f"  {name:<12} {verb.summary}" for name, verb in verbs.items()]
