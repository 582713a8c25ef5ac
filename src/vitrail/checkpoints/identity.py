"""What keys and shapes cannot tell: preprocessing, class names, heads; taken from where it is written down, else guessed aloud.

The order is the same for all of it: the caller's word, metadata in the file, a configuration beside it, the name of the file,
its folder or its repository, the family's default. The last is a guess and called one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitrail import config as settings
from vitrail.config import ModelCard, Preprocess
from vitrail.models import MODELS, ShapesOnly, build, family_of

from .mapping import CheckpointError, State, matching
from .sources import IMAGENET_MEAN, IMAGENET_STD, Files, Source
from .weights import WEIGHTS, Weights, identify

STYLES = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "half": ((0.5,), (0.5,))}  # mean and std by name


@dataclass(frozen=True)
class Origin:
    """Where a state dict came from, and everything that was written down there besides tensors."""

    name: str  # as the user gave it
    metadata: Mapping[str, str] = field(default_factory=dict)  # in the file
    files: Files = field(default_factory=dict)  # beside it
    names: tuple[str, ...] = ()  # of the repository, the file and its folder
    provenance: str = ""  # of a download


@dataclass(frozen=True)
class Claim:
    """Published weights that something takes these for; `exact` where it names the weights and not only their model."""

    row: Weights
    said_by: str
    exact: bool


def claimed(origin: Origin) -> Claim | None:
    """The first claim among metadata, configuration and names."""
    for where, name in _candidates(origin):
        if name and (found := identify(name)) is not None:
            return Claim(found[0], f"{where} {name!r}", found[1])
    return None


def _candidates(origin: Origin) -> Iterator[tuple[str, str]]:
    yield "the file's own", origin.metadata.get("arch", "")
    config = origin.files.get("config.json", {})
    architecture, tag = config.get("architecture"), (config.get("pretrained_cfg") or {}).get("tag")
    if architecture:
        yield "config.json's", f"{architecture}.{tag}"
        yield "config.json's", str(architecture)
    yield from (("the name", name) for name in origin.names)


def is_size_of(row: Weights, config: Any, state: Mapping[str, Tensor]) -> bool:
    """Whether tensors (under our names) are those of the row's model, but for the head and the positions."""
    if row.model not in MODELS or family_of(MODELS[row.model]) != family_of(config):
        return row.model not in MODELS
    with ShapesOnly():
        wanted = build(MODELS[row.model]).state_dict()
    free = ("head.", "positions.")
    shapes = {key: tensor.shape for key, tensor in wanted.items() if not key.startswith(free)}
    return all(key in state and state[key].shape == shape for key, shape in shapes.items() if shape)


def preprocessing(source: Source, card: ModelCard, origin: Origin, claim: Claim | None) -> tuple[Preprocess | None, str]:
    """(how pictures enter, one line that says why)."""
    made = card.preprocess
    if made is None:
        return None, ""
    if _configured(origin.files):
        return made, f"preprocessing: {describe(made)} (from the configuration beside the weights)"
    if claim is not None:
        told = dataclasses.replace(claim.row.preprocess, image_size=made.image_size, channels=made.channels)
        return told, f"preprocessing: {describe(told)} ({claim.said_by} stands for {claim.row.id})"
    if source.one_preprocess:
        return made, f"preprocessing: {describe(made)} (as in all published weights of this kind)"
    if source.guess:
        return made, source.guess
    return made, (
        f"guess: preprocessing {describe(made)} (the default of {source.name} {source.family}; "
        "the weights do not tell; preprocess=... decides)"
    )


def _configured(files: Files) -> bool:
    """Whether configuration files name the preprocessing."""
    config = files.get("config.json", {})
    beside = "image_mean" in files.get("preprocessor_config.json", {})
    return beside or "mean" in config or "mean" in (config.get("pretrained_cfg") or {})


def asked_preprocessing(asked: Any, base: Preprocess) -> Preprocess:
    """The caller's word over `base`: a Preprocess, fields of it, the name of published weights, or "imagenet" or "half"."""
    if isinstance(asked, Preprocess):
        return asked
    if isinstance(asked, Mapping):
        fields = dict(asked)
        named = fields.pop("like", None)
        base = base if named is None else asked_preprocessing(named, base)
        return settings.replace_dotted(base, fields)
    if asked in STYLES:
        mean, std = STYLES[asked]
        return dataclasses.replace(base, mean=mean, std=std)
    found = identify(str(asked))
    if found is None:
        known = {name: None for row in WEIGHTS for name in (row.model, row.id)}
        raise settings.unknown("preprocessing", str(asked), [*STYLES, *known])
    return dataclasses.replace(found[0].preprocess, image_size=base.image_size, channels=base.channels)


def describe(p: Preprocess) -> str:
    """One line: size, fit, interpolation, mean and std."""
    fit = f"crop {p.crop_fraction:.3g}" if p.fit == "crop" else p.fit
    mean, std = (",".join(f"{value:.3g}" for value in values) for values in (p.mean, p.std))
    return f"{p.image_size[0]}x{p.image_size[1]} {fit} {p.interpolation}, mean {mean}, std {std}"


def labelled(card: ModelCard, num_classes: int) -> tuple[ModelCard, str]:
    """(the card with class names, a remark): its own if there is one for every output, ImageNet's for 1000 without names."""
    if card.classes and len(card.classes) != num_classes:
        remark = f"{len(card.classes)} class names for {num_classes} outputs: the names are left out"
        return dataclasses.replace(card, classes=()), remark
    if card.classes or num_classes != 1000:
        return card, ""
    from torchvision.models import ViT_B_16_Weights

    names = tuple(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"])
    return dataclasses.replace(card, classes=names), "guess: 1000 classes without names are taken for ImageNet-1k's"


def unknown_layout(name: str, state: State, sources: tuple[Source, ...], configs: Mapping[str, Any]) -> CheckpointError:
    """The error for names of no known project: the nearest known layout, and the first keys that do not fit it."""
    ranked = sorted(((_fitting(source, state, configs[source.family]), i) for i, source in enumerate(sources)), reverse=True,
                    key=lambda entry: (len(entry[0]), -entry[1]))  # fmt: skip
    known = ", ".join(sorted({f"{s.name} {s.family}" for s in sources}))
    best, nearest = ranked[0][0], sources[ranked[0][1]]
    if not best:
        sample = ", ".join(list(state)[:3])
        return CheckpointError(f"{name}: the names of its tensors ({sample}, ...) belong to no known layout; known: {known}")
    strange = ", ".join([key for key in state if key not in best][:4]) or "none, but some are missing"
    return CheckpointError(
        f"{name}: the names of its tensors belong to no known layout; nearest is {nearest.name} {nearest.family}, which "
        f"{len(best)} of {len(state)} fit; first that do not: {strange}; known: {known}"
    )


def refuse_mixture(
    name: str, unexpected: list[str], source: Source, state: State, sources: tuple[Source, ...], configs: Mapping[str, Any]
) -> None:
    """Raise CheckpointError where many of the keys that a layout does not know are those of another one."""
    if 4 * len(unexpected) < len(state):
        return
    rest = {key: state[key] for key in unexpected if key in state}
    others = [(len(_fitting(other, rest, configs[other.family])), other) for other in sources if other is not source]
    count, other = max(others, key=lambda entry: entry[0])
    if 2 * count >= len(rest) > 0:
        raise CheckpointError(
            f"{name}: mixes {source.name} {source.family} with {count} tensors that look like {other.name} {other.family} "
            f"({', '.join(list(rest)[:3])}, ...); load one model at a time"
        )


def _fitting(source: Source, state: State, config: Any) -> set[str]:
    """The keys of `state` for which the source's table has a rule."""
    return matching(source.rules(config), state)
