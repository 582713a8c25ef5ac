"""Flags from dataclasses: tyro with this project's spelling of values, and examples under every help page.

Values are read by `config.convert`, so `--image-size 64`, `--image-size 224x320` and the same text in a YAML file mean
the same thing.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vitrail.config import ConfigError, convert

T = TypeVar("T")
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
NAMES = re.compile(r"[\w-]+(,[\w-]+)+")
UNSET = "unset"  # how an empty text or None reads among the defaults of a help page

registry = ConstructorRegistry()
OPTIONS: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff), "registry": registry}


def parse(arguments: type[T], words: Sequence[str], *, prog: str, examples: str, default: T | None = None) -> T:
    """An instance of the dataclass `arguments` read from the command line.

    Leaves through SystemExit: 0 after `--help`, 2 after an unknown or unreadable flag (the nearest valid one is named).
    """
    options = OPTIONS
    if default is not None:  # either way of a switch must exist, whatever the default says
        options = {**OPTIONS, "default": default, "config": (tyro.conf.OmitArgPrefixes,)}
    try:
        return tyro.cli(arguments, args=list(words), prog=prog, **options)
    except SystemExit as leaving:
        if not leaving.code:
            print("\nExamples")
            print("\n".join(f"  {line}" for line in examples.splitlines()))
        raise


@registry.primitive_rule
def _one_word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Numbers, text, choices and fixed or numeric tuples, each optional or not: always exactly one word."""
    kind = info.type
    core = _without_none(kind)
    if not _is_one_word(core):
        return None

    def read(given: list[str]) -> Any:
        try:
            return convert(kind, given[0], "")
        except ConfigError as problem:
            raise ValueError(str(problem).removeprefix(": ")) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(core),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_show(value)],
        choices=tuple(map(str, get_args(core))) if get_origin(core) is Literal else None,
    )


@registry.primitive_rule
def _names(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Words of a flag that takes several, apart or joined by commas as numbers are; paths and settings stay whole."""
    if info.type != tuple[str, ...] or tyro.conf.Positional in info.markers:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME,...",
        instance_from_str=lambda words: tuple(
            name for word in words for name in (word.split(",") if NAMES.fullmatch(word) else [word])
        ),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_show(item) for item in value] or [UNSET],
    )


@registry.primitive_rule
def _pairs(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """`name=value` words for a mapping; numbers, true, false and lists are read as JSON, the rest is text."""
    if not (isinstance(info.type_origin, type) and issubclass(info.type_origin, Mapping)):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=lambda words: dict(_pair(word) for word in words),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={_show(item)}" for name, item in value.items()] or [UNSET],
    )


def _pair(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not (name and equals):
        raise ValueError(f"expected name=value, got {word!r}")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def _without_none(kind: Any) -> Any:
    inner = [option for option in get_args(kind) if option is not type(None)]
    return inner[0] if get_origin(kind) in (Union, types.UnionType) and len(inner) == 1 else kind


def _is_one_word(kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return all(item in (int, float, Ellipsis) for item in get_args(kind))
    return kind in METAVARS or get_origin(kind) is Literal


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        letter = METAVARS[get_args(kind)[0]]
        return f"{letter},{letter}{',...' if Ellipsis in get_args(kind) else ''}"
    return METAVARS[kind]


def _show(value: Any) -> str:
    if value is None or value == "":
        return UNSET
    if isinstance(value, (tuple, list)):
        return ",".join(_show(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flags_in(words: Sequence[str]) -> set[str]:
    """The names of settings that were given as flags, also those given their default; --no-check gives check."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}
