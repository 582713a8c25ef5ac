"""Half precision on CPUs that lack it: products of half-precision operands by the kernels of float32.

Where a CPU has no instructions for a half-precision type, torch multiplies in plain loops, 5 to 40 times slower than in
float32 (torch 2.15, AVX2). Here such operands are rounded to the type, multiplied and summed in float32 as hardware that
has the type does, and the result is rounded again. What a gradient needs is kept in half precision. For attention see there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import noop_context_fn


def _lacking() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():  # then nothing is known about the CPU, and torch's own way is kept
        return frozenset()
    native = torch.ops.mkldnn
    has = {torch.bfloat16: native._is_mkldnn_bf16_supported(), torch.float16: native._is_mkldnn_fp16_supported()}
    return frozenset(dtype for dtype, supported in has.items() if not supported)


LACKING = _lacking()  # the types that torch multiplies in plain loops on this CPU


def half_products(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    """A context to compute with `dtype` in: products take the detour by float32 where the device is a CPU that lacks it."""
    return _ByFloat32() if device == "cpu" and dtype in LACKING else nullcontext()


def lacking_type(x: Tensor) -> torch.dtype | None:
    """The type that a product of x, a tensor on the CPU, would have now, if this CPU lacks it."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or not x.is_floating_point():
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in LACKING else None


def recomputing(x: Tensor) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """`context_fn` of torch's activation checkpointing: products are computed again as they were, by float32 if they were."""
    dtype = lacking_type(x)
    return noop_context_fn if dtype is None else lambda: (nullcontext(), half_products(dtype, "cpu"))


def by_float32(function: Callable[..., Tensor], dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
    """function(...) of operands rounded to `dtype`, in float32, and rounded."""

    def rounded(x: Any) -> Any:
        return x.to(dtype).float() if isinstance(x, Tensor) and x.is_floating_point() else x

    with torch.autocast("cpu", enabled=False):
        return function(*map(rounded, args), **{name: rounded(value) for name, value in kwargs.items()}).to(dtype)


class _ByFloat32(TorchFunctionMode):
    """While it is entered, products of half-precision operands go by way of float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or "out" in kwargs:
            return func(*args, **kwargs)
        factors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:2]
        dtypes = {lacking_type(x) for x in factors}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        return func(*args, **kwargs) if dtype is None else _PRODUCTS[func](func, dtype, *args, **kwargs)


class _Product(Function):
    """A product of two tensors of one half-precision type, which are what is kept for its gradient."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, kind: tuple[Callable[..., Any], ...], settings: Any) -> Tensor:
        return kind[0](a.float(), b.float(), None if bias is None else bias.float(), settings).to(a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.kind, ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        with torch.autocast("cpu", enabled=False):  # in which compilers trace backward passes
            found = ctx.kind[1](grad.float(), a.float(), b.float(), wanted, ctx.settings)
            return *(None if g is None else g.to(a.dtype) for g in found), None, None


def _linear_of(x: Tensor, weight: Tensor, bias: Tensor | None, _: Any) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_gradients(g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], _: Any) -> tuple[Tensor | None, ...]:
    rows = g.flatten(0, -2)
    return (
        g @ weight if wanted[0] else None,
        rows.T @ x.flatten(0, -2) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def _matmul_of(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return a @ b


def _matmul_gradients(g: Tensor, a: Tensor, b: Tensor, wanted: Sequence[bool], _: Any) -> tuple[Tensor | None, ...]:
    of_a = (g @ b.mT).sum_to_size(a.shape) if wanted[0] else None
    of_b = (a.mT @ g).sum_to_size(b.shape) if wanted[1] else None
    return of_a, of_b, None


def _einsum_of(a: Tensor, b: Tensor, _: Any, indices: tuple[str, str, str]) -> Tensor:
    return torch.einsum("{},{}->{}".format(*indices), a, b)


def _einsum_gradients(
    g: Tensor, a: Tensor, b: Tensor, wanted: Sequence[bool], indices: tuple[str, str, str]
) -> tuple[Tensor | None, ...]:
    of_a, of_b, of_product = indices
    return (
        torch.einsum(f"{of_product},{of_b}->{of_a}", g, b) if wanted[0] else None,
        torch.einsum(f"{of_product},{of_a}->{of_b}", g, a) if wanted[1] else None,
        None,
    )


def _convolution_of(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *settings)


def _convolution_gradients(
    g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], settings: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    sizes = [len(weight)] if wanted[2] else None
    found = torch.ops.aten.convolution_backward(g, x, weight, sizes, *settings, list(wanted))
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


_LINEAR = _linear_of, _linear_gradients
_MATMUL = _matmul_of, _matmul_gradients
_EINSUM = _einsum_of, _einsum_gradients
_CONVOLUTION = _convolution_of, _convolution_gradients


def _multiply(kind: Any, dtype: torch.dtype, a: Tensor, b: Tensor, bias: Tensor | None = None, settings: Any = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _Product.apply(a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype), kind, settings)


# Parameters are called as torch calls them, for they can be given by name.
def _linear(_: Any, dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _multiply(_LINEAR, dtype, input, weight, bias)


def _matmul(func: Any, dtype: torch.dtype, input: Tensor, other: Tensor) -> Tensor:
    if min(input.ndim, other.ndim) < 2:
        return by_float32(func, dtype, input, other)
    return _multiply(_MATMUL, dtype, input, other)


def _einsum(func: Any, dtype: torch.dtype, equation: str, *operands: Tensor) -> Tensor:
    left, _, product = equation.replace(" ", "").partition("->")
    a, _, b = left.partition(",")
    whole = set(a) <= set(b + product) and set(b) <= set(a + product)  # no index of one operand alone is summed away
    if len(operands) != 2 or "." in equation or not product or not whole:
        return by_float32(func, dtype, equation, *operands)
    return _multiply(_EINSUM, dtype, *operands, settings=(a, b, product))


def _convolve(
    func: Any, dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    if isinstance(padding, str):
        return by_float32(func, dtype, input, weight, bias, stride, padding, dilation, groups)
    dims = weight.ndim - 2
    steps = (list(step) if isinstance(step, Sequence) else [step] * dims for step in (stride, padding, dilation))
    return _multiply(_CONVOLUTION, dtype, input, weight, bias, settings=(*steps, False, [0] * dims, groups))


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolve),
    torch.einsum: _einsum,
}
