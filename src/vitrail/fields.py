"""Frozen dataclasses to and from plain dictionaries, JSON and YAML, and copies of them with named fields replaced.

Besides, what errors say of a name or path that does not exist. Knows no dataclass of its own; `vitrail.config` offers all of
this beside the settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be used; the message says what was given, what is allowed and the nearest valid choice."""


def nearest(given: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The allowed names most like `given`, best first; never empty unless `allowed` is."""
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(given), names, n=count, cutoff=0.5)
    return close or sorted(names, key=lambda n: -difflib.SequenceMatcher(None, str(given), n).ratio())[:count]


def unknown(what: str, given: str, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that does not exist: what was given, and the nearest valid ones."""
    names = list(allowed)
    listing = f"; valid: {', '.join(names)}" if len(names) <= 16 else ""
    return ConfigError(f"unknown {what} {given!r}: did you mean {' or '.join(map(repr, nearest(given, names)))}?{listing}")


def not_found(path: Path) -> str:
    """What to say of a path that does not exist: that, and what is called most like it beside it."""
    parent = path.parent
    message = f"{path}: no such file or folder"
    if not parent.is_dir():
        return f"{message}; {parent} does not exist either"
    try:
        near = nearest(path.name, [entry.name for entry in itertools.islice(parent.iterdir(), 10_000)])  # comparing takes time
    except OSError:  # a folder that may not be listed
        near = []
    return f"{message}; nearest in {parent.absolute()}: {', '.join(near)}" if near else message


def to_dict(config: Any) -> Any:
    """Plain dictionaries, lists, numbers and strings, ready for JSON or YAML."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The inverse of `to_dict`: `cls` built from a mapping, types checked and converted.

    Raises ConfigError naming the field, what was given and what is allowed.
    """
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping of settings, got {type(values).__name__} ({values!r})")
    for key in values:
        if key not in names:
            raise unknown("setting", f"{where}{key}", [f"{where}{name}" for name in names])
    return cls(**{key: convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind` (also from text, as a command line gives it), or ConfigError."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        return _first_that_fits([a for a in args if a is not type(None)], value, where)
    if origin is Literal:
        named = {str(option): option for option in args}  # "8" for Literal[8] from a command line
        if value in args or (isinstance(value, str) and value in named):
            return value if value in args else named[value]
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(named)} (nearest: {nearest(str(value), named)[0]})")
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, f"{where}.")  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return dict(value)
    return _convert_scalar(kind, value, where)


def _first_that_fits(kinds: list[Any], value: Any, where: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except ConfigError as problem:
            problems.append(str(problem))
    raise ConfigError(problems[0])


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [part for part in value.replace("x", ",").replace(" ", ",").split(",") if part]
    if not isinstance(value, (list, tuple)):
        value = [value]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(args[0], item, where) for item in value)
    if len(value) == 1 and len(args) == 2 and args[0] is args[1]:
        value = [value[0], value[0]]  # one number for both sides of an image
    if len(value) != len(args):
        raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)} ({value!r})")
    return tuple(convert(kind, item, where) for kind, item in zip(args, value, strict=True))


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ConfigError(f"{where}: expected true or false, got {value!r}")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where}: expected a number, got {value!r}") from None
    if kind is int and not isinstance(value, bool):
        try:
            number = float(value)
            if number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
        raise ConfigError(f"{where}: expected a whole number, got {value!r}")
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def replace_dotted(config: T, changes: Mapping[str, Any]) -> T:
    """A copy with `{"depth": 6, "position.kind": "2d"}` set; values may be text. Raises ConfigError on unknown names."""
    hints = get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    plain: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in names:
            raise unknown(f"setting of {type(config).__name__}", key, names)
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            plain[head] = convert(hints[head], value, key)
    for head, inner in nested.items():
        current = plain.get(head, getattr(config, head))
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"{head}: has no settings of its own, so {head}.{next(iter(inner))} cannot be set")
        plain[head] = replace_dotted(current, inner)  # type: ignore[type-var]
    return dataclasses.replace(config, **plain)  # type: ignore[type-var]


def replace_flat(config: T, changes: Mapping[str, Any]) -> T:
    """A copy with fields of any section set by their own name (`{"lr": 1e-3, "seed": 1}`); values may be text.

    A section may also be given whole (`optim=OptimConfig(...)`). Raises ConfigError on unknown names, naming the nearest.
    """
    hints = get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    sections = {name: getattr(config, name) for name in names if dataclasses.is_dataclass(getattr(config, name))}
    owner = {f.name: name for name, section in sections.items() for f in dataclasses.fields(section)}
    # `schedule` is a section and a field of it: text means the field.
    whole = {key for key, value in changes.items() if key in names and not (key in owner and isinstance(value, str))}
    made: dict[str, Any] = {key: convert(hints[key], changes[key], key) for key in whole}
    for key, value in changes.items():
        if key in owner and key not in whole:
            name = owner[key]
            section = made.get(name, sections[name])
            made[name] = dataclasses.replace(section, **{key: convert(get_type_hints(type(section))[key], value, key)})
        elif key not in names:
            raise unknown("setting", key, [n for n in (*names, *owner) if n not in sections])
    return dataclasses.replace(config, **made)  # type: ignore[type-var]


def flat(config: Any) -> dict[str, Any]:
    """The inverse view of `replace_flat`: every setting of every section by its own name."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    plain = {name: value for name, value in fields.items() if not dataclasses.is_dataclass(value)}
    for section in (value for value in fields.values() if dataclasses.is_dataclass(value)):
        plain |= {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return plain


def load(cls: type[T], path: str | Path) -> T:
    """Read a configuration from a .yaml, .yml or .json file; YAML is read with the safe loader.

    Settings stand in their sections, or by their own name as `replace_flat` takes them, which then counts.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as problem:
        raise ConfigError(f"{path}: not a readable configuration file ({problem})") from None
    values = values or {}
    if not isinstance(values, Mapping):
        return from_dict(cls, values)
    kinds = get_type_hints(cls)
    own = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    sections = {name for name in own if dataclasses.is_dataclass(kinds[name])}
    whole = {name for name, value in values.items() if name in own and (name not in sections or isinstance(value, Mapping))}
    nested = {name: value for name, value in values.items() if name in whole}
    return replace_flat(from_dict(cls, nested), {name: value for name, value in values.items() if name not in whole})


def dump(config: Any) -> str:
    """YAML text of a configuration, fields in declaration order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
