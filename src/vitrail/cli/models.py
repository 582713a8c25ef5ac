"""`vitrail models`: what can be built, how large it is, which published weights there are; the settings of one model.

Counting a model takes torch and a fraction of a second. What was counted is kept per model and input in the user's cache
until a line of the models' code changes, so that the list usually appears without torch being loaded.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail models                          all of them
vitrail models 'vit_*_patch16_*'        those that match a pattern, or contain a word
vitrail models --weights                the published weights, their data and licence
vitrail models swin --commercial-ok     those with weights whose licence allows commercial use
vitrail models vit_small_patch16_224    one, with the settings that --set accepts
vitrail models resnet50 --image-size 384"""


@dataclass(frozen=True)
class Arguments:
    """List models with their size, cost and published weights; for a full name, the settings that `--set` accepts."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATTERN")] = "*"
    """A name, a pattern such as 'vit_*', or part of a name."""
    image_size: tuple[int, int] | None = None  # height,width in pixels to count for; by default each model's own
    weights: bool = False  # one row per published weights
    commercial_ok: bool = False  # only weights whose licence is Apache-2.0, MIT or BSD (read it all the same)
    json: bool = False  # print JSON


def run(words: Sequence[str]) -> None:
    """Print the table, or one model's settings."""
    arguments = parse(Arguments, words, prog="vitrail models", examples=EXAMPLES)
    from vitrail.cli import show
    from vitrail.config import unknown

    known = Catalogue()
    pattern = arguments.pattern
    names = [pattern] if pattern in known.models else [n for n in known.models if fnmatch.fnmatch(n, pattern) or pattern in n]
    if not names:
        raise unknown("model", pattern, known.models)
    single = pattern in known.models and not arguments.weights
    if arguments.commercial_ok:
        names = [name for name in names if known.weights(name, True)]
    if arguments.weights:
        rows = [row for name in names for row in known.weights(name, arguments.commercial_ok)]
    else:
        rows = known.measured(names, arguments.image_size)
        for row in rows:
            row["weights"] = ", ".join(w["tag"] for w in known.weights(row["model"], arguments.commercial_ok))
    settings = list(settings_of(pattern)) if single else []
    if arguments.json:
        show.as_json({**rows[0], "settings": {name: value for name, value, _ in settings}} if settings else rows)
    elif settings:
        show.pairs(rows[0])
        show.table(("setting", "value", "type"), settings)
        print(f"vitrail train DATA --model {names[0]} --set {settings[0][0]}={show.number(settings[0][1])}")
    elif rows:
        show.table(tuple(rows[0]), [tuple(row.values()) for row in rows], right=("parameters (M)", "GMACs"))
    else:
        print("none with published weights of a licence that allows commercial use")


def settings_of(name: str) -> Iterator[tuple[str, Any, str]]:
    """(dotted name, value, type) of every setting of a model that `--set` accepts."""
    from vitrail.models import MODELS

    yield from fields(MODELS[name])


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, value, type) of a configuration's settings; the input size and classes come from the data."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        elif prefix or field.name not in ("image_size", "in_channels", "num_classes"):
            kind = hints[field.name]
            yield f"{prefix}{field.name}", value, kind.__name__ if kind in (int, float, bool, str) else str(kind)


class Catalogue:
    """Models, their costs and their weights, as counted before or counted now."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / "models.json"
        self.content = self._read()

    @property
    def models(self) -> dict[str, str]:
        """{registry id: family}."""
        return self.content["models"]

    def weights(self, name: str, commercial: bool = False) -> list[dict[str, Any]]:
        """The published weights of a model, those of a commercial licence first asked for."""
        return [row for row in self.content["weights"].get(name, []) if row["commercial"] == "yes" or not commercial]

    def measured(self, names: Sequence[str], image_size: tuple[int, int] | None) -> list[dict[str, Any]]:
        """One row per model: input, parameters and multiply-adds."""
        keys = {name: f"{name}@{image_size or 'own'}" for name in names}
        absent = [name for name in names if keys[name] not in self.content["costs"]]
        if len(absent) > 8:
            print(f"counting {len(absent)} models (once) ...", file=sys.stderr)
        for name in absent:
            self.content["costs"][keys[name]] = measure(name, image_size)
        if absent:
            self._write()
        return [dict(self.content["costs"][key]) for key in keys.values()]

    def _read(self) -> dict[str, Any]:
        digest = _digest()
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["digest"] == digest:
                return content
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing was kept, or nothing that can be used
        from vitrail.checkpoints.weights import WEIGHTS
        from vitrail.models import MODELS, family_of

        weights: dict[str, list[dict[str, Any]]] = {}
        for row in WEIGHTS:
            p = row.preprocess
            weights.setdefault(row.model, []).append({
                "model": row.model, "tag": row.tag, "licence": row.licence or "not stated",
                "commercial": "yes" if row.commercial else "no", "trained on": row.data,
                "input": f"{p.image_size[0]} crop {p.crop_fraction:.3g} {p.interpolation}", "source": row.source,
            })  # fmt: skip
        models = {name: family_of(config) for name, config in MODELS.items()}
        return {"digest": digest, "models": models, "weights": weights, "costs": {}}

    def _write(self) -> None:
        """Keep what was counted; a home that cannot be written only costs counting again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(self.content, file)
            os.replace(file.name, self.path)
        except OSError:
            return


def _digest() -> str:
    """Of all code that decides what a model costs and which weights are known."""
    room = Path(__file__).parents[1]
    files = [*(room / "models").glob("*.py"), *(room / "layers").glob("*.py"), room / "cost.py", Path(__file__)]
    files += [room / "checkpoints" / "weights.py"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()


def measure(name: str, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Family, input size, parameters and multiply-adds of a registered model, counted without allocating it."""
    from vitrail import cost
    from vitrail.models import ShapesOnly, create_model

    with ShapesOnly():
        model = create_model(name, image_size=image_size)
    return {
        "model": name,
        "family": model.family,
        "input": " x ".join(map(str, model.input_shape)),
        "parameters (M)": digits(cost.count_parameters(model) / 1e6, 2),
        "GMACs": digits(cost.count_flops(model) / 2e9, 3),
    }


def digits(number: float, after: int) -> float:
    """So many digits after the point, or for numbers below one three that count: a tiny model is not nothing."""
    return round(number, after) if abs(number) >= 1 else float(f"{number:.3g}")
