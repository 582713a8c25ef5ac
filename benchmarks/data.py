"""Decoding and preprocessing side by side with torchvision, timm and transformers: `python -m benchmarks.data`.

Every path takes the same JPEG files to uint8 pictures of 224 x 224 (resize 256 and centre crop, or a random crop), on one
thread; bilinear, the default of v2.Resize and timm, unless the task is called bicubic. Passes over all pictures of a set
alternate between both sides; what is reported is the median of the pairwise ratios peer / ours with its 95 % bootstrap
interval (above 1: ours is faster), and pictures per second.

Sets: `photos`, the JPEGs of at least a megapixel in --photos (without it: made here, so that a clone can run this), and
`500px`, the same pictures with a long side of 500 pixels at JPEG qualities 75, 85 and 95.
Tasks: `crop` and `crop-bicubic`, training with a crop as large as the centre crop of the others; `random`, training with
random crops; `eval-exact` and `eval-scaled`, evaluation with full and with DCT-scaled decoding.
Besides, bicubic: how far the scaled paths are from torchvision's exact pixels, in grey levels, and with --weights FILE on
how many of 600 re-encoded random parts of the photos (with --videos FOLDER: 200 of them of frames) a Vision Transformer
gives the same top-1 class.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_image as torchvision_decode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from benchmarks.models import time_pairs
from benchmarks.pictures import CUTS, jpegs, make_cuts, make_frames, make_photos, make_small
from benchmarks.results import bootstrap_interval, machine, merge
from vitrail.checkpoints import load_model
from vitrail.config import AugmentConfig, Preprocess
from vitrail.data.images import image_size, open_image
from vitrail.data.transforms import Box, Normalise, decode_box, decode_for_eval, decode_for_train

PACKAGES = ("torch", "torchvision", "timm", "transformers", "pillow", "simplejpeg", "numpy")
CROP_FRACTION = 0.875  # resize 256, crop 224
BILINEAR = Preprocess(image_size=(224, 224), crop_fraction=CROP_FRACTION, interpolation="bilinear")
BICUBIC = replace(BILINEAR, interpolation="bicubic")
RANDOM = AugmentConfig(crop_scale=(0.35, 1.0), crop_ratio=(3 / 4, 4 / 3))
TARGETS = {("photos", "crop", "torchvision"): 1.8, ("500px", "crop", "torchvision"): 1.4}
MAX_DIFFERENCE = 1.5  # grey levels
MIN_AGREEMENT = 0.97
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")

Load = Callable[[Path], Tensor]


@dataclass(frozen=True)
class Task:
    """Our path, and the peers' builders of the path that does the same."""

    ours: Load
    peers: dict[str, Callable[[], Load]]


def tasks() -> dict[str, Task]:
    """The tasks by name."""
    generator = torch.Generator().manual_seed(0)

    def crop(preprocess: Preprocess) -> Load:
        return lambda path: decode_for_train(path, preprocess, as_large_as_the_centre(path), generator)

    def peers(interpolation: str) -> dict[str, Callable[[], Load]]:
        builders = {"torchvision": torchvision_eval, "timm": timm_eval, "transformers": transformers_eval}
        return {name: partial(build, interpolation) for name, build in builders.items()}

    return {
        "crop": Task(crop(BILINEAR), peers("bilinear")),
        "crop-bicubic": Task(crop(BICUBIC), peers("bicubic")),
        "random": Task(
            lambda path: decode_for_train(path, BILINEAR, RANDOM, generator),
            {"torchvision": torchvision_train, "timm": timm_train},
        ),
        "eval-exact": Task(lambda path: decode_for_eval(path, BILINEAR), peers("bilinear")),
        "eval-scaled": Task(lambda path: decode_for_eval(path, BILINEAR, "scaled"), peers("bilinear")),
    }


@cache
def size_of(path: Path) -> tuple[int, int]:
    """(height, width), looked up once: the paths that are timed read the header themselves."""
    return image_size(path)


@cache
def as_large_as_the_centre(path: Path) -> AugmentConfig:
    """Random crops as large as the part that resize 256 and centre crop 224 show."""
    area = (CROP_FRACTION * min(size_of(path))) ** 2 / math.prod(size_of(path))
    return AugmentConfig(crop_scale=(area, area), crop_ratio=(1.0, 1.0))


def _torchvision(path: Path) -> Tensor:
    return torchvision_decode(str(path), mode="RGB", apply_exif_orientation=True)


def torchvision_eval(interpolation: str) -> Load:
    """torchvision.io and v2, as its reference presets do."""
    transform = v2.Compose([v2.Resize(256, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(224)])
    return lambda path: transform(_torchvision(path))


def torchvision_train() -> Load:
    """torchvision.io and v2.RandomResizedCrop."""
    transform = v2.RandomResizedCrop(224, RANDOM.crop_scale, RANDOM.crop_ratio, antialias=True)
    return lambda path: transform(_torchvision(path))


def _timm(**settings: Any) -> Load:
    from timm.data import create_transform

    transform = create_transform((3, 224, 224), use_prefetcher=True, **settings)
    return lambda path: transform(Image.open(path).convert("RGB"))


def timm_eval(interpolation: str) -> Load:
    """timm's evaluation transform as its loader uses it: Pillow, uint8 out (it ignores EXIF orientation)."""
    return _timm(crop_pct=CROP_FRACTION, interpolation=interpolation)


def timm_train() -> Load:
    """timm's training transform with nothing but the random crop."""
    return _timm(
        is_training=True,
        scale=RANDOM.crop_scale,
        ratio=RANDOM.crop_ratio,
        interpolation="bilinear",
        hflip=0.0,
        color_jitter=None,
    )


def transformers_eval(interpolation: str) -> Load:
    """ViTImageProcessor on tensors from torchvision.io, its fastest way, without normalising."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(
        size={"shortest_edge": 256},
        do_center_crop=True,
        crop_size=224,
        resample=Image.Resampling[interpolation.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    return lambda path: processor(_torchvision(path), return_tensors="pt")["pixel_values"][0]


def time_cell(paths: list[Path], ours: Load, peer: Load, pairs: int) -> dict[str, Any]:
    """Alternating passes over all pictures."""

    def whole(load: Load) -> Callable[[], None]:
        def run() -> None:
            for path in paths:
                load(path)

        return run

    ours_s, peer_s = time_pairs(whole(ours), whole(peer), pairs)
    ratios = [b / a for a, b in zip(ours_s, peer_s, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "ours_per_second": len(paths) / statistics.median(ours_s),
        "peer_per_second": len(paths) / statistics.median(peer_s),
        "pictures": len(paths),
        "pairs": pairs,
    }


def describe(paths: list[Path]) -> dict[str, Any]:
    """What a set consists of: names, never where they lie."""
    return {
        "megapixels": statistics.mean(math.prod(size_of(path)) for path in paths) / 1e6,
        "kilobytes": statistics.mean(path.stat().st_size for path in paths) / 1e3,
        "files": [path.name for path in paths],
    }


def centre_box(size: tuple[int, int]) -> Box:
    """About the part that the centre crop shows, with margins that are multiples of 8 on all sides.

    There every reduction has a whole pixel, however the picture is turned, and both sides of a comparison see the same part.
    """
    down, right = (int((whole - CROP_FRACTION * min(size)) / 2) // 8 * 8 for whole in size)
    return Box(down, right, size[0] - 2 * down, size[1] - 2 * right)


def differences(paths: list[Path], preprocess: Preprocess = BICUBIC) -> dict[str, Any]:
    """Mean absolute difference in grey levels between our paths and torchvision's exact pixels, and the worst picture's."""
    exact, found = torchvision_eval(preprocess.interpolation), {"crop": [], "eval-scaled": [], "eval-exact": []}
    for path in paths:
        box = centre_box(size_of(path))
        part = F.resized_crop(_torchvision(path), *box, [224, 224], InterpolationMode(preprocess.interpolation), antialias=True)
        found["crop"].append(grey_levels(decode_box(open_image(path), box, preprocess), part))
        found["eval-scaled"].append(grey_levels(decode_for_eval(path, preprocess, "scaled"), exact(path)))
        found["eval-exact"].append(grey_levels(decode_for_eval(path, preprocess), exact(path)))
    row: dict[str, Any] = {name: {"mean": statistics.mean(values), "worst": max(values)} for name, values in found.items()}
    return {**row, "limit": MAX_DIFFERENCE, "passes": row["crop"]["mean"] <= MAX_DIFFERENCE and row["eval-exact"]["worst"] == 0}


def grey_levels(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference."""
    return float((a.float() - b.float()).abs().mean())


@torch.inference_mode()
def agreement(paths: list[Path], weights: Path) -> dict[str, Any]:
    """The share of pictures on which scaled and exact decoding lead a model to the same top-1 class."""
    model = load_model(weights, quiet=True).eval()
    preprocess = model.card.preprocess if model.card and model.card.preprocess else BICUBIC
    size, mode = list(preprocess.image_size), InterpolationMode(preprocess.interpolation)
    fit = v2.Compose([v2.Resize(math.floor(size[0] / preprocess.crop_fraction), mode, antialias=True), v2.CenterCrop(size)])
    normalise, smaller, same = Normalise(preprocess), 0, {"crop": 0, "eval-scaled": 0}
    for path in paths:
        box, image, whole = centre_box(size_of(path)), open_image(path), _torchvision(path)
        exact = {"crop": F.resized_crop(whole, *box, size, mode, antialias=True), "eval-scaled": fit(whole)}
        scaled = {"crop": decode_box(image, box, preprocess), "eval-scaled": decode_for_eval(path, preprocess, "scaled")}
        smaller += image.decode(max(size[0] / box.height, size[1] / box.width))[1] > 1
        for name in same:
            top = model(normalise(torch.stack([exact[name], scaled[name]]))).argmax(1)
            same[name] += int(top[0] == top[1])
    shares = {name: count / len(paths) for name, count in same.items()}
    row = {"same_top1": shares, "limit": MIN_AGREEMENT, "passes": len(paths) >= 500 and min(shares.values()) >= MIN_AGREEMENT}
    return {**row, "pictures": len(paths), "decoded_smaller": smaller, "weights": weights.name}


def run(photos: list[Path], videos: list[Path], folder: Path, only: str, pairs: int, weights: Path | None) -> None:
    """All cells whose name contains `only`; each is merged into the results as soon as it is known."""
    where = machine(packages=PACKAGES)
    sets = {"photos": photos, "500px": make_small(photos, folder)}
    for name, paths in sets.items():
        for task_name, task in tasks().items():
            for peer, build in task.peers.items():
                if only not in (cell := f"{name} {task_name} {peer}"):
                    continue
                if find_spec(peer) is None:
                    print(f"{cell:36s} {peer} is not installed")
                    continue
                row = time_cell(paths, task.ours, build(), pairs)
                if (target := TARGETS.get((name, task_name, peer))) is not None:
                    row |= {"target": target, "passes": row["ratio"] >= target}
                report(cell, {**row, **describe(paths)}, where)
        if only in (cell := f"{name} difference"):
            report(cell, {**differences(paths), **describe(paths)}, where)
    if weights is not None and only in "agreement":
        share = CUTS // 3 if videos else 0
        cuts = make_cuts(photos, folder, CUTS - share) + make_cuts(make_frames(videos, folder), folder, share)
        report("agreement", {**agreement(cuts, weights), "of_frames": share}, where)


def report(cell: str, row: dict[str, Any], where: dict[str, Any]) -> None:
    """Store a cell and print its line."""
    merge("data", cell, row, where)
    verdict = {True: "passes", False: "FAILS", None: ""}[row.get("passes")]
    if "ratio" in row:
        speed = f"{row['ours_per_second']:.0f} against {row['peer_per_second']:.0f} pictures/s"
        print(f"{cell:36s} {row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]  {speed}  {verdict}", flush=True)
    else:
        facts = {key: value for key, value in row.items() if isinstance(value, dict)}
        print(f"{cell:36s} {facts}  {verdict}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the pictures and run the cells asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder with camera JPEGs; without it they are made")
    parser.add_argument("--videos", type=Path, help="folder with videos, for the agreement cell")
    parser.add_argument("--weights", type=Path, help="checkpoint of an image classifier, for the agreement cell")
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--pairs", type=int, default=25)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.photos is None:
            make_photos(folder)
        photos = jpegs(given.photos or folder, at_least=1e6)
        if not photos:
            parser.error(f"{given.photos}: no JPEG of at least a megapixel")
        videos = sorted(path for path in given.videos.iterdir() if path.suffix in VIDEOS) if given.videos else []
        run(photos, videos, folder, given.only, given.pairs, given.weights)


if __name__ == "__main__":
    main()
