"""The order of training samples: a pure function of the seed and the epoch, cut into batches, ranks and micro-steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vitrail.config import ConfigError

_PURPOSE = 0x0DE5  # keeps this use of the seed apart from others


class Request(NamedTuple):
    """One micro-batch to load. indices: int64 (b,); keys: int64 (b, 2), what a sample's augmentation is drawn from."""

    indices: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Which sample comes when, for every rank and micro-step; any place of it is found without walking there.

    An epoch is one PCG64 permutation of the samples, cut into batches of `batch_size`; what does not fill the last batch is
    left out (another permutation leaves out others), but a set smaller than one batch is gone through again until it
    is filled. A batch is cut by rank, then by micro-step. With `weights` samples are drawn with replacement instead.
    `repeats` > 1 puts each sample of a batch into it that many times (repeated augmentation, Hoffer et al. 2020; as in DeiT
    the number of steps stays, so that an epoch holds as many times fewer samples).

    The key of a sample is (epoch * copies + copy, index): no two samples of a run share one.
    Raises ConfigError when the batch cannot be divided.
    """

    samples: int
    batch_size: int  # global: over all ranks and micro-steps
    seed: int = 0
    accumulate: int = 1
    world: int = 1
    repeats: int = 1
    weights: np.ndarray | None = None  # (samples,), relative
    _last: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world
        if min(self.samples, self.batch_size, parts, self.repeats) < 1:
            raise ConfigError("the number of samples, batch_size, accumulate, world and repeats must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is negative")
        for what, divisor in ((f"{self.world} ranks x {self.accumulate} micro-steps", parts), ("repeats", self.repeats)):
            if self.batch_size % divisor:
                below = self.batch_size // divisor * divisor
                valid = " or ".join(str(size) for size in (below, below + divisor) if size)
                raise ConfigError(f"batch_size {self.batch_size} cannot be divided by {what} ({divisor}); nearest: {valid}")
        weights = self.weights
        if weights is not None and (len(weights) != self.samples or not weights.sum() > 0 or weights.min() < 0):
            raise ConfigError(f"weights: expected {self.samples} weights, none negative and some positive")

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return max(1, self.samples // self.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Samples that one rank loads for one micro-step."""
        return self.batch_size // (self.accumulate * self.world)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices, first halves of the keys) of all samples of an epoch, int64 (steps_per_epoch * batch_size,)."""
        if epoch not in self._last:
            self._last.clear()
            self._last[epoch] = self._draw(epoch)
        return self._last[epoch]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64((self.seed, epoch, _PURPOSE)))
        distinct = self.batch_size // self.repeats
        place = np.arange(self.steps_per_epoch * self.batch_size)
        step, within = np.divmod(place, self.batch_size)
        copy, slot = np.divmod(within, distinct)  # copies lie far apart in the batch: as a rule on different ranks
        drawn = step * distinct + slot
        if self.weights is not None:
            edges = np.cumsum(self.weights, dtype=np.float64)
            choice = np.searchsorted(edges, rng.random(self.steps_per_epoch * distinct) * edges[-1], side="right")
            return np.minimum(choice, self.samples - 1)[drawn], epoch * len(place) + place
        rounds, position = np.divmod(drawn, self.samples)
        copies = self.repeats * -(-self.steps_per_epoch * distinct // self.samples)
        return rng.permutation(self.samples)[position], epoch * copies + rounds * self.repeats + copy

    def request(self, micro_step: int, rank: int = 0) -> Request:
        """The samples of one rank at a global micro-step, counted from the start of training."""
        step, micro = divmod(micro_step, self.accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        indices, firsts = self.epoch(epoch)
        start = step * self.batch_size + (rank * self.accumulate + micro) * self.micro_batch_size
        part = slice(start, start + self.micro_batch_size)
        return Request(indices[part], np.stack([firsts[part], indices[part]], 1))
