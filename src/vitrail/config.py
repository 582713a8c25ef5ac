"""The settings of a run as frozen dataclasses, to and from plain dictionaries, JSON and YAML.

Nothing here imports torch: a command can read, check and print a configuration at once. Field names are unique over all
sections of `RunConfig`, so that the command line can offer them flat (`--lr`, `--weight-decay`, `--val-fraction`).
Two sections travel with a saved model instead of describing a run: `Preprocess` and `ModelCard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .fields import (
    ConfigError,
    convert,
    dump,
    flat,
    from_dict,
    load,
    nearest,
    not_found,
    replace_dotted,
    replace_flat,
    to_dict,
    unknown,
)

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "DistillationConfig",
    "Fit",
    "InputConfig",
    "Interpolation",
    "ModelCard",
    "ObjectiveConfig",
    "OptimConfig",
    "Preprocess",
    "RunConfig",
    "Sampling",
    "ScheduleConfig",
    "SelfSupervisionConfig",
    "TransferConfig",
    "convert",
    "dump",
    "flat",
    "from_dict",
    "load",
    "nearest",
    "not_found",
    "replace_dotted",
    "replace_flat",
    "to_dict",
    "unknown",
]

Fit = Literal["crop", "pad", "stretch"]
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Sampling = Literal["dense", "uniform", "segment"]


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's input: stored in every checkpoint and export, used by eval and predict.

    image_size is (height, width) in pixels. `crop`: resize so that the picture covers image_size / crop_fraction, then cut
    the centre; `pad`: the whole picture, centred on a border of `pad_value` (0..255); `stretch`: both sides set
    independently. mean and std apply to pixel values scaled to 0..1, one entry per channel (or one for all).
    frames is 0 for pictures. Of a video that many are taken, as `data.clips.clip_frames` says: by `dense` sampling every
    `stride`-th frame of the file, or `fps` frames a second (0: go by stride); by `uniform` and `segment` sampling spread over
    the whole video. Evaluation and prediction average `clips` x `crops` views, crops along the longer side.
    """

    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    fit: Fit = "crop"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    pad_value: int = 0
    frames: int = 0
    sampling: Sampling = "dense"
    stride: int = 1
    fps: float = 0.0
    clips: int = 1
    crops: int = 1


@dataclass(frozen=True)
class ModelCard:
    """What travels with a model's weights besides its architecture."""

    name: str = ""
    classes: tuple[str, ...] = ()
    multi_label: bool = False
    preprocess: Preprocess | None = None
    licence: str = ""
    provenance: tuple[str, ...] = ()  # newest last: where the weights came from and what was done to them
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """How samples are found and read.

    A validation split cut from the training samples is stratified by class and decided by content hash: adding or
    renaming files moves no other sample.
    """

    train_split: str = ""  # split to train on; by default the one called train, else everything
    val_split: str = ""  # by default val, valid or validation, else val_fraction of the training samples
    val_fraction: float = 0.15  # share of the training samples held out where a source names no validation split
    image_column: str = ""  # of a table; by default recognised (image, path, file, file_name, filename, ...)
    label_column: str = ""  # of a table; by default recognised (label, class, target, ...)
    split_column: str = ""  # of a table; by default recognised (split, subset, ...)
    multi_label: bool = False  # several labels per picture
    unlabelled: bool = False  # pictures without a label are samples too; set by the objectives that need none
    media: Literal["auto", "pictures", "videos", "frames"] = "auto"  # what samples are; frames: a folder of pictures is a clip
    frame_rate: float = 25.0  # frames per second of frame folders, which do not say
    labels: str = ""  # emoji: "category" | "glyph"; a folder of any videos: "speed" (1x, 2x or 4x playback)
    hold_out: str = ""  # emoji only: the designer kept for testing
    bad_files: Literal["skip", "refuse"] = "skip"  # unreadable pictures: counted and named, then skipped or refused
    decode: Literal["auto", "exact", "scaled"] = "auto"  # auto: DCT-scaled while training, exact otherwise
    max_pixels: int = 178_956_970  # larger pictures are refused as decompression bombs
    workers: int = -1  # loader processes; -1 = chosen from cores and picture size
    max_samples: int = 0  # per class, 0 = all
    subset_seed: int = 0  # which samples max_samples keeps; with the same seed a smaller subset is part of every larger one


@dataclass(frozen=True)
class InputConfig:
    """What enters the model; what is unset is taken from the model or its weights."""

    image_size: tuple[int, int] | None = None  # height,width in pixels; one number for a square
    channels: int | None = None  # 1 = grey, 2 = grey and opacity, 3 = colour, 4 = colour and opacity, or what the files hold
    fit: Fit | None = None  # crop the centre, pad to show the whole picture, or stretch it
    crop_fraction: float | None = None  # side of the centre crop as a fraction of the resized picture
    interpolation: Interpolation | None = None  # of resizing, with antialiasing
    mean: tuple[float, ...] | None = None  # subtracted from values in 0..1; one per channel, or one for all
    std: tuple[float, ...] | None = None  # divided by; one per channel, or one for all
    frames: int | None = None  # of a clip, for models that take videos
    sampling: Sampling | None = None  # dense: stride or fps; uniform, segment: spread over the whole video
    stride: int | None = None  # every so many frames of the file one is taken (dense sampling)
    fps: float | None = None  # frames taken per second of video instead, 0 = by stride (dense sampling)
    clips: int | None = None  # of a video, spread over it, that evaluation and prediction average
    crops: int | None = None  # of each clip, along its longer side, that evaluation and prediction average


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation; every choice is drawn per sample from (seed, epoch, sample), never per batch."""

    crop: Literal["random", "none"] = "random"  # random = RandomResizedCrop (inception crop); none = the evaluation fit
    crop_scale: tuple[float, float] = (0.35, 1.0)  # area of a random crop, as fractions of the picture
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of a random crop
    hflip: float = 0.5  # probability of a horizontal flip
    vflip: float = 0.0  # probability of a vertical flip
    affine_degrees: float = 0.0  # rotation, uniform in +- degrees
    affine_translate: float = 0.0  # shift, up to this fraction of the side
    affine_scale: tuple[float, float] = (1.0, 1.0)  # zoom, uniform between two factors
    affine_shear: float = 0.0  # uniform in +- degrees
    elastic: float = 0.0  # bending: points of a 4 x 4 grid move by up to this fraction of the side, as suits handwriting
    randaugment_ops: int = 0  # operations per picture, 0 = off
    randaugment_magnitude: float = 9.0  # strength, 0..31
    randaugment_probability: float = 1.0  # of each operation
    three_augment: bool = False  # DeiT III: one of grayscale, solarise, blur
    color_jitter: float = 0.0  # strength of brightness, contrast and saturation
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of the Beta distribution, 0 = off
    cutmix: float = 0.0  # alpha of the Beta distribution, 0 = off
    mix_probability: float = 1.0  # of mixing a sample at all
    mix_switch: float = 0.5  # probability of cutmix where mixup is on too
    repeats: int = 1  # copies of a sample in a batch, each augmented differently


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, and what is done about unequal classes."""

    loss: Literal["ce", "bce"] = "ce"  # softmax cross-entropy, or one sigmoid per class
    label_smoothing: float = 0.0  # share of the target spread over all classes
    balance: Literal["none", "weights", "sampler", "logit-adjustment"] = "none"  # correction of unequal class counts
    balance_power: float = 0.5  # 0 = no correction, 0.5 = square root, 1 = full inverse frequency
    objective: Literal["classify", "masked", "mae"] = "classify"  # masked, mae: learn from pictures alone, without labels


@dataclass(frozen=True)
class DistillationConfig:
    """A trained model whose answers are learned beside the labels; on a DeiT by the distillation token."""

    teacher: str = ""  # run folder, checkpoint, torchvision:NAME or timm:NAME (weights on this machine)
    distill: Literal["hard", "soft"] = "hard"  # learn the teacher's answer, or its probabilities
    distill_weight: float = 0.5  # of the teacher in the loss, 0..1 (DeiT: 0.5 hard, 0.1 soft)
    distill_temperature: float = 1.0  # of soft distillation (DeiT: 3)
    teacher_classes: Literal["name", "order"] = "name"  # its classes found by name, or taken as they come
    teacher_cache: str = ""  # folder for its answers, where every epoch sees the same views


@dataclass(frozen=True)
class TransferConfig:
    """What of the weights that training starts from is trained, and from which head."""

    freeze: str = ""  # backbone: all but the head; a number: the stem and so many blocks
    head: Literal["zero", "probe"] = "zero"  # a new head: zeros, or solved on the frozen features before the first step
    inflate: Literal["", "central_frame", "average", "rank_pooling"] = ""
    """init_from is an image ViT from which a ViViT or TimeSformer (`model`) starts: how its patch kernel becomes tubelets."""
    lora_rank: int = 0  # of a low-rank adaptation, which is trained instead of the weights; 0 = off
    lora_alpha: float = 0.0  # its strength: alpha / rank times the product; 0 = twice the rank
    lora_place: Literal["attention", "all"] = "attention"  # linear layers beside attention, or all but the head's


@dataclass(frozen=True)
class SelfSupervisionConfig:
    """Learning without labels: patches are hidden and guessed (objectives masked and mae)."""

    mask_ratio: float = 0.0  # share of the patches hidden, 0 = the papers' (masked: 0.5, mae: 0.75)
    mask_target: Literal["colour", "colours", "pixels"] = "colour"  # of masked: 3-bit mean colour, 4 x 4 such, or all pixels
    patch_norm: bool = True  # of mae: guess pixels normalised patch by patch
    decoder_width: int = 0  # of mae, 0 = half of the encoder's
    decoder_depth: int = 2  # of mae: blocks
    decoder_heads: int = 0  # of mae, 0 = as many as the encoder's


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its regularisation."""

    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """adamw decays weights apart from the gradient, adam with it; muon makes the steps of hidden layers orthogonal, and is
    adamw for the rest."""
    lr: float = 1e-3  # peak learning rate
    lr_batch: int = 0  # batch size that lr is meant for; it is scaled linearly to the run's, 0 = as it is
    weight_decay: float = 0.05  # not applied to biases, norms, tokens and positions
    beta1: float = 0.9  # of adam, adamw and muon
    beta2: float = 0.999  # of adam, adamw and muon
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    clip_norm: float = 1.0  # global gradient norm, 0 = off
    layer_decay: float = 1.0  # lr factor per layer away from the head
    ema: float = 0.0  # decay of the averaged weights, 0 = off


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate moves; `steps` overrides and `time_budget` bounds `epochs`."""

    epochs: float = 20.0  # passes over the training samples
    steps: int = 0  # optimiser steps instead of epochs, 0 = by epochs
    time_budget: float = 0.0  # minutes of training, 0 = none; turned into a step count soon after the start
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"  # how the learning rate falls after the warm-up
    warmup_epochs: float = 1.0  # linear rise of the learning rate from 0
    warmup_steps: int = 0  # instead of warmup_epochs, 0 = by epochs
    min_lr: float = 0.0  # last learning rate as a fraction of the peak
    milestones: tuple[float, ...] = (0.3, 0.6, 0.9)  # of schedule step, as fractions of the run
    step_factor: float = 0.1  # of schedule step: the learning rate is multiplied by this at each milestone
    progressive: tuple[int, ...] = ()  # shorter sides in pixels that training begins at, one after the other: 32,48
    progressive_share: float = 0.6  # of the steps that these smaller sizes take, in equal parts
    patience: int = 0  # evaluations without improvement before stopping early, 0 = off


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete: `RunConfig` and the data decide the result."""

    data: str = ""  # a folder, table, tar shards, Arrow data set, or an embedded set: digits, emoji, motion
    model: str = "vit_tiny_patch16_224"  # a name that `vitrail models` lists
    init_from: str = ""  # run folder, checkpoint, hub id or URL to start from; by default random weights
    pretrained: bool = False  # start from published weights: the model's default ones, or those of a tag (model.tag)
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the model's own config, dotted names ("position.kind")
    out: str = ""  # run directory; by default runs/<data>-<model>
    preset: Literal["none", "auto"] = "none"  # auto: model, resolution and recipe chosen from the data's size, and explained
    seed: int = 0  # of the order, the augmentation and the initial weights
    batch_size: int = 128  # pictures per optimiser step, over all ranks and accumulation steps
    accumulate: int = 1  # micro-steps per optimiser step
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of products under autocast
    compile: bool = False  # with torch.compile; on the CPU it needs a C++ compiler
    checkpointing: bool = False  # recompute activations in the backward pass
    eval_every: float = 1.0  # epochs between evaluations on the validation split
    probe_shots: tuple[int, ...] = ()  # training samples per class of few-shot probes while training: 5,10; none by default
    probe_every: float = 1.0  # epochs between probes
    save_every_steps: int = 0  # steps between checkpoints, 0 = by time only
    save_every_minutes: float = 5.0  # minutes between checkpoints
    keep_last: int = 2  # checkpoints kept besides the best
    max_nonfinite: int = 5  # refused steps in a row before training stops
    report: bool = True  # write report.html at the end
    tensorboard: bool = True  # write TensorBoard events
    data_config: DataConfig = field(default_factory=DataConfig)
    input: InputConfig = field(default_factory=InputConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    self_supervision: SelfSupervisionConfig = field(default_factory=SelfSupervisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
