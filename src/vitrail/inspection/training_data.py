"""What a report says about the data: splits, what was inferred, unreadable files, and pictures as training sees them."""

from __future__ import annotations

import torch
from torch import nn

from vitrail.config import Preprocess, RunConfig
from vitrail.data import Data, TrainLoader
from vitrail.data.augment import DeviceAugment
from vitrail.data.mixing import mix_batch
from vitrail.data.transforms import Normalise
from vitrail.inspection import draw
from vitrail.inspection.sections import Context

SHOWN = 36  # augmented pictures
NAMED = 30  # unreadable files


def summary(data: Data, config: RunConfig, preprocess: Preprocess) -> Context:
    """The data section."""
    shown = augmented(data, config, preprocess) if data.train is not None and len(data.train) else {"augmented": []}
    noun = next(iter(data.splits().values())).noun
    splits, bad = [], []  # counted after reading pictures for this page, so that what could not be read is among them
    for name, dataset in data.splits().items():
        counts = dataset.class_counts()
        smallest, largest = int(counts.argmin()), int(counts.argmax())
        splits.append(
            {
                "name": name,
                "count": f"{len(dataset):,}",
                "smallest": f"{counts[smallest]:,} of {data.classes[smallest]}",
                "largest": f"{counts[largest]:,} of {data.classes[largest]}",
                "bad": f"{len(dataset.bad):,}",
            }
        )
        bad += [f"{name}: {file}: {reason}" for file, reason in dataset.bad]
    more = [f"and {len(bad) - NAMED:,} more"] if len(bad) > NAMED else []
    return {
        "about": f"{data.name}: {len(data.classes)} {f'labels, any number a {noun}' if data.multi_label else 'classes'}. "
        "Unreadable are those met while this page was made: all of the evaluated split, and of sets that fit into memory; "
        f"vitrail data check reads every {noun}.",
        "noun": noun,
        "splits": splits,
        "notes": data.notes,
        "bad": bad[:NAMED] + more,
        "hard": max(preprocess.image_size) <= draw.SMALL_PICTURE,
        **shown,
    }


def augmented(data: Data, config: RunConfig, preprocess: Preprocess) -> Context:
    """The first pictures of the run's first step as the model gets them: cut, changed and mixed as the settings say."""
    assert data.train is not None
    loader = TrainLoader(
        data.train, preprocess=preprocess, augment=config.augment, batch_size=config.batch_size,
        accumulate=config.accumulate, seed=config.seed, workers=0,
        mode="exact" if config.data_config.decode == "exact" else "scaled",
    )  # fmt: skip
    batch = next(loader.batches(0))
    normalise = Normalise(preprocess)
    images = normalise(DeviceAugment(config.augment)(batch.images, batch.keys, config.seed))
    about = "after cropping and augmentation"
    if config.objective.balance == "sampler":
        about += ", in the order they would have without the balancing sampler"
    if config.augment.mixup or config.augment.cutmix:
        classes = len(data.classes)
        soft = batch.targets if data.multi_label else nn.functional.one_hot(batch.targets, classes).float()
        images, _ = mix_batch(images, soft, config.augment, torch.Generator().manual_seed(config.seed))
        about += " and mixing (partners drawn for this page)"
    shift, scale = (v if images.ndim == 4 else v.unsqueeze(2) for v in (normalise.shift, normalise.scale))
    pixels = ((images - shift) / scale).round().clamp(0, 255).to(torch.uint8)[:SHOWN]
    targets = batch.targets if data.multi_label else nn.functional.one_hot(batch.targets, len(data.classes))
    names = [", ".join(data.classes[c] for c in row.nonzero()[:, 0].tolist()) for row in targets[:SHOWN]]
    shown = [
        {"uri": draw.data_uri(draw.still(picture), 112), "label": name} for picture, name in zip(pixels, names, strict=True)
    ]
    return {
        "augmented": shown,
        "augmented_about": f"The first {len(shown)} {data.train.noun}s of the first training step, {about}.",
    }
