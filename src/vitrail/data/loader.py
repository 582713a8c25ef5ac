"""Batches for training and evaluation, on torch's DataLoader.

Pictures travel as uint8; what is drawn at random comes from (seed, key) of each sample, never from the process that loads it:
any number of workers gives the same batches. Sets that are small when decoded stay in memory (see `decoded`).
"""

from __future__ import annotations

import random
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.config import AugmentConfig, ConfigError, Preprocess
from vitrail.data.clips import check_clips, clip_for_train, clips_for_eval
from vitrail.data.decoded import MEMORY_LIMIT as KEPT_LIMIT
from vitrail.data.decoded import (
    FittedPictures,
    WholePictures,
    as_batch,
    empty_fitted,
    fitted_bytes,
    keep_fitted,
    keep_whole,
)
from vitrail.data.footage import Footage
from vitrail.data.images import DecodeMode
from vitrail.data.order import Request, SampleOrder
from vitrail.data.samples import DataError, ImageDataset
from vitrail.data.transforms import decode_for_eval, decode_for_train
from vitrail.data.workers import PREFETCH, choose_workers, sample_cost

_64_BITS = 2**64 - 1
_TRIES = 1000  # unreadable samples in a row before training gives up


class Batch(NamedTuple):
    """What a loader yields.

    images: uint8 (b, c, h, w), or clips (b, c, t, h, w), channels innermost in memory; in evaluation of videos the `clips` x
    `crops` views of a sample one after the other, so that there are that many times more of them than targets. targets:
    int64 (b,), or float32 (b, k) with several labels. indices: int64 (b,), of the samples in their data set. keys: int64
    (b, 2), (epoch and copy, index), what augmentation is drawn from. wait: seconds that the caller waited for this batch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    keys: Tensor
    wait: float = 0.0


Bad = list[tuple[str, str]]  # (name, reason) of the unreadable samples met on the way


class TrainLoader:
    """Endless batches of augmented training pictures or clips in an order that is a pure function of (seed, epoch, step).

    batch_size counts the pictures of one optimiser step over all ranks and `accumulate` micro-steps; every yielded batch
    has batch_size / (world * accumulate) of them (see `SampleOrder` for the order, `repeats` and the end of an epoch).
    weights: (n,), draws samples with replacement in these proportions. mode "scaled" decodes JPEG no larger than needed.
    workers: processes; -1 chooses. An unreadable sample is replaced by the next readable one (see `BadFiles`).
    Raises ConfigError when the batch cannot be divided, DataError for an empty set or, while loading, as `BadFiles` says.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        preprocess: Preprocess,
        augment: AugmentConfig,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = -1,
        mode: DecodeMode = "scaled",
        weights: np.ndarray | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_media(dataset, preprocess)
        preprocess = replace(preprocess, clips=1, crops=1)
        if not len(dataset):
            raise DataError(f"no training samples; {dataset.bad.summary() or 'the split is empty'}")
        self.dataset, self.rank, self.pin_memory = dataset, rank, pin_memory
        self.order = SampleOrder(len(dataset), batch_size, seed, accumulate, world, augment.repeats, weights)
        if augment.crop == "none":
            kept: FittedPictures | WholePictures | None = keep_fitted(dataset, preprocess, mode)
        else:
            kept = keep_whole(dataset, preprocess.channels)
        for index, reason in kept.reasons.items() if kept else ():
            dataset.bad.add(dataset.names(index), reason)
        self._fetch = _TrainFetch(dataset, preprocess, augment, seed, mode, kept)
        cost = 0.0 if isinstance(kept, FittedPictures) else sample_cost(dataset, preprocess, kept is not None)
        self.workers = choose_workers(workers, cost, world, fitted_bytes(self.micro_batch_size, preprocess))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch."""
        return self.order.steps_per_epoch

    @property
    def micro_batch_size(self) -> int:
        """Pictures in each yielded batch."""
        return self.order.micro_batch_size

    def batches(self, start_micro_step: int = 0) -> Iterator[Batch]:
        """Batches without end, from that micro-step of the whole training on; starting late costs nothing.

        Loader processes start once and live until the iterator is closed.
        """
        yield from _load(self._fetch, self._requests(start_micro_step), self.workers, self.dataset, self.pin_memory)

    def _requests(self, micro_step: int) -> Iterator[Request]:
        while True:
            yield self.order.request(micro_step, self.rank)
            micro_step += 1


def eval_batches(
    dataset: ImageDataset,
    *,
    preprocess: Preprocess,
    batch_size: int,
    workers: int = -1,
    mode: DecodeMode = "exact",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Every readable sample once, in order: of several processes each gets every `world`-th, from `rank` on.

    Unreadable samples are recorded in `dataset.bad` and left out, so that a batch can be smaller; `indices` say which
    samples it holds. A set that is small at the model's input size is decoded only the first time.
    Raises DataError at the first unreadable one if the data set's policy is to refuse.
    """
    check_media(dataset, preprocess)
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is less than 1")
    shard = np.arange(rank, len(dataset), world)
    parts = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
    key = (preprocess, mode, rank, world)
    if key in dataset.pixels:
        yield from _kept_batches(dataset, dataset.pixels[key], parts)
        return
    small = not dataset.store.random and fitted_bytes(len(shard), preprocess) <= KEPT_LIMIT
    pixels = empty_fitted(len(shard) if small else 0, preprocess)
    cost = sample_cost(dataset, preprocess, False)
    if workers < 0 and cost * len(shard) < 0.5:  # seconds; processes would take longer to start
        workers = 0
    workers = min(choose_workers(workers, cost, world, fitted_bytes(batch_size, preprocess)), len(parts))
    requests = [Request(part, np.stack([np.zeros_like(part), part], 1)) for part in parts]
    seen = np.zeros(len(shard), bool)
    for batch in _load(_EvalFetch(dataset, preprocess, mode), requests, workers, dataset, False):
        if small:
            positions = (batch.indices - rank) // world
            pixels[positions] = batch.images.movedim(1, -1).reshape(len(positions), *pixels.shape[1:])
            seen[positions.numpy()] = True
        if len(batch.indices):
            yield batch
    if small:
        reasons = dict(dataset.bad)
        unread = {at: reasons[dataset.names(int(shard[at]))] for at in np.flatnonzero(~seen).tolist()}
        dataset.keep(key, FittedPictures(pixels, unread))


def _kept_batches(dataset: ImageDataset, kept: FittedPictures, parts: list[np.ndarray]) -> Iterator[Batch]:
    first = 0
    for part in parts:
        start = time.perf_counter()
        positions = np.arange(first, first + len(part))
        first += len(part)
        fine = np.array([at not in kept.reasons for at in positions.tolist()], bool)
        _record(dataset, [(dataset.names(int(part[at])), kept.reasons[int(positions[at])]) for at in np.flatnonzero(~fine)])
        if fine.any():
            indices = part[fine]
            keys = np.stack([np.zeros_like(indices), indices], 1)
            batch = _assemble(dataset, kept.take(torch.from_numpy(positions[fine])), indices, keys)
            yield batch._replace(wait=time.perf_counter() - start)


def load_for_eval(
    sample: Any, preprocess: Preprocess, mode: DecodeMode, max_pixels: int
) -> UInt8[Tensor, "h w c"] | UInt8[Tensor, "v t h w c"]:
    """A picture, or all views of a video, as the model will see them. Raises ImageError or VideoError with the reason."""
    if isinstance(sample, Footage):
        return clips_for_eval(sample, preprocess, max_pixels).movedim(1, -1)
    return decode_for_eval(sample, preprocess, mode=mode, max_pixels=max_pixels).movedim(0, -1)


def check_media(dataset: ImageDataset, preprocess: Preprocess) -> None:
    """Raises ConfigError where videos meet a model of pictures, or the other way round, or where clips make no sense."""
    if dataset.video != bool(preprocess.frames):
        wanted = "clips of videos" if preprocess.frames else "pictures"
        hint = "" if dataset.video else "; media: videos, or frames where folders of pictures are clips"
        raise ConfigError(f"the model takes {wanted}, but the samples of the data set are {dataset.noun}s{hint}")
    if dataset.video:
        check_clips(preprocess)
        if dataset.store.played_faster and preprocess.sampling != "dense":
            raise ConfigError(f"{preprocess.sampling} sampling hides how fast a video is played; use sampling dense")


class _EvalFetch(Dataset):
    """Loads the samples of a request that can be read."""

    def __init__(self, dataset: ImageDataset, preprocess: Preprocess, mode: DecodeMode) -> None:
        self.dataset, self.preprocess, self.mode = dataset, preprocess, mode

    def __getitem__(self, request: Request) -> tuple[Batch, Bad]:
        indices, keys = request
        images = empty_fitted(len(indices), self.preprocess)
        fine: list[int] = []
        bad: Bad = []
        for at, index in enumerate(indices.tolist()):
            try:
                with _seeded(self.dataset, 0, 0, index):
                    picture = self.dataset.read(index)
                images[len(fine)] = load_for_eval(picture, self.preprocess, self.mode, self.dataset.max_pixels)
            except (OSError, ValueError) as problem:
                bad.append((self.dataset.names(index), str(problem)))
                continue
            fine.append(at)
        return _assemble(self.dataset, as_batch(images[: len(fine)]), indices[fine], keys[fine]), bad


class _TrainFetch(Dataset):
    """Loads the samples of a request, each unreadable one replaced by the next readable one of the data set's order."""

    def __init__(
        self,
        dataset: ImageDataset,
        preprocess: Preprocess,
        augment: AugmentConfig,
        seed: int,
        mode: DecodeMode,
        kept: FittedPictures | WholePictures | None,
    ) -> None:
        self.dataset, self.preprocess, self.augment = dataset, preprocess, augment
        self.seed, self.mode, self.kept = seed, mode, kept
        self.unreadable = dict(kept.reasons) if kept else {}  # index -> reason, what this process has found so far

    def __getitem__(self, request: Request) -> tuple[Batch, Bad] | DataError:
        try:
            return self._load(request)
        except DataError as problem:  # as a value: raised in a worker, it would arrive buried in a traceback
            return problem

    def _load(self, request: Request) -> tuple[Batch, Bad]:
        indices, keys = request.indices.copy(), request.keys.copy()
        bad: Bad = []
        if isinstance(self.kept, FittedPictures):
            for at in np.flatnonzero(np.isin(indices, list(self.unreadable))).tolist():
                indices[at] = self._next_readable(int(indices[at]), bad)
            images = self.kept.take(torch.from_numpy(indices))
        else:
            pixels = empty_fitted(len(indices), self.preprocess)
            for at, (first, index) in enumerate(keys.tolist()):
                indices[at], picture = self._picture(first, index, bad)
                pixels[at] = picture.movedim(0, -1)
            images = as_batch(pixels)
        keys[:, 1] = indices
        return _assemble(self.dataset, images, indices, keys), bad

    def _picture(self, first: int, index: int, bad: Bad) -> tuple[int, Tensor]:
        for _ in range(_TRIES):
            index = self._next_readable(index, bad)
            try:
                with _seeded(self.dataset, self.seed, first, index):
                    picture = (self.kept or self.dataset).read(index)  # type: ignore[union-attr]
                generator = torch.Generator().manual_seed(_number(self.seed, first, index))
                limit = self.dataset.max_pixels
                if isinstance(picture, Footage):
                    return index, clip_for_train(picture, self.preprocess, self.augment, generator, limit)
                return index, decode_for_train(picture, self.preprocess, self.augment, generator, self.mode, limit)
            except (OSError, ValueError) as problem:
                self.unreadable[index] = str(problem)
        raise DataError(_hopeless(self.dataset, self.unreadable))

    def _next_readable(self, index: int, bad: Bad) -> int:
        for _ in range(min(_TRIES, len(self.dataset))):
            if index not in self.unreadable:
                return index
            bad.append((self.dataset.names(index), self.unreadable[index]))
            index = (index + 1) % len(self.dataset)
        raise DataError(_hopeless(self.dataset, self.unreadable))


def _hopeless(dataset: ImageDataset, unreadable: dict[int, str]) -> str:
    index, reason = next(iter(unreadable.items()))
    found = f"{len(unreadable)} of {len(dataset)}"
    return f"too many unreadable {dataset.noun}s in a row ({found}), such as {dataset.names(index)}: {reason}"


def _assemble(dataset: ImageDataset, images: Tensor, indices: np.ndarray, keys: np.ndarray) -> Batch:
    return Batch(images, torch.from_numpy(dataset.targets[indices]), torch.from_numpy(indices), torch.from_numpy(keys))


def _record(dataset: ImageDataset, bad: Bad) -> None:
    for name, reason in bad:
        dataset.bad.add(name, reason)


def _load(
    fetch: Dataset, requests: Iterable[Request], workers: int, dataset: ImageDataset, pin_memory: bool
) -> Iterator[Batch]:
    """Answers to the requests, in order. What workers found unreadable is recorded here, in the caller's process."""
    loader: DataLoader = DataLoader(
        fetch,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else it would draw from torch's global one, whose state belongs to the model
    )
    with warnings.catch_warnings():
        # Forking beside threads is how DataLoader works on Linux; its workers run single-threaded and never touch the device.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        iterator = iter(loader)
    try:
        while True:
            start = time.perf_counter()
            answer = next(iterator, None)
            if answer is None:
                return
            if isinstance(answer, DataError):
                raise answer
            batch, bad = answer
            _record(dataset, bad)
            yield Batch(*batch)._replace(wait=time.perf_counter() - start)
    finally:
        del iterator  # ends the workers now; left to the garbage collector in a traceback's frame, they take 5 s


def _ignore_signals(worker: int) -> None:
    """SIGINT and SIGTERM often reach the whole group of processes: the main one decides when loading ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(answer: Any) -> Any:
    return answer


def _number(seed: int, first: int, index: int) -> int:
    """32 bits (all that torch's CPU generator uses of a seed) that look unrelated for any two samples: MurmurHash3's mixer."""
    mixed = (seed * 0x9E3779B97F4A7C15 + first * 0xC2B2AE3D27D4EB4F + index * 0x165667B19E3779F9) & _64_BITS
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ mixed >> 33) * factor & _64_BITS
    return (mixed ^ mixed >> 33) >> 32


@contextmanager
def _seeded(dataset: ImageDataset, seed: int, first: int, index: int) -> Iterator[None]:
    """Within it, the global generators give what belongs to this sample: random transforms inside a data set become pure."""
    if not dataset.store.random:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    number = _number(seed, first, index)
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
