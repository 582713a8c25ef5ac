"""Scaled dot-product attention: the only place of the package that computes it, and the only place to look into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.halves import LACKING, by_float32, lacking_type

Sites = str | Sequence[str] | None
_AMX = torch.cpu._is_amx_tile_supported()  # matrix tiles, which the fused kernel uses in bfloat16


class AttentionSite(nn.Module):
    """A named place where a model attends ("blocks.3.attn.site"); holds its dropout rate and, while recorded, the receiver.

    A module so that it has a name in the model, and so that `training` guards the dropout in one place.
    """

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.receiver: Callable[[Tensor], None] | None = None

    def extra_repr(self) -> str:
        """Shown in the model's repr."""
        return f"dropout={self.dropout}" if self.dropout else ""


def attend(
    q: Float[Tensor, "b k n d"],
    k: Float[Tensor, "b k m d"],
    v: Float[Tensor, "b k m e"],
    bias: Float[Tensor, "#g #k n m"] | None = None,
    *,
    site: AttentionSite,
    scale: float | None = None,
    groups: int = 1,
) -> Float[Tensor, "b k n e"]:
    """softmax(scale * q k^T + bias) v, by the kernel that is fastest here; `scale` defaults to d ** -0.5.

    The bias broadcasts over the batch; with `groups` (a divisor of b) item i of the batch has the bias i % groups, as the
    windows of a map do. While `site` is recorded, the probabilities (b, k, n, m) are computed explicitly and handed to its
    receiver.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dropout = site.dropout if site.training else 0.0
    if site.receiver is None and _prefers_fused(q, k, bias):
        if bias is not None and groups > 1:
            return _fused_in_groups(q, k, v, bias, dropout, scale)
        return _fused(q, k, v, bias, dropout, scale)
    if bias is None:
        logits = (q * scale) @ k.transpose(-2, -1)
    else:
        logits = (q @ k.transpose(-2, -1)).unflatten(0, (-1, groups))
        bias = bias if groups > 1 else bias[:, None]
        logits = torch.add(bias, logits, alpha=scale).flatten(0, 1)  # one pass over the logits for scale and bias
    # Softmax accumulates in float32 whatever the input; a float32 copy of half-precision logits would only cost time.
    weights = logits.softmax(-1).to(v.dtype)
    if site.receiver is not None:
        site.receiver(weights)
    return F.dropout(weights, dropout) @ v if dropout else weights @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, scale: float) -> Tensor:
    """torch's fused attention; of a half-precision type that this CPU lacks by way of float32 (see `layers.halves`)."""
    dtype = None if torch.compiler.is_exporting() else lacking_type(q)
    if dtype is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    constant = bias is None or (bias.ndim == 4 and not bias.requires_grad)
    nothing = not (q.numel() and k.numel())
    if not learns or not constant or nothing or dropout or q.shape[3] != v.shape[3]:
        return by_float32(F.scaled_dot_product_attention, dtype, q, k, v, bias, dropout, scale=scale)
    with torch.autocast("cpu", enabled=False):
        halved = (x.to(dtype) for x in (q, k, v))
        halved = (x if x.stride(3) == 1 else x.contiguous() for x in halved)  # the kernel takes it for granted
        return _FusedByFloat32.apply(*halved, None if bias is None else bias.to(dtype).float(), scale)[0]


class _FusedByFloat32(torch.autograd.Function):
    """Fused attention of half-precision operands, kept as they are for its gradient, and the answer before it is rounded."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, ...]:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y, sums = fused(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
        return y.to(q.dtype), y, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, mask, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, mask, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, mask, y, sums = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), q.float(), k.float(), v.float(), y, sums, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        return *(g.to(q.dtype) for g in gradients), None, None


def _fused_in_groups(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float, scale: float) -> Tensor:
    """Items that have a bias of their own become heads, over which the fused kernel need not repeat the bias."""
    groups, heads = bias.shape[0], q.shape[1]
    q, k, v = (x.reshape(-1, groups * heads, *x.shape[2:]) for x in (q, k, v))
    bias = bias.expand(-1, heads, -1, -1).reshape(1, groups * heads, *bias.shape[2:])
    return _fused(q, k, v, bias, dropout, scale).unflatten(1, (groups, heads)).flatten(0, 1)


def _prefers_fused(q: Tensor, k: Tensor, bias: Tensor | None) -> bool:
    """Whether scaled_dot_product_attention is the fast choice for these operands.

    Measured by benchmarks/attention.py at 8 to 1025 tokens. On an x86 CPU with AVX512-BF16 (results/attention-cpu.json): in
    float32 the fused kernel wins, forward and backward, 1.1x to 3x; in bfloat16 two batched products around a softmax win up
    to 1.5x forward and 2x to 4x with the backward pass. With AMX the fused kernel wins in bfloat16 too, 1.35x to 2.1x, but
    forward only: with the backward pass it is 1.3x to 5x slower. Training on a few tokens with narrow heads is faster without
    it in float32 too: 1.15x at 25 tokens, 1.6x at 8 (results/attention-cpu-avx2.json). A bias that needs a gradient drops it
    to its slowest path.
    Accelerators and exports always take it.
    """
    if q.device.type != "cpu" or torch.compiler.is_exporting():
        return True
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return False
    training = torch.is_grad_enabled() and q.requires_grad
    if q.dtype not in (torch.bfloat16, torch.float16) or q.dtype in LACKING:
        return not training or q.shape[-1] > 32 or q.shape[-2] * k.shape[-2] > 32**2
    if _AMX and not training:
        return True
    return q.shape[-2] * k.shape[-2] > 2**21  # then the map leaves the caches: 2x slower forward at 3136 x 784, and large


def attention_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """All attention sites of a model by name, in the order of the modules (also of a compiled model)."""
    prefix = "_orig_mod."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, AttentionSite)}


@contextmanager
def record_attention(
    model: nn.Module, sites: Sites = None, grad: bool = False, reduce: Callable[[str, Tensor], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the attention probabilities of the next forward passes, {site name: (b, heads, queries, keys)}.

    `sites` is a list of names, a regular expression searched in the names, or None for all. With `grad` the maps stay in the
    autograd graph. `reduce` (name, map) is kept in place of a map where all maps together would not fit. A later forward pass
    replaces the maps of an earlier one. A compiled model runs eagerly meanwhile.
    Raises ValueError when no site matches (a convolutional network has none).
    """
    known = attention_sites(model)
    if sites is None:
        wanted = list(known)
    elif isinstance(sites, str):
        wanted = [name for name in known if re.search(sites, name)]
    else:
        wanted = [name for name in sites if name in known]
        if len(wanted) < len(sites):
            missing = [name for name in sites if name not in known]
            raise ValueError(f"no attention site {missing[0]!r}; this model has: {', '.join(known) or 'none'}")
    if not known:
        raise ValueError("this model has no attention to record")
    if not wanted:
        raise ValueError(f"no attention site matches {sites!r}; this model has: {', '.join(known)}")
    maps: dict[str, Tensor] = {}

    def receiver(name: str) -> Callable[[Tensor], None]:
        def receive(weights: Tensor) -> None:
            weights = weights if grad else weights.detach()
            maps[name] = weights if reduce is None else reduce(name, weights)

        return receive

    previous = {name: known[name].receiver for name in wanted}
    eager = torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext()
    try:
        for name in wanted:
            known[name].receiver = receiver(name)
        with eager:
            yield maps
    finally:
        for name in wanted:
            known[name].receiver = previous[name]


def _is_compiled(model: nn.Module) -> bool:
    return any(name.split(".")[0] == "_orig_mod" for name, _ in model.named_children()) or model._compiled_call_impl is not None
