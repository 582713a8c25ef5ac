"""Batch normalisation, exact where torch's is not."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LANES = 2048  # columns that rows are folded into: wide enough for vector instructions, small enough for the nearest cache
MANY = 65536  # values of a channel from which torch's sums lose two digits, and from which ours cost no more


def in_float32_on_cpu(x: Tensor) -> bool:
    """Whether x is computed with in float32 on a CPU, where some of torch's kernels are better avoided (torch 2.15, AVX2).

    Its group norm adds up squares without a correction when channels are innermost: logits of an R50 + ViT-B/16 are three
    times, those of a BiT-R50 six times as far from float64 as with contiguous maps, which are as fast there.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), for a batch normalisation by the way round an inexact kernel."""
    if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)) and norm.training and norm.affine and _sums_plainly(x):
        return batch_norm(norm, x)
    return norm(x)


def _sums_plainly(x: Tensor) -> bool:
    """Whether torch (2.15, float32, CPU) would add up a channel's values one after the other: where channels are innermost."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or not in_float32_on_cpu(x):  # traced, it is torch's own
        return False
    many = x.numel() >= MANY * x.shape[1] and 2 * x.shape[1] <= LANES
    return many and x.is_contiguous(memory_format=_innermost(x)) and not x.is_contiguous()


def _innermost(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def batch_norm(norm: nn.BatchNorm2d | nn.BatchNorm3d, x: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
    """Batch normalisation by the batch's own statistics, with channels innermost; running statistics move on as usual.

    Of n values a channel torch makes one running sum, whose rounding errors grow with n. Here the rows of channels are read as
    fewer, longer ones, the sums of which are then joined: as many vector instructions or more, and errors of a sum of
    about sqrt(n).
    """
    y, mean, variance = _BatchNorm.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum  # type: ignore[arg-type]
            n = x.numel() // x.shape[1]
            norm.running_mean.lerp_(mean, share)  # type: ignore[union-attr]
            norm.running_var.lerp_(variance * (n / (n - 1)), share)  # type: ignore[union-attr]
    return y


@functools.lru_cache(maxsize=1024)
def _fold(rows: int, channels: int) -> int:
    """How many rows make a longer one: a divisor of their number, at most its root and as many as fill the lanes."""
    most = max(1, min(LANES // channels, math.isqrt(rows)))
    return next(k for k in range(most, 0, -1) if rows % k == 0)


def _folded(x: Float[Tensor, "b c *grid"], k: int) -> Float[Tensor, "r d"]:
    """The memory of x, channels innermost, as rows of k times its channels."""
    return x.movedim(1, -1).reshape(-1, k * x.shape[1])


class _BatchNorm(torch.autograd.Function):
    """(x, weight, bias, eps) to the normalised x and its mean and (biased) variance by channel."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        c = x.shape[1]
        k = _fold(x.numel() // c, c)
        means, variances = torch.batch_norm_update_stats(_folded(x, k), None, None, 0.0)
        means, variances = means.view(k, c).double(), variances.view(k, c).double()
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        mean, variance = mean.float(), variance.float()
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        c = x.shape[1]
        n = x.numel() // c
        k = _fold(n, c)
        grad = grad.contiguous(memory_format=_innermost(x))
        scale = (variance + ctx.eps).rsqrt()
        statistics = (mean.repeat(k), scale.repeat(k))
        _, of_weights, of_biases = torch.ops.aten.native_batch_norm_backward(
            _folded(grad, k), _folded(x, k), None, None, None, *statistics, True, ctx.eps, (False, True, True)
        )
        of_weight, of_bias = of_weights.view(k, c).sum(0), of_biases.view(k, c).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None
        a = weight * scale
        slope = -a * scale * of_weight / n
        offset = -a * of_bias / n - slope * mean
        zeros = torch.zeros_like(mean)
        of_x = F.batch_norm(x, zeros, torch.ones_like(mean), slope, offset, False, 0.0, 0.0)
        return of_x.addcmul_(grad, a.view(-1, *(1,) * (x.ndim - 2))), of_weight, of_bias, None
