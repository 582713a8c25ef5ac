"""The model of a run: made or loaded as the settings say, with its preprocessing and its card."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

from vitrail.checkpoints import load_model
from vitrail.checkpoints import pretrained as published
from vitrail.checkpoints.pretext import needs_labels
from vitrail.config import ConfigError, ModelCard, Preprocess, RunConfig, convert, replace_dotted, to_dict, unknown
from vitrail.data import Data
from vitrail.models import MODELS, Model, build, family_of

from .teacher import Teacher


def build_model(config: RunConfig, explicit: frozenset[str], classes: tuple[str, ...]) -> Model:
    """A model of the settings with a head for `classes`: random, or with the weights to start from.

    Raises ConfigError where settings contradict each other or the weights, CheckpointError for weights that cannot be read.
    """
    changes: dict[str, Any] = {**config.overrides, "num_classes": len(classes)}
    for name, setting in (("image_size", "image_size"), ("in_channels", "channels"), ("frames", "frames")):
        wish = getattr(config.input, setting)
        if wish is None:
            continue
        if name in changes and convert(type(wish) if name != "image_size" else tuple[int, int], changes[name], name) != wish:
            flag = f"--{setting.replace('_', '-')}"
            raise ConfigError(f"{setting} is {wish}, but overrides (--set) say {name}={changes[name]}: set it by {flag} alone")
        changes[name] = wish
    if config.transfer.inflate:
        return _from_pictures(config, changes)
    if source := start_weights(config):
        clips = config.model in MODELS and "frames" in to_dict(MODELS[config.model]) and "model" in explicit
        hint = "; an image ViT becomes a video model by inflate (--inflate central_frame)" if clips else ""
        try:
            model = load_model(source, **changes)
        except ValueError as problem:
            if hint and "'frames'" in str(problem):
                raise ConfigError(f"{problem}{hint}") from None
            raise
        if config.init_from and config.model not in ("", model.name) and "model" in explicit:
            raise ConfigError(
                f"init_from is a {model.name or model.family}, model says {config.model}: give one of them"
                f"{'' if model.takes_clips else hint}"
            )
        if model.card is None or model.card.classes != classes:
            model.reset_head(len(classes))
        return model
    if config.model not in MODELS:
        raise unknown("model", config.model, MODELS)
    if config.input.frames is not None and "frames" not in to_dict(MODELS[config.model]):
        raise ConfigError(f"{config.model} takes pictures, so frames {config.input.frames} cannot be set")
    return build(replace_dotted(MODELS[config.model], changes), config.model)


def _from_pictures(config: RunConfig, changes: dict[str, Any]) -> Model:
    """A video model that starts from an image ViT; its head is new."""
    if not config.init_from:
        raise ConfigError("inflate says how an image ViT becomes a video model, but no weights are named: give --from")
    if config.model not in MODELS or family_of(MODELS[config.model]) not in ("vivit", "timesformer"):
        raise ConfigError(f"inflate makes a ViViT or a TimeSformer of an image ViT; {config.model} is neither")
    typed = replace_dotted(MODELS[config.model], changes)  # lists of a settings file become tuples
    wishes = {name: getattr(typed, name) for name in changes}
    return load_model(config.init_from, as_video=config.model, kernel=config.transfer.inflate, **wishes)


def start_weights(config: RunConfig) -> str:
    """What training starts from, as load_model takes it; "" for random weights."""
    if not config.pretrained:
        return config.init_from
    if config.init_from:
        raise ConfigError("init_from and pretrained both name weights to start from; give one of them")
    model, _, tag = config.model.partition(".")
    return published.choose(model, tag).source


def settle_preprocess(config: RunConfig, model: Model) -> Preprocess:
    """The user's wishes over those of the weights."""
    base = (model.card.preprocess if model.card else None) or Preprocess()
    if len(base.mean) not in (1, model.config.in_channels):  # weights of another number of channels
        base = dataclasses.replace(base, mean=(fmean(base.mean),), std=(fmean(base.std),))
    wishes = {f.name: getattr(config.input, f.name) for f in dataclasses.fields(config.input)}
    wishes |= {"image_size": tuple(model.config.image_size), "channels": model.config.in_channels}
    wishes["frames"] = model.input_shape[1] if model.takes_clips else 0
    if given := [name for name in ("sampling", "stride", "fps", "clips", "crops") if wishes[name] is not None]:
        if not model.takes_clips:
            raise ConfigError(f"{model.name or model.family} takes pictures; {given[0]} is a setting of videos")
        if wishes["sampling"] is None and {"stride", "fps"} & set(given):
            wishes["sampling"] = "dense"  # an image model that was inflated would see frames spread over the video
    return dataclasses.replace(base, **{name: value for name, value in wishes.items() if value is not None})


def make_card(config: RunConfig, model: Model, data: Data, preprocess: Preprocess, teacher: Teacher | None) -> ModelCard:
    """What travels with the trained weights: classes, preprocessing, licence, and where all of it comes from."""
    before = model.card or ModelCard()
    origin = (*before.provenance, f"from {start}") if (start := start_weights(config)) else ("random weights",)
    if teacher is not None:
        origin += (f"taught by {teacher.found.name} ({teacher.identity})",)
    labelled, kind = needs_labels(config.objective), config.objective.objective
    what = "trained" if labelled else f"pre-trained without labels ({kind})"
    return ModelCard(
        name=model.name or before.name,
        classes=data.classes if labelled else (),
        multi_label=data.multi_label and labelled,
        preprocess=preprocess,
        licence=before.licence,
        provenance=(*origin, f"{what} by vitrail on {data.name}, seed {config.seed}"),
    )
