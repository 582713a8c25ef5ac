"""Linear classifiers on frozen features: multinomial logistic regression to its optimum, and one trained by SGD."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

L2_SWEEP = tuple(10.0**power for power in (-5, -4, -3, -2, -1, 0))
LR_SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0)
_EPS = 1e-5


class Standardise:
    """Features with the training set's mean and standard deviation taken out."""

    def __init__(self, features: Float[Tensor, "n c"]):
        self.mean = features.mean(0)
        self.scale = 1 / (features.std(0, correction=0) + _EPS)

    def __call__(self, features: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """(x - mean) / (std + 1e-5)"""
        return (features - self.mean) * self.scale

    def undone(
        self, weight: Float[Tensor, "k c"], bias: Float[Tensor, " k"]
    ) -> tuple[Float[Tensor, "k c"], Float[Tensor, " k"]]:
        """Weight and bias that give the same scores for features as they are."""
        weight = weight * self.scale
        return weight, bias - weight @ self.mean


def logistic_sweep(
    features: Float[Tensor, "n c"], targets: Int[Tensor, " n"], classes: int, l2s: Sequence[float] = L2_SWEEP
) -> Iterator[tuple[float, Float[Tensor, "k c"], Float[Tensor, " k"]]]:
    """(l2, weight, bias) that minimise cross-entropy + l2 / 2 * |weight|^2 over the training set, strongest l2 first.

    Features are taken as they are (see `Standardise`); the bias is not regularised. Each solution starts the next one, by
    L-BFGS with a strong-Wolfe line search, in float64 until the gradient is 1e-6 or 200 iterations are over.
    """
    x = features.double()
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    for l2 in sorted(l2s, reverse=True):
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=200, history_size=10, tolerance_grad=1e-6, tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(solver: torch.optim.LBFGS = solver, l2: float = l2) -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(x @ weight.T + bias, targets) + l2 / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        yield l2, weight.detach().to(features.dtype).clone(), bias.detach().to(features.dtype).clone()


def sgd_sweep(
    features: Float[Tensor, "n c"],
    targets: Int[Tensor, " n"],
    classes: int,
    lrs: Sequence[float] = LR_SWEEP,
    *,
    seed: int = 0,
    epochs: int = 50,
    batch_size: int = 256,
) -> Iterator[tuple[float, Float[Tensor, "k c"], Float[Tensor, " k"]]]:
    """(lr, weight, bias) of a linear layer trained from zero by SGD, momentum 0.9, cosine decay, without weight decay.

    The common "linear probing" by gradient descent; all learning rates are trained side by side, on the same batches.
    """
    rates = torch.tensor(lrs, dtype=features.dtype).view(-1, 1, 1)
    weight = features.new_zeros(len(lrs), classes, features.shape[1])
    bias = features.new_zeros(len(lrs), classes, 1)
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    draws = torch.Generator().manual_seed(seed)
    order = [part for _ in range(epochs) for part in torch.randperm(len(features), generator=draws).split(batch_size)]
    for step, rows in enumerate(order):
        x, truth = features[rows], F.one_hot(targets[rows], classes).to(features.dtype)
        error = ((weight @ x.T + bias).softmax(1) - truth.T) / len(rows)  # the gradient by the scores: l k b
        factor = (1 + torch.cos(torch.tensor(torch.pi * step / len(order)))) / 2
        for tensor, moving, gradient in ((weight, speed[0], error @ x), (bias, speed[1], error.sum(2, keepdim=True))):
            moving.mul_(0.9).add_(gradient)
            tensor.sub_(factor * rates * moving)
    for number, lr in enumerate(lrs):
        yield lr, weight[number], bias[number, :, 0]
