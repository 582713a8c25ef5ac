"""load_model and save_model: from any known container and naming to a model, and back."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail import config as settings
from vitrail.config import ModelCard, Preprocess, not_found
from vitrail.layers.lora import merged_state
from vitrail.models import FAMILIES, MODELS, Model, create_model, family_of, override
from vitrail.models.vit import ViT

from . import (
    bit,
    cvt,
    deit,
    dinov2,
    hub,
    hybrid,
    identity,
    mvit,
    resnet,
    slowfast,
    swin,
    swin_torchvision,
    timesformer,
    vit,
    vit_google,
    vivit,
    x3d,
)
from .fill import build_for, fill, refit_clips
from .identity import Origin
from .inflate import KERNELS, inflate, matching_settings
from .io import (
    find_weights,
    read_json,
    read_metadata,
    read_state,
    write_flax,
    write_folder,
    write_npz,
    write_safetensors,
    write_text,
    write_torch,
)
from .mapping import CheckpointError, Report, State, read, write
from .sources import Source

SOURCES: tuple[Source, ...] = (
    *mvit.SOURCES, *x3d.SOURCES, *slowfast.SOURCES,  # before ViT, whose names are fewer
    *vit.SOURCES, *dinov2.SOURCES, *deit.SOURCES, *vit_google.SOURCES, *resnet.SOURCES, *bit.SOURCES, *hybrid.SOURCES,
    *cvt.SOURCES, *swin.SOURCES, *swin_torchvision.SOURCES, *vivit.SOURCES, *timesformer.SOURCES,
)  # fmt: skip
FORMATS = ("vitrail", *sorted({source.name for source in SOURCES}))
_NAMES = ("model.safetensors", "model.npz", "pytorch_model.bin", "model.pth", "checkpoint")
_VERSION = 1


def load_model(
    source: str | Path | Mapping[str, Any],
    *,
    preprocess: Any = None,
    quiet: bool = False,
    as_video: str = "",
    kernel: str = KERNELS[0],
    **overrides: Any,
) -> Model:
    """A model from weights wherever they are: a file (.safetensors, .npz, .pth, .pyth, .bin, flax), a folder, a run directory,
    a state dict in memory, a repository of the hub ("timm/vit_base_patch16_224.augreg_in21k", "hf-hub:owner/name@revision")
    or a URL.

    The naming (ours, timm, transformers, torchvision, pytorchvideo, the authors') and the configuration are found from
    the file. `overrides` are fields of the family's config and decide what shapes cannot tell (heads=..., key_strides=...,
    built_size=(h, w)); a new image_size resizes the position tables, a new patch the patch embedding too, a new num_classes
    rebuilds the head with zeros.
    preprocess: a `Preprocess`, a mapping of its fields, "imagenet" or "half" (mean and std), or the name of published
    weights; by default what the file, the configuration beside it or its name says. What happened is printed in a short table
    to stderr whenever it is more than a plain load, guesses are called guesses. Raises CheckpointError for files that cannot
    be used or fetched.

    `as_video` names a ViViT or TimeSformer that an image ViT's weights start, its patch kernel becoming tubelets as `kernel`
    says (see `inflate`); `overrides` are then its fields.
    """
    if as_video:
        return _load_as_video(source, preprocess, quiet, as_video, kernel, overrides)
    state, origin = _open(source)
    report = Report(source=origin.name)
    if "vitrail" in origin.metadata:
        ours = dict(state)
        model, built = _from_ours(origin.metadata["vitrail"], ours, overrides, report)
    else:
        model, built, ours = _from_foreign(state, origin, overrides, report)
    if preprocess is not None:
        base = model.card.preprocess
        model.card = dataclasses.replace(model.card, preprocess=identity.asked_preprocessing(preprocess, base))
        report.notes = [n for n in report.notes if "preprocessing" not in n]
        report.notes.append(f"preprocessing: {identity.describe(model.card.preprocess)} (as asked)")
    refit_clips(model, built, ours, report)
    fill(model, ours, report, origin.name, built)
    report.loaded = len(ours)
    if broken := [key for key, tensor in ours.items() if tensor.is_floating_point() and not _finite(tensor)]:
        report.notes.append(f"nan or inf in {len(broken)} of {len(ours)} tensors: {', '.join(broken[:4])}")
    eventful = report.resized or report.remade or report.missing or report.unexpected or report.notes or report.renamed
    if eventful and not quiet:
        print("\n".join(report.lines()), file=sys.stderr)
    return model.eval()


def _finite(tensor: Tensor) -> bool:
    """One pass, nothing allocated: nan and inf survive in the extremes."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def _load_as_video(
    source: str | Path | Mapping[str, Any], preprocess: Any, quiet: bool, name: str, kernel: str, overrides: Mapping[str, Any]
) -> Model:
    hints = {key: overrides[key] for key in ("heads", "built_size") if key in overrides}
    image = load_model(source, preprocess=preprocess, quiet=quiet, **hints)
    if not isinstance(image, ViT):
        raise CheckpointError(
            f"a video model is inflated from the weights of an image ViT; these are those of a {image.family}"
            + (": to go on with them as they are, leave as_video (--inflate) out" if image.takes_clips else "")
        )
    changes = {key: value for key, value in overrides.items() if key != "built_size"}
    video = create_model(name, **(matching_settings(image) | changes))
    new = inflate(image, video, kernel=kernel)
    if not quiet:
        print(f"{name} from an image model; new: {', '.join(new[:4])} and {max(len(new) - 4, 0)} more", file=sys.stderr)
    card = image.card or ModelCard()
    size, frames = video.config.image_size, video.config.frames
    seen = dataclasses.replace(card.preprocess or Preprocess(), image_size=size, frames=frames, sampling="uniform")
    story = (*card.provenance, f"{name} started from {image.name or 'an image model'}")
    video.card = ModelCard(name=name, preprocess=seen, licence=card.licence, provenance=story)
    return video.eval()


def load_checkpoint_card(source: str | Path) -> tuple[str, ModelCard | None]:
    """(registry id or "", card) of one of our checkpoints, without reading its tensors."""
    path = _weights_file(Path(source))
    text = read_metadata(path).get("vitrail") if path.suffix == ".safetensors" else None
    if text is None:
        return "", None
    content = _parse(text, str(path))
    return str(content.get("name", "")), settings.from_dict(ModelCard, content.get("card") or {})


def save_model(model: Model, path: str | Path, format: str = "vitrail", card: ModelCard | None = None) -> Path:
    """Write a model as a whole, to a folder (or, for "vitrail", a file ending in .safetensors); returns the weights' path.

    format: vitrail, timm, transformers, torchvision, google, microsoft, dinov2, pytorchvideo, pyslowfast, scenic or
    timesformer, where that project has the family; its own loader then reads the folder strictly and gives the same logits.
    Labels and preprocessing (`card`, by default the model's) travel along, and
    low-rank adaptations are merged. Raises ValueError for an unknown format and
    CheckpointError for a model that the project's architecture cannot hold.
    """
    path, card = Path(path), card or model.card or ModelCard()
    if format not in FORMATS:
        raise settings.unknown("format", format, FORMATS)
    state = {key: value.detach() for key, value in merged_state(model).items()}
    if format == "vitrail":
        return _save_ours(model, state, path, card)
    sources = [s for s in SOURCES if s.name == format and s.family == model.family]
    if not sources:
        has = [s.name for s in SOURCES if s.family == model.family]
        raise CheckpointError(f"{format} has no {model.family} here; this family can be written as: vitrail, {', '.join(has)}")
    source, files = _exported(sources, model.config, card)
    written = write(source.rules(model.config), state)

    def fill(folder: Path) -> None:
        if source.container.endswith(".npz"):
            write_npz(folder / source.container, written)
        elif source.container == "checkpoint":
            write_flax(folder / source.container, written)
        elif source.container.endswith((".pth", ".pyth")):
            write_torch(folder / source.container, written, source.inside)
        else:
            write_safetensors(folder / source.container, written, {"format": "pt"})
        for name, content in files.items():
            write_text(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    if path.exists():
        raise CheckpointError(f"{path} exists already; name a new folder")
    write_folder(path, fill)
    return path / source.container


def _exported(sources: list[Source], config: Any, card: ModelCard) -> tuple[Source, dict[str, dict[str, Any]]]:
    """The first of a project's architectures that can hold the model, and its files; the first one's reason when none can."""
    refusals = []
    for source in sources:
        try:
            return source, source.export(config, card)
        except CheckpointError as problem:
            refusals.append(problem)
    raise refusals[0]


def _save_ours(model: Model, state: State, path: Path, card: ModelCard) -> Path:
    content = {
        "version": _VERSION,
        "family": model.family,
        "name": model.name,
        "config": settings.to_dict(model.config),
        "card": settings.to_dict(dataclasses.replace(card, name=card.name or model.name)),
    }
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    write_safetensors(file, state, {"vitrail": json.dumps(content, ensure_ascii=False), "format": "pt"})
    return file


def _open(source: str | Path | Mapping[str, Any]) -> tuple[State, Origin]:
    if isinstance(source, Mapping):
        return find_weights(source, "state dict"), Origin("state dict")
    if not isinstance(source, (str, Path)) or not str(source):
        raise CheckpointError(f"weights are a path, a name of the hub, an address or a dictionary of tensors, not {source!r}")
    fetched = hub.fetch(source) if isinstance(source, str) and hub.is_remote(source) else None
    path = fetched.path if fetched else _weights_file(Path(source))
    state, metadata = read_state(path)
    beside = {name: read_json(path.parent / name) for name in hub.BESIDE}
    files = {name: content for name, content in beside.items() if content}
    names = (fetched.name,) if fetched else (path.name, path.absolute().parent.name)
    return state, Origin(str(source), metadata, files, names, fetched.provenance if fetched else "")


def _weights_file(path: Path) -> Path:
    """The weights in a folder: its own model file, or the final, best or newest one of a run directory."""
    if path.is_file():
        return path
    if not path.exists():
        if str(path) in MODELS:
            told = f"{path} is a model's name: create_model makes it, pretrained=True with published weights"
            raise CheckpointError(f"{path}: no such file or folder ({told})")
        raise CheckpointError(not_found(path))
    for folder in (path, path / "model", path / "best"):
        for name in _NAMES:
            if (folder / name).is_file():
                return folder / name
    steps = sorted((path / "checkpoints").glob("step-*/model.safetensors"))
    single = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".npz", ".pth", ".pyth", ".pt", ".bin"))
    if steps or len(single) == 1:
        return steps[-1] if steps else single[0]
    found = f"several ({', '.join(f.name for f in single[:4])}): name one" if single else f"none of {', '.join(_NAMES)}"
    raise CheckpointError(f"{path}: no weights found in this folder, {found}")


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        raise CheckpointError(f"{name}: its description is not readable") from None
    if not isinstance(content, dict) or content.get("family") not in FAMILIES:
        raise CheckpointError(f"{name}: describes no known family; known: {', '.join(FAMILIES)}")
    if content.get("version", 0) > _VERSION:
        raise CheckpointError(f"{name}: written by a newer version (format {content['version']}, this one reads {_VERSION})")
    return content


def _from_ours(text: str, state: State, overrides: Mapping[str, Any], report: Report) -> tuple[Model, Any]:
    content = _parse(text, report.source)
    config = settings.from_dict(FAMILIES[content["family"]].CONFIG, content["config"])
    card = settings.from_dict(ModelCard, content.get("card") or {})
    if card.classes:
        card, remark = identity.labelled(card, config.num_classes)
        report.notes += [remark] if remark else []
    return _finish(config, overrides, card, str(content.get("name", "")), report, state), config


def _from_foreign(state: State, origin: Origin, overrides: Mapping[str, Any], report: Report) -> tuple[Model, Any, State]:
    configs = {f: next(c for c in m.VARIANTS.values() if isinstance(c, m.CONFIG)) for f, m in FAMILIES.items()}
    source = next((s for s in SOURCES if s.recognise(state)), None)
    if source is None:
        raise identity.unknown_layout(origin.name, state, SOURCES, configs)
    state = source.clean(dict(state))
    claim = identity.claimed(origin)
    config, ours, believed = _translate_claimed(source, state, origin, claim, overrides, report)
    claim = claim if believed else None
    identity.refuse_mixture(origin.name, report.unexpected, source, state, SOURCES, configs)
    report.source = f"{origin.name} ({source.name} {source.family})"
    card = source.card(config, origin.files)
    preprocess, why = identity.preprocessing(source, card, origin, claim)
    card, remark = identity.labelled(card, config.num_classes)
    report.notes += [note for note in (why, remark) if note]
    if claim is not None and claim.exact:
        card = dataclasses.replace(card, licence=card.licence or claim.row.licence, provenance=claim.row.card().provenance)
    provenance = (*card.provenance, *filter(None, [origin.provenance]), f"weights in {source.name}'s naming")
    card = dataclasses.replace(card, preprocess=preprocess, provenance=provenance)
    changes = {k: v for k, v in overrides.items() if k != "built_size"}
    name = claim.row.model if claim is not None and claim.row.model in MODELS else _registered(config)
    return _finish(config, changes, card, name, report, ours), config, ours


def _translate_claimed(
    source: Source, state: State, origin: Origin, claim: identity.Claim | None, overrides: Mapping[str, Any], report: Report
) -> tuple[Any, State, bool]:
    """The configuration, the tensors under our names, and whether a claim about them holds; what it tells is used then."""
    if claim is not None:
        attempt = Report(source=report.source)
        try:
            config, ours = _translate(source, state, origin, {**_hints(claim.row.model), **overrides}, attempt)
        except ValueError:
            ours = {}
        if ours and identity.is_size_of(claim.row, config, ours):
            vars(report).update(vars(attempt))
            return config, ours, True
        report.notes.append(f"{claim.said_by} stands for {claim.row.id}, but these weights are of another size: ignored")
    return *_translate(source, state, origin, overrides, report), False


def _translate(source: Source, state: State, origin: Origin, hints: Mapping[str, Any], report: Report) -> tuple[Any, State]:
    """The configuration and the tensors under our names."""
    files = {**origin.files, "": {"name": "/".join(reversed(origin.names))}}
    try:
        config, notes = source.infer(state, files, hints)
    except (KeyError, IndexError) as problem:
        raise CheckpointError(f"{origin.name}: looks like {source.name} {source.family}, but {problem} is missing") from None
    report.notes += notes
    return config, read(source.rules(config), state, report)


def _hints(model: str) -> dict[str, Any]:
    """What a model's name tells that the shapes of its weights do not."""
    heads = getattr(MODELS.get(model), "heads", None)
    return {"heads": heads} if isinstance(heads, int) else {}  # a pyramid's tables tell their heads


def _registered(config: Any) -> str:
    """The registry id of a configuration, whatever its number of classes and channels; "" for none."""
    free = {"num_classes": config.num_classes, "in_channels": config.in_channels}
    return next((n for n, c in MODELS.items() if type(c) is type(config) and dataclasses.replace(c, **free) == config), "")


def _finish(config: Any, overrides: Mapping[str, Any], card: ModelCard, name: str, report: Report, state: State) -> Model:
    """The model with the user's overrides; a card follows the image size and forgets the classes of a replaced head."""
    changes = dict(overrides)
    if isinstance(changes.get("image_size"), int):
        changes["image_size"] = (changes["image_size"],) * 2
    classes = changes.pop("num_classes", config.num_classes)
    new, notes = FAMILIES[family_of(config)].MODEL.replan(config, override(config, changes))
    report.notes += notes
    model = build_for(state, new, name)
    if classes != config.num_classes:
        model.reset_head(classes)
    preprocess = card.preprocess or Preprocess(image_size=new.image_size, channels=new.in_channels)
    if "image_size" in changes:
        preprocess = dataclasses.replace(preprocess, image_size=tuple(new.image_size))
    if preprocess.frames and "frames" in changes:
        preprocess = dataclasses.replace(preprocess, frames=new.frames)
    labels = card.classes if classes == config.num_classes else ()
    model.card = dataclasses.replace(card, preprocess=preprocess, classes=labels, name=card.name or name)
    return model
