"""Published weights by model and tag: where they are, what they were trained on, what their licence allows, how pictures enter.

Repositories, preprocessing and licences as timm's and torchvision's own tables give them (checked by a test against both).
Nothing here is a promise that a licence fits a use: read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from vitrail.config import Interpolation, ModelCard, Preprocess

from .sources import IMAGENET_MEAN, IMAGENET_STD

COMMERCIAL = frozenset({"apache-2.0", "mit", "bsd-3-clause"})  # licences that allow commercial use
SUFFIXES = (".safetensors", ".npz", ".pth", ".pyth", ".pt", ".bin", ".tar")
_HASH = re.compile(r"-[0-9a-f]{8,64}\Z")


@dataclass(frozen=True)
class Weights:
    """One published file. `source` is what load_model takes; sha256, where known, is the hash of the file or its beginning."""

    model: str
    tag: str
    source: str
    licence: str  # "" where its publisher names none for the weights
    data: str  # what it was trained on
    preprocess: Preprocess
    file: str = ""  # in the repository; found out where it is ""
    sha256: str = ""
    aliases: tuple[str, ...] = ()  # other names of the same weights

    @property
    def id(self) -> str:
        """model.tag"""
        return f"{self.model}.{self.tag}"

    @property
    def commercial(self) -> bool:
        """Whether the licence is one of `COMMERCIAL`; training data may have conditions of their own."""
        return self.licence in COMMERCIAL

    def card(self) -> ModelCard:
        """What travels with a model made from these weights."""
        return ModelCard(
            name=self.model, preprocess=self.preprocess, licence=self.licence, provenance=(f"{self.id}: {self.data}",)
        )


def _look(
    side: int, mean: tuple[float, ...], std: tuple[float, ...], crop: float, interpolation: Interpolation = "bicubic"
) -> Preprocess:
    return Preprocess((side, side), 3, "crop", crop, interpolation, mean, std)


def _side(model: str) -> int:
    found = re.search(r"_(\d{3})\Z", model)
    return int(found[1]) if found else 224


_IN1K, _IN21K, _BOTH = "ImageNet-1k", "ImageNet-21k", "ImageNet-21k, then ImageNet-1k"
_DATA = {"in1k": _IN1K, "in21k": _IN21K, "in22k": _IN21K, "ft_in1k": _BOTH, "dino": "ImageNet-1k without labels (DINO)",
         "mae": "ImageNet-1k without labels (MAE)"}  # fmt: skip

# timm's names; of one model the first is what pretrained=True means.
_TIMM = """
vit_tiny_patch16_224    augreg_in21k_ft_in1k augreg_in21k
vit_tiny_patch16_384    augreg_in21k_ft_in1k
vit_small_patch16_224   augreg_in21k_ft_in1k augreg_in1k augreg_in21k dino
vit_small_patch16_384   augreg_in21k_ft_in1k augreg_in1k
vit_small_patch32_224   augreg_in21k_ft_in1k augreg_in21k
vit_small_patch32_384   augreg_in21k_ft_in1k
vit_small_patch8_224    dino
vit_base_patch16_224    augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in1k augreg_in21k orig_in21k_ft_in1k orig_in21k mae
vit_base_patch16_384    augreg_in21k_ft_in1k augreg_in1k orig_in21k_ft_in1k
vit_base_patch32_224    augreg_in21k_ft_in1k augreg_in1k augreg_in21k orig_in21k
vit_base_patch32_384    augreg_in21k_ft_in1k augreg_in1k
vit_base_patch8_224     augreg2_in21k_ft_in1k augreg_in21k_ft_in1k augreg_in21k dino
vit_large_patch16_224   augreg_in21k_ft_in1k augreg_in21k orig_in21k mae
vit_large_patch16_384   augreg_in21k_ft_in1k
vit_large_patch32_224   orig_in21k
vit_large_patch32_384   orig_in21k_ft_in1k
vit_huge_patch14_224    orig_in21k mae
vit_small_r26_s32_224   augreg_in21k_ft_in1k augreg_in21k
vit_small_r26_s32_384   augreg_in21k_ft_in1k
vit_base_r50_s16_224    orig_in21k
vit_base_r50_s16_384    orig_in21k_ft_in1k
vit_large_r50_s32_224   augreg_in21k_ft_in1k augreg_in21k
vit_large_r50_s32_384   augreg_in21k_ft_in1k
deit_tiny_patch16_224   fb_in1k
deit_small_patch16_224  fb_in1k
deit_base_patch16_224   fb_in1k
deit_base_patch16_384   fb_in1k
deit_tiny_distilled_patch16_224   fb_in1k
deit_small_distilled_patch16_224  fb_in1k
deit_base_distilled_patch16_224   fb_in1k
deit_base_distilled_patch16_384   fb_in1k
deit3_small_patch16_224   fb_in22k_ft_in1k fb_in1k
deit3_small_patch16_384   fb_in22k_ft_in1k fb_in1k
deit3_medium_patch16_224  fb_in22k_ft_in1k fb_in1k
deit3_base_patch16_224    fb_in22k_ft_in1k fb_in1k
deit3_base_patch16_384    fb_in22k_ft_in1k fb_in1k
deit3_large_patch16_224   fb_in22k_ft_in1k fb_in1k
deit3_large_patch16_384   fb_in22k_ft_in1k fb_in1k
deit3_huge_patch14_224    fb_in22k_ft_in1k fb_in1k
swin_tiny_patch4_window7_224    ms_in1k ms_in22k_ft_in1k ms_in22k
swin_small_patch4_window7_224   ms_in1k ms_in22k_ft_in1k ms_in22k
swin_base_patch4_window7_224    ms_in22k_ft_in1k ms_in1k ms_in22k
swin_base_patch4_window12_384   ms_in22k_ft_in1k ms_in1k ms_in22k
swin_large_patch4_window7_224   ms_in22k_ft_in1k ms_in22k
swin_large_patch4_window12_384  ms_in22k_ft_in1k ms_in22k
resnet18   tv_in1k a1_in1k
resnet34   tv_in1k a1_in1k
resnet50   a1_in1k tv_in1k
resnet101  a1_in1k tv_in1k
resnet152  a1_in1k tv_in1k
resnetv2_50x1_bit   goog_in21k_ft_in1k goog_in21k goog_distilled_in1k
resnetv2_50x3_bit   goog_in21k_ft_in1k goog_in21k
resnetv2_101x1_bit  goog_in21k_ft_in1k goog_in21k
resnetv2_101x3_bit  goog_in21k_ft_in1k goog_in21k
resnetv2_152x2_bit  goog_in21k_ft_in1k goog_in21k
resnetv2_152x4_bit  goog_in21k_ft_in1k goog_in21k
"""


def _timm_rows() -> Iterator[Weights]:
    for line in _TIMM.strip().splitlines():
        model, *tags = line.split()
        for tag in tags:
            yield Weights(
                model, tag, f"hf-hub:timm/{model}.{tag}", _licence(tag), _trained_on(tag), _timm_look(model, tag),
                "model.safetensors",
            )  # fmt: skip


def _licence(tag: str) -> str:
    return {"tv": "bsd-3-clause", "ms": "mit", "mae": "cc-by-nc-4.0"}.get(tag.split("_")[0], "apache-2.0")


def _trained_on(tag: str) -> str:
    return next(data for ending, data in reversed(_DATA.items()) if tag.endswith(ending))


def _timm_look(model: str, tag: str) -> Preprocess:
    side = _side(model)
    if model.startswith("resnetv2"):
        fine = {"resnetv2_152x4_bit": 480}.get(model, 448) if tag.endswith("_ft_in1k") else 224
        crop = 1.0 if fine > 224 else 0.875
        return _look(fine, (0.5,), (0.5,), crop, "bicubic" if "distilled" in tag else "bilinear")
    if tag == "tv_in1k":
        return _look(side, IMAGENET_MEAN, IMAGENET_STD, 0.875, "bilinear")
    if tag == "a1_in1k":
        return _look(side, IMAGENET_MEAN, IMAGENET_STD, 0.95)
    crop = 1.0 if side >= 384 or (model.startswith("deit3") and "22k" in tag) else 0.9
    if tag.startswith(("augreg", "orig")):
        return _look(side, (0.5,), (0.5,), crop)
    return _look(side, IMAGENET_MEAN, IMAGENET_STD, crop)


# torchvision's files, whose names end with the beginning of their hash: (model, tag, file, side, resized side, interpolation).
_TORCHVISION: tuple[tuple[str, str, str, int, int, Interpolation], ...] = (
    ("vit_base_patch16_224", "tv_in1k", "vit_b_16-c867db91.pth", 224, 256, "bilinear"),
    ("vit_base_patch32_224", "tv_in1k", "vit_b_32-d86f8d99.pth", 224, 256, "bilinear"),
    ("vit_large_patch16_224", "tv_in1k", "vit_l_16-852ce7e3.pth", 224, 242, "bilinear"),
    ("vit_large_patch32_224", "tv_in1k", "vit_l_32-c7638314.pth", 224, 256, "bilinear"),
    ("vit_base_patch16_384", "tv_swag_in1k", "vit_b_16_swag-9ac1b537.pth", 384, 384, "bicubic"),
    ("vit_base_patch16_224", "tv_swag_linear_in1k", "vit_b_16_lc_swag-4e70ced5.pth", 224, 224, "bicubic"),
    ("vit_large_patch16_512", "tv_swag_in1k", "vit_l_16_swag-4f3808c9.pth", 512, 512, "bicubic"),
    ("vit_large_patch16_224", "tv_swag_linear_in1k", "vit_l_16_lc_swag-4d563306.pth", 224, 224, "bicubic"),
    ("vit_huge_patch14_518", "tv_swag_in1k", "vit_h_14_swag-80465313.pth", 518, 518, "bicubic"),
    ("vit_huge_patch14_224", "tv_swag_linear_in1k", "vit_h_14_lc_swag-c1eb923e.pth", 224, 224, "bicubic"),
    ("swin_tiny_patch4_window7_224", "tv_in1k", "swin_t-704ceda3.pth", 224, 232, "bicubic"),
    ("swin_small_patch4_window7_224", "tv_in1k", "swin_s-5e29d889.pth", 224, 246, "bicubic"),
    ("swin_base_patch4_window7_224", "tv_in1k", "swin_b-68c6b09e.pth", 224, 238, "bicubic"),
    ("resnet50", "tv2_in1k", "resnet50-11ad3fa6.pth", 224, 232, "bilinear"),
    ("resnet101", "tv2_in1k", "resnet101-cd907fc2.pth", 224, 232, "bilinear"),
    ("resnet152", "tv2_in1k", "resnet152-f82ba261.pth", 224, 232, "bilinear"),
)


def _torchvision_rows() -> Iterator[Weights]:
    for model, tag, file, side, resized, interpolation in _TORCHVISION:
        swag = "swag" in tag
        name = file.removesuffix(".pth")
        yield Weights(
            model, tag, f"https://download.pytorch.org/models/{file}",
            "cc-by-nc-4.0" if swag else "bsd-3-clause" if model.startswith("resnet") else "",
            "3.6 billion tagged photos (SWAG), then ImageNet-1k" if swag else _IN1K,
            _look(side, IMAGENET_MEAN, IMAGENET_STD, side / resized, interpolation), file, name.rsplit("-", 1)[1],
            (name.rsplit("-", 1)[0],),
        )  # fmt: skip


# The original DeiT repository's files and evaluation (resize 256, crop 224), which timm's copies take at crop 0.9.
_DEIT = (
    "deit_tiny_patch16_224-a1311bcf", "deit_small_patch16_224-cd65a155", "deit_base_patch16_224-b5f2ef4d",
    "deit_base_patch16_384-8de9b5d1", "deit_tiny_distilled_patch16_224-b40b3cf7",
    "deit_small_distilled_patch16_224-649709d9", "deit_base_distilled_patch16_224-df68dfff",
    "deit_base_distilled_patch16_384-d0272ac0",
)  # fmt: skip


def _deit_rows() -> Iterator[Weights]:
    for name in _DEIT:
        model, digest = name.rsplit("-", 1)
        side = _side(model)
        yield Weights(
            model, "original_in1k", f"https://dl.fbaipublicfiles.com/deit/{name}.pth", "apache-2.0", _IN1K,
            _look(side, IMAGENET_MEAN, IMAGENET_STD, 0.875 if side == 224 else 384 / 438), f"{name}.pth", digest, (model,),
        )  # fmt: skip


WEIGHTS: tuple[Weights, ...] = (*_timm_rows(), *_torchvision_rows(), *_deit_rows())


def of_model(model: str) -> list[Weights]:
    """The published weights of a registered model, the default first."""
    return [row for row in WEIGHTS if row.model == model]


def identify(name: str) -> tuple[Weights, bool] | None:
    """(the row that a file, folder, repository or architecture is named after, whether exactly), None where it is none.

    "timm/vit_tiny_patch16_224.augreg_in21k" and "vit_b_16-c867db91.pth" name weights; "deit_tiny_patch16_224" names a model
    and stands for its default weights.
    """
    stem = PurePosixPath(name.replace("\\", "/")).name
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    stem = _HASH.sub("", stem)
    if not stem:
        return None
    exact = next((row for row in WEIGHTS if stem in (row.id, *row.aliases)), None)
    if exact is not None:
        return exact, True
    default = next((row for row in WEIGHTS if row.model == stem), None)
    return None if default is None else (default, False)
