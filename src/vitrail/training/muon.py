"""Muon: steps of hidden matrices made orthogonal (Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at zero is steepest (the post, "Newton-Schulz")
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # that of AdamW's steps; ours are scaled to it, so that both have one learning rate (arXiv 2502.16982, section 2.2)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, a, b), a <= b, with their singular values brought near 1: between 0.68 and 1.21, but for tiny ones.

    In bfloat16 on accelerators, as in the original; in float32 on CPUs, many of which emulate bfloat16.
    """
    first, third, fifth = COEFFICIENTS
    y = x.float() if x.device.type == "cpu" else x.bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        y = torch.baddbmm(y, polynomial, y, beta=first)
    return y.to(x.dtype)


class Muon(Optimizer):
    """Nesterov momentum whose steps are orthogonal matrices, for groups with a number of `parts`; AdamW for the others.

    A parameter of `parts` p is p matrices one upon the other (the q, k, v of a fused projection), each with a step of its
    own; more than two dimensions (kernels of convolutions) count as columns. Weight decay is apart from the gradient in both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "parts": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in given]
            if given:
                (self._orthogonal_step if group["parts"] else self._adamw_step)(group, given, gradients)
        return loss

    def _adamw_step(self, group: dict[str, Any], given: list[Tensor], gradients: list[Tensor]) -> None:
        for p in given:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        means, squares, steps = ([self.state[p][name] for p in given] for name in ("exp_avg", "exp_avg_sq", "step"))
        (beta1, beta2), device = group["betas"], given[0].device.type
        adamw(
            given, gradients, means, squares, [], steps, beta1=beta1, beta2=beta2, lr=group["lr"], eps=1e-8,
            weight_decay=group["weight_decay"], fused=device in ("cpu", "cuda"), amsgrad=False, maximize=False,
        )  # fmt: skip

    def _orthogonal_step(self, group: dict[str, Any], given: list[Tensor], gradients: list[Tensor]) -> None:
        for p in given:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
        means = [self.state[p]["momentum"] for p in given]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, means, MOMENTUM)  # Nesterov's look ahead
        torch._foreach_mul_(given, 1 - group["lr"] * group["weight_decay"])
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, step in zip(given, ahead, strict=True):
            for weight, direction in zip(p.chunk(group["parts"]), step.flatten(1).chunk(group["parts"]), strict=True):
                shapes.setdefault((direction.shape[0], direction.shape[1]), []).append((weight, direction))
        for (rows, columns), pairs in shapes.items():  # matrices of a shape together: many small products are one large one
            directions = torch.stack([direction for _, direction in pairs])
            steps = orthogonal(directions.mT).mT if rows > columns else orthogonal(directions)
            parts = [step.reshape(weight.shape) for (weight, _), step in zip(pairs, steps, strict=True)]
            torch._foreach_add_([weight for weight, _ in pairs], parts, alpha=-group["lr"] * RMS * max(rows, columns) ** 0.5)
