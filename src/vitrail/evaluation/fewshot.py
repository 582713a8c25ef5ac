"""Few-shot classification by closed-form ridge regression: the cheap measure of a representation (ViT, section 4.1).

"A regularised least-squares regression problem that maps the (frozen) representation of a subset of training images to
{-1, 1}^K target vectors". The details follow the authors' evaluator (big_vision, evaluators/fewshot_lsr.py), whose results for
given features are a test of this package: features standardised by the training mean and standard deviation plus 1e-5, a
constant feature of 100 beside them (so that the intercept is hardly regularised), l2 added to the eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor

from vitrail.config import ConfigError

L2 = 2.0**10  # the authors' setting
L2_SWEEP = tuple(2.0**power for power in (-10, -5, 0, 5, 8, 10, 12, 15, 20))
SHOTS = (1, 5, 10, 25)
_BIAS = 100.0
_EPS = 1e-5


def draw_shots(targets: NDArray[np.int64], classes: Sequence[str], shots: int, seed: int) -> NDArray[np.int64]:
    """Places of `shots` samples of every class, class by class, drawn as by the authors; fewer where a class has fewer.

    A larger number of shots with the same seed contains a smaller one's. Raises ConfigError for a class without any sample.
    """
    if shots < 1:
        raise ConfigError(f"shots: {shots} is less than 1")
    rng = np.random.default_rng(seed)
    chosen = []
    refuse_empty(targets, classes)
    for number in range(len(classes)):
        members = np.flatnonzero(targets == number)
        chosen.append(members[rng.permutation(len(members))[:shots]])
    return np.concatenate(chosen)


def refuse_empty(targets: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Raise ConfigError, naming them, where classes have no sample to learn from."""
    empty = [name for name, count in zip(classes, np.bincount(targets, minlength=len(classes)), strict=True) if not count]
    if empty:
        named = ", ".join(map(repr, empty[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise ConfigError(
            f"no readable training sample of {named}: not one shot of it can be shown; add some, or leave the class out"
        )


class Ridge:
    """The regression of one training set, solved for any l2 at the cost of two products (one eigen-decomposition, float64)."""

    def __init__(self, features: Float[Tensor, "n c"], targets: Int[Tensor, " n"], classes: int):
        x = features.double()
        self.mean, self.std = x.mean(0), x.std(0, correction=0)
        x = self._prepared(features)
        y = 2 * torch.nn.functional.one_hot(targets, classes).double() - 1
        # (X'X + l2 I)^-1 X'y = X'(XX' + l2 I)^-1 y: the smaller of both matrices is decomposed.
        self.wide = x.shape[0] < x.shape[1]
        values, vectors = torch.linalg.eigh(x @ x.T if self.wide else x.T @ x)
        self.values = values.clamp_min(0)
        self.left = x.T @ vectors if self.wide else vectors
        self.right = vectors.T @ (y if self.wide else x.T @ y)

    def _prepared(self, features: Float[Tensor, "n c"]) -> Float64[Tensor, "n c1"]:
        x = (features.double() - self.mean) / (self.std + _EPS)
        return torch.cat([x, x.new_full((len(x), 1), _BIAS)], 1)

    def weights(self, l2: float) -> Float64[Tensor, "c1 k"]:
        """Of the standardised features and, last, of the constant 100."""
        return self.left @ (self.right / (self.values + l2)[:, None])

    def scores(self, features: Float[Tensor, "n c"], l2: float) -> Float64[Tensor, "n k"]:
        """Near 1 for the class of a sample, near -1 for the others."""
        return self._prepared(features) @ self.weights(l2)

    def sweep(self, features: Float[Tensor, "n c"], l2s: Sequence[float]) -> Iterator[Float64[Tensor, "n k"]]:
        """`scores` for several l2."""
        x = self._prepared(features) @ self.left
        for l2 in l2s:
            yield x @ (self.right / (self.values + l2)[:, None])
