"""Frozen features: a model's pooled embedding of every sample of a data set, extracted once and kept on disk.

A kept file is named by a hash of everything that decides its content: weights, architecture, preprocessing, samples, precision
and this package's version. Other weights give another name, so that they can never be answered with these features.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.checkpoints.io import read_state, write_safetensors
from vitrail.checkpoints.mapping import CheckpointError
from vitrail.config import ConfigError, Preprocess, to_dict
from vitrail.data import Batch, ImageDataset
from vitrail.data.clips import view_count
from vitrail.data.images import DecodeMode
from vitrail.evaluation.classify import answer_dataset
from vitrail.models import Model

FEATURES, INDICES, ABOUT = "features", "indices", "about"


class Features(NamedTuple):
    """Embeddings (n, c) in float32, the truth (n,), and which samples of their data set they belong to.

    kept: whether they were read from disk instead of computed.
    """

    features: Float[Tensor, "n c"]
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"]
    indices: Int[Tensor, " n"]
    kept: bool = False


def cache_folder() -> Path:
    """Where features are kept unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / "features"


def extract_features(
    model: Model,
    dataset: ImageDataset,
    preprocess: Preprocess,
    *,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    decode: DecodeMode = "exact",
    rank: int = 0,
    world: int = 1,
    progress: str | None = None,
) -> Features:
    """`pool(features(x))` of every readable sample, the mean over the views of a video; read from `cache` if it is there.

    cache: a folder, None for none; collections from Python, whose content cannot be told, are never kept. The other arguments
    are those of `predict_dataset`. Raises ConfigError, naming the samples, where an embedding is not finite.
    """
    path = None
    if cache is not None and world == 1 and (samples := dataset.identity()):
        about = {
            "weights": weights_hash(model), "config": to_dict(model.config), "preprocess": to_dict(preprocess),
            "samples": samples, "precision": precision, "decode": decode, "version": version("vitrail"),
        }  # fmt: skip
        path = cache / f"{_digest(about)}.safetensors"
        if (kept := _read(path, len(dataset))) is not None:
            return Features(kept[0], torch.from_numpy(dataset.targets)[kept[1]], kept[1], kept=True)
    batches = answer_dataset(
        model, dataset, preprocess, lambda x: model.pool(model.features(x)), device=device, precision=precision,
        batch_size=batch_size, workers=workers, decode=decode, rank=rank, world=world, progress=progress,
    )  # fmt: skip
    found = _collected(batches, dataset, view_count(preprocess))
    _refuse_nonfinite(found, dataset, model, precision)
    if path is not None:
        content = {FEATURES: found.features, INDICES: found.indices}
        write_safetensors(path, content, {ABOUT: json.dumps(about, sort_keys=True)})
    return found


def _collected(batches: Iterator[tuple[Tensor, Batch]], dataset: ImageDataset, views: int) -> Features:
    embeddings, targets, indices = [], [], []
    for answers, batch in batches:
        embeddings.append(answers.unflatten(0, (-1, views)).mean(1))
        targets.append(batch.targets)
        indices.append(batch.indices)
    if not embeddings:  # more processes than samples
        nothing = torch.empty(0, dtype=torch.long)
        return Features(torch.empty(0, 0), torch.from_numpy(dataset.targets[:0]), nothing)
    return Features(torch.cat(embeddings), torch.cat(targets), torch.cat(indices))


def _refuse_nonfinite(found: Features, dataset: ImageDataset, model: Model, precision: str) -> None:
    wrong = (~found.features.isfinite()).any(1).nonzero()[:, 0]
    if not len(wrong):
        return
    named = ", ".join(dataset.names(int(found.indices[row])) for row in wrong[:3])
    way = "; try --precision fp32" if precision != "fp32" else "; are the weights of this model finite?"
    raise ConfigError(
        f"{model.name or model.family} gives features that are nan or infinite for {len(wrong):,} of {len(found.indices):,} "
        f"{dataset.noun}s, such as {named}{way}"
    )


def weights_hash(model: Model) -> str:
    """32 hexadecimal digits made of all parameters and buffers, their names, types and shapes."""
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return made.hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read(path: Path, samples: int) -> tuple[Tensor, Tensor] | None:
    """(features, indices) of a kept file; None where there is none, or where it is not what its name says."""
    if not path.is_file():
        return None
    try:
        tensors, metadata = read_state(path)
        features, indices = tensors[FEATURES], tensors[INDICES]
        fits = features.ndim == 2 and features.dtype == torch.float32 and indices.shape == features.shape[:1]
        fits &= len(indices) > 0 and 0 <= int(indices.min()) <= int(indices.max()) < samples
        if fits and bool(features.isfinite().all()) and _digest(json.loads(metadata[ABOUT])) == path.stem:
            return features, indices
    except (CheckpointError, KeyError, ValueError, RuntimeError):
        pass
    print(f"note: {path} is damaged; its features are computed anew", file=sys.stderr)
    return None
