"""The table engine: one table of rules reads a foreign checkpoint and writes it.

A rule pairs key patterns of ours with key patterns of a source and an invertible operation. `{i}` stands for a number,
`{a,b}` for alternatives that correspond one to one (as in a shell). Example:

    rename("blocks.{i}.norm1.{weight,bias}", "vit.encoder.layer.{i}.layernorm_before.{weight,bias}")
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]
Read = Callable[[Sequence[Tensor]], Tensor]
Write = Callable[[Tensor], Sequence[Tensor]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or keys and what would be right."""


@dataclass(frozen=True)
class Rule:
    """One of our keys from one or several of theirs, and back.

    Without `ours` the source's key is dropped on reading, and `make` gives its value on writing (None: it is left out).
    """

    ours: str
    theirs: tuple[str, ...]
    read: Read = lambda tensors: tensors[0]
    write: Write = lambda tensor: (tensor,)
    make: Callable[[], Tensor] | None = None


def rename(ours: str, theirs: str) -> list[Rule]:
    """The same tensor under another name."""
    return [Rule(a, (b,)) for a, b in _pairs(ours, theirs)]


def transform(ours: str, theirs: str, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> list[Rule]:
    """One tensor, changed by `read` on the way in and by its inverse `write` on the way out."""
    return [Rule(a, (b,), lambda t: read(t[0]), lambda t: (write(t),)) for a, b in _pairs(ours, theirs)]


def transpose(ours: str, theirs: str) -> list[Rule]:
    """A matrix stored (in, out), as flax does."""
    return transform(ours, theirs, lambda t: t.T, lambda t: t.T)


def convolution(ours: str, theirs: str) -> list[Rule]:
    """A 2-D kernel stored (h, w, in, out), as flax and TensorFlow do."""
    return transform(ours, theirs, lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))


def fuse(
    ours: str, *theirs: str, read: Callable[[Tensor], Tensor] | None = None, write: Callable[[Tensor], Tensor] | None = None
) -> list[Rule]:
    """Several tensors stacked along the first axis in this order (q, k, v), each changed by `read` before."""
    into, back = read or (lambda t: t), write or (lambda t: t)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([into(t) for t in tensors])

    def split(tensor: Tensor) -> Sequence[Tensor]:
        return [back(t) for t in tensor.chunk(len(theirs))]

    return [Rule(ours, theirs, join, split)]


def drop(*theirs: str) -> list[Rule]:
    """Keys of the source that say nothing (buffers that every model computes for itself)."""
    return [Rule("", (t,)) for pattern in theirs for t in _braces(pattern)]


def leave(*ours: str) -> list[Rule]:
    """Keys of ours that the source has no tensor for and does without."""
    return [Rule(o, (), write=lambda tensor: ()) for pattern in ours for o in _braces(pattern)]


def constant(theirs: str, make: Callable[[], Tensor]) -> list[Rule]:
    """A key of the source whose value the configuration decides: dropped on reading, made anew on writing."""
    return [Rule("", (theirs,), make=make)]


def _braces(pattern: str) -> list[str]:
    """Expand {a,b}; {i} stays."""
    parts = re.split(r"(\{[^{}]*,[^{}]*\})", pattern)
    options = [part[1:-1].split(",") if part.startswith("{") and "," in part else [part] for part in parts]
    return ["".join(choice) for choice in itertools.product(*options)]


def _pairs(ours: str, theirs: str) -> list[tuple[str, str]]:
    left, right = _braces(ours), _braces(theirs)
    if len(left) != len(right):
        raise AssertionError(f"{ours!r} and {theirs!r} expand to different numbers of keys")
    return list(zip(left, right, strict=True))


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(pattern))
    return re.compile(escaped + r"\Z")


@dataclass
class Report:
    """What happened to the keys of a checkpoint on the way into a model."""

    source: str = ""
    loaded: int = 0
    renamed: int = 0
    dropped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    remade: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line per kind of key, most important first."""
        rows = [f"{self.source}: {self.loaded} tensors loaded" + (f", {self.renamed} renamed" if self.renamed else "")]
        for word in ("resized", "remade", "missing", "unexpected", "dropped"):
            keys: list[str] = getattr(self, word)
            if keys:
                rows.append(f"  {word}: {_shorten(keys)}")
        return rows + [f"  {note}" for note in self.notes]


def _shorten(keys: Sequence[str], most: int = 4) -> str:
    return "; ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def read(rules: Iterable[Rule], state: Mapping[str, Tensor], report: Report) -> State:
    """A foreign state dict under our names. Keys without a rule, and groups with a part missing, go into the report."""
    compiled = [(rule, position, _regex(pattern)) for rule in rules for position, pattern in enumerate(rule.theirs)]
    by_literal = {p.pattern: (r, i) for r, i, p in compiled if not p.groups}
    patterns = [(r, i, p) for r, i, p in compiled if p.groups]
    groups: dict[tuple[str, str], dict[int, Tensor]] = {}
    found: dict[tuple[str, str], Rule] = {}
    for key, tensor in state.items():
        hit = _match(key, by_literal, patterns)
        if hit is None:
            report.unexpected.append(key)
            continue
        rule, position, numbers = hit
        if not rule.ours:
            report.dropped.append(key)
            continue
        name = rule.ours.format(**numbers)
        group = (name, ",".join(numbers.values()))
        groups.setdefault(group, {})[position] = tensor
        found[group] = rule
        report.renamed += name != key
    out: State = {}
    for group, parts in groups.items():
        rule = found[group]
        if len(parts) < len(rule.theirs):
            absent = [t for i, t in enumerate(rule.theirs) if i not in parts]
            report.notes.append(f"{group[0]} is incomplete: {', '.join(absent)} not in the file")
            continue
        out[group[0]] = rule.read([parts[i] for i in range(len(parts))]).contiguous()
    return out


def _match(
    key: str, literal: Mapping[str, tuple[Rule, int]], patterns: Sequence[tuple[Rule, int, re.Pattern[str]]]
) -> tuple[Rule, int, dict[str, str]] | None:
    fixed = literal.get(re.escape(key) + r"\Z")
    if fixed is not None:
        return fixed[0], fixed[1], {}
    for rule, position, pattern in patterns:
        if hit := pattern.match(key):
            return rule, position, hit.groupdict()
    return None


def matching(rules: Iterable[Rule], names: Iterable[str]) -> set[str]:
    """Those of the source's `names` that a rule knows."""
    patterns = [_regex(pattern) for rule in rules for pattern in rule.theirs]
    return {name for name in names if any(pattern.match(name) for pattern in patterns)}


def write(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> State:
    """Our state dict under the source's names: the inverse of `read`. Raises CheckpointError for a key without a place."""
    rules = list(rules)
    table = [(rule, _regex(rule.ours)) for rule in rules if rule.ours]
    out: State = {rule.theirs[0]: rule.make() for rule in rules if rule.make is not None}
    for key, tensor in state.items():
        for rule, pattern in table:
            if hit := pattern.match(key):
                names = [t.format(**hit.groupdict()) for t in rule.theirs]
                out.update(zip(names, (t.contiguous() for t in rule.write(tensor)), strict=True))
                break
        else:
            raise CheckpointError(f"{key} has no place in this format, so the model cannot be written to it")
    return out
