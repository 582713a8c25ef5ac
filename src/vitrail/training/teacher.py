"""A trained model that a run learns from: found, checked against the classes of the data, shown its own view of a batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vitrail.checkpoints import load_model
from vitrail.checkpoints.io import read_state, write_safetensors
from vitrail.config import AugmentConfig, ConfigError, DistillationConfig, Interpolation, Preprocess, to_dict, unknown
from vitrail.cost import autocast, count_parameters, memory_format
from vitrail.data import Data, TrainLoader, eval_batches
from vitrail.data.images import DecodeMode
from vitrail.data.transforms import Normalise

from .distributed import Ranks

KINDS = "a run, a checkpoint, torchvision:NAME or timm:NAME"
TABLE_BATCH = 64  # pictures at once while answers are stored; fixed, so that they are the same bits every time
NAMED = 8


@dataclass(frozen=True)
class Found:
    """A model that may become a teacher; classes are () where nothing names them, accuracy is nan where nothing tells it."""

    name: str
    model: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]
    count: int
    accuracy: float = float("nan")
    multi_label: bool = False


class Teacher(nn.Module):
    """Answers the student's batches with logits over the student's classes; in eval mode, without gradients.

    It sees the very view that the student sees (augmented, mixed), normalised anew and resized to what it was trained on.
    `columns` picks the student's classes among its own. `identity` is a short text of its weights, classes and view.
    """

    scale: Tensor
    shift: Tensor
    columns: Tensor | None
    table: Tensor | None

    def __init__(self, found: Found, columns: list[int] | None, student: Preprocess, precision: str):
        super().__init__()
        self.found, self.student, self.precision = found, student, precision
        self.layout = memory_format(found.model, precision)
        self.model = found.model.eval().requires_grad_(False).to(memory_format=self.layout)  # type: ignore[call-overload]
        own = found.preprocess
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (own.mean, own.std))
        before_mean, before_std = (torch.tensor(v).view(1, -1, 1, 1) for v in (student.mean, student.std))
        self.register_buffer("scale", before_std / std)
        self.register_buffer("shift", (before_mean - mean) / std)
        self.register_buffer("columns", None if columns is None else torch.tensor(columns))
        self.register_buffer("table", None)
        self.identity = _identity(found, columns, student)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"], indices: Int64[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """float32 logits for the student's normalised pictures; those stored for `indices`, if answers are stored."""
        if self.table is not None:
            return self.table[indices.to(self.table.device)]
        with autocast(images.device, self.precision):
            logits = self.model(self.view(images)).float()
        return logits if self.columns is None else logits[:, self.columns]

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        """The student's pictures as this model wants them."""
        own = self.found.preprocess
        x = torch.addcmul(self.shift, images, self.scale)
        if x.shape[2:] != own.image_size:
            smooth = {} if own.interpolation == "nearest" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, own.image_size, mode=own.interpolation, **smooth)  # type: ignore[arg-type]
        return x.contiguous(memory_format=self.layout)

    def describe(self) -> str:
        """For the plan: what it is, how large, how good."""
        found, (h, w) = self.found, self.found.preprocess.image_size
        good = f", top-1 accuracy {found.accuracy:.1%} by its card" if found.accuracy == found.accuracy else ""
        stored = ", answers stored" if self.table is not None else ""
        return f"{found.name}: {count_parameters(self.model) / 1e6:.3g} M parameters, {h} x {w} pixels{good}{stored}"


def _identity(found: Found, columns: list[int] | None, student: Preprocess) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((columns, to_dict(found.preprocess), to_dict(student))).encode())
    for name, tensor in sorted(found.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def build_teacher(config: DistillationConfig, data: Data, student: Preprocess, device: torch.device, precision: str) -> Teacher:
    """The teacher of a run's settings, ready on `device`.

    Raises ConfigError for data with several labels a picture, weights that are not there, classes that the teacher does not
    know (named), and pictures of other channels.
    """
    if data.multi_label:
        raise ConfigError(
            "a teacher gives a picture one class, but this data has several labels a picture; leave --teacher out"
        )
    if student.frames:
        raise ConfigError("a teacher answers pictures, this model takes clips; leave --teacher out")
    found = find(config.teacher)
    if found.multi_label:
        raise ConfigError(f"the teacher {found.name} gives a picture any number of labels, this data has one class each")
    if found.preprocess.channels != student.channels:
        raise ConfigError(
            f"the teacher {found.name} takes {found.preprocess.channels} channels, the student {student.channels}; "
            f"nearest: --channels {found.preprocess.channels}"
        )
    columns = class_columns(found, data.classes, config.teacher_classes)
    return Teacher(found, columns, student, precision).to(device)


def class_columns(found: Found, classes: tuple[str, ...], by: str) -> list[int] | None:
    """Where the teacher's logits hold the student's classes; None where they are the same ones in the same order."""
    way = "--teacher-classes order takes them as they come"
    if by == "order":
        if found.count != len(classes):
            raise ConfigError(f"the teacher {found.name} answers {found.count} classes, the data has {len(classes)}")
        return None
    if not found.classes:
        raise ConfigError(
            f"nothing names the classes of the teacher {found.name}; if they are those of the data in order, {way}"
        )
    missing = [name for name in classes if name not in found.classes]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        known = ", ".join(map(repr, found.classes[:NAMED])) + (", ..." if found.count > NAMED else "")
        raise ConfigError(
            f"the teacher {found.name} does not know {len(missing)} of {len(classes)} classes: "
            f"{', '.join(map(repr, missing[:NAMED]))}{more}; it knows {known}"
            + (f"; if only the names differ, {way}" if found.count == len(classes) else "")
        )
    columns = [found.classes.index(name) for name in classes]
    return None if columns == list(range(found.count)) else columns


def find(name: str) -> Found:
    """The model that the setting `teacher` names; nothing is fetched."""
    project, _, model = name.partition(":")
    if model and project == "torchvision":
        return _from_torchvision(model)
    if model and project == "timm":
        return _from_timm(model)
    if not Path(name).expanduser().exists():
        raise ConfigError(f"teacher {name}: no such file or folder; a teacher is {KINDS}")
    ours = load_model(Path(name).expanduser())
    card = ours.card
    if ours.takes_clips:
        raise ConfigError(f"the teacher {name} takes clips, the student pictures")
    told = card.metrics.get("top1", float("nan"))
    return Found(name, ours, card.preprocess, card.classes, ours.config.num_classes, told, card.multi_label)


def _from_torchvision(name: str) -> Found:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise unknown("torchvision model", name, models.list_models(module=models))
    kinds = models.get_model_weights(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = {kind: folder / Path(urlparse(kind.url).path).name for kind in (kinds.DEFAULT, *kinds)}
    here = next((kind for kind, file in files.items() if file.is_file()), None)
    if here is None:
        raise ConfigError(
            f"the weights of torchvision:{name} are not on this machine and nothing is fetched here; "
            f"fetch {kinds.DEFAULT.url} to {files[kinds.DEFAULT]}"
        )
    model = models.get_model(name, weights=None)
    model.load_state_dict(read_state(files[here])[0])
    view, classes = here.transforms(), tuple(here.meta["categories"])
    side = view.crop_size[0]
    preprocess = Preprocess(
        (side, side),
        3,
        "crop",
        min(1.0, side / view.resize_size[0]),
        view.interpolation.value,
        tuple(view.mean),
        tuple(view.std),
    )
    told = here.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1", float("nan")) / 100
    return Found(f"torchvision:{name}", model, preprocess, classes, len(classes), told)


def _from_timm(name: str) -> Found:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"teacher timm:{name} needs timm, which is not installed: pip install timm") from None
    from huggingface_hub import try_to_load_from_cache
    from timm.data.imagenet_info import ImageNetInfo

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.hf_hub_id:
        raise unknown("timm model with weights", name, timm.list_pretrained())
    file = try_to_load_from_cache(config.hf_hub_id, "model.safetensors")
    if not isinstance(file, str):
        raise ConfigError(
            f"the weights of timm:{name} are not on this machine and nothing is fetched here; "
            f"fetch them with: hf download {config.hf_hub_id} model.safetensors"
        )
    model = timm.create_model(name, pretrained=False)
    model.load_state_dict(read_state(Path(file))[0])
    channels, height, width = config.input_size
    filtering: Any = config.interpolation if config.interpolation in get_args(Interpolation) else "bicubic"
    preprocess = Preprocess(
        (height, width), channels, "crop", config.crop_pct, filtering, tuple(config.mean), tuple(config.std)
    )
    classes = tuple(config.label_names or ())
    if not classes and config.num_classes == 1000:
        classes = tuple(ImageNetInfo().label_names())
    return Found(f"timm:{name}", model, preprocess, classes, config.num_classes)


# Stored answers -------------------------------------------------------------------------------------------------------


def changing_views(augment: AugmentConfig) -> list[str]:
    """The settings that show a picture otherwise in every epoch."""
    a = augment
    moving = {
        "crop": a.crop != "none", "hflip": a.hflip, "vflip": a.vflip, "affine_degrees": a.affine_degrees,
        "affine_translate": a.affine_translate, "affine_scale": a.affine_scale != (1.0, 1.0), "affine_shear": a.affine_shear,
        "randaugment_ops": a.randaugment_ops, "three_augment": a.three_augment, "color_jitter": a.color_jitter,
        "erasing": a.erasing, "mixup": a.mixup, "cutmix": a.cutmix,
    }  # fmt: skip
    return [name for name, on in moving.items() if on]


def store_answers(
    teacher: Teacher, loader: TrainLoader, augment: AugmentConfig, folder: str, mode: DecodeMode, ranks: Ranks
) -> None:
    """Give the teacher its answers to all training pictures from a file in `folder`, which is made where it is missing.

    The file's name holds teacher, pictures, view and precision. Valid only where a picture is seen alike in every epoch:
    raises ConfigError otherwise, naming what changes it.
    """
    dataset = loader.dataset
    if dataset.store.random:
        raise ConfigError("teacher_cache: a Python data set may give another picture every time; leave the cache out")
    if changing := changing_views(augment):
        flags = ", ".join(changing)
        raise ConfigError(
            f"teacher_cache needs the same view of a picture in every epoch, but these settings change it: {flags}; "
            "switch them off (--crop none --hflip 0 ...) or leave the cache out"
        )
    digest = hashlib.blake2b(repr((teacher.identity, mode, teacher.precision)).encode(), digest_size=8)
    for index in range(len(dataset)):
        digest.update(dataset.key(index))
    file = Path(folder).expanduser() / f"teacher-{digest.hexdigest()}.safetensors"
    if not ranks.agree(file.is_file()):
        if ranks.main:
            write_safetensors(file, {"logits": _answers(teacher, loader, mode, ranks.device)})
        ranks.agree(None)  # the others wait for the file
    teacher.table = read_state(file)[0]["logits"].to(ranks.device)


def _answers(teacher: Teacher, loader: TrainLoader, mode: DecodeMode, device: torch.device) -> Tensor:
    """Logits (n, k); nan for a picture that cannot be read, which training replaces by another one."""
    dataset, student = loader.dataset, teacher.student
    normalise = Normalise(student).to(device)
    count = len(teacher.columns) if teacher.columns is not None else teacher.found.count
    table = torch.full((len(dataset), count), float("nan"))
    batches = eval_batches(dataset, preprocess=student, batch_size=TABLE_BATCH, workers=loader.workers, mode=mode)
    for batch in batches:
        table[batch.indices] = teacher(normalise(batch.images.to(device)), batch.indices).cpu()
    return table
