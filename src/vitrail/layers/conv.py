"""Convolution parts, for pictures and clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.halves import LACKING, by_float32, lacking_type
from vitrail.layers.norm import in_float32_on_cpu, normalise

ReLU = partial(nn.ReLU, inplace=True)  # what it overwrites (a normalised map, a sum) is needed by nobody else
Volume = tuple[int, int, int]


class ConvNorm(nn.Module):
    """Bias-free convolution, batch normalisation (unless `norm` is off) and, unless `act` is None, an activation.

    A kernel of one number makes it two-dimensional, of three (time, height, width) three-dimensional; the padding keeps the
    size up to the stride. `fold()` merges the normalisation into the convolution for inference.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int | Volume,
        stride: int | Volume = 1,
        act: Callable[[], nn.Module] | None = ReLU,
        groups: int = 1,
        norm: bool = True,
    ):
        super().__init__()
        if isinstance(kernel, int):
            assert isinstance(stride, int)
            self.conv: nn.Conv2d | nn.Conv3d = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
            self.norm: nn.Module = nn.BatchNorm2d(cout)
        else:
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            self.conv = nn.Conv3d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
            self.norm = nn.BatchNorm3d(cout)
        if not norm:
            self.norm = nn.Identity()
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, cin, [t,] h, w) to (b, cout, [t',] h', w')."""
        return self.act(normalise(self.norm, convolve(self.conv, x)))

    def fold(self) -> None:
        """Replace convolution and normalisation by one convolution of the same function in eval mode."""
        if isinstance(self.norm, (nn.BatchNorm2d, nn.BatchNorm3d)):
            self.conv = nn.utils.fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class StdConv2d(nn.Conv2d):
    """Bias-free convolution whose kernels are standardised over their inputs (weight standardisation, arXiv 1903.10520).

    `rule` says where `eps` guards the division: (w - mean) / sqrt(variance + eps) under "variance" (BiT, timm, transformers),
    / (deviation + eps) under "deviation" (the hybrids of Google's vision_transformer). `padding` is "symmetric" (half the
    kernel on each side) or "same" (TensorFlow's: the odd one of an odd total goes to the right and the bottom).

    Without gradients the standardised kernel is kept until the weight changes (what torch does not count as a change, such as
    `weight.data.mul_()`, needs a call of `eval()`); `fold()` makes it the weight for good.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        stride: int = 1,
        *,
        eps: float,
        rule: str = "variance",
        padding: str = "symmetric",
    ):
        super().__init__(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.eps, self.rule = eps, rule
        self.same = padding == "same" and stride > 1  # at stride 1 an odd kernel is padded alike under both
        self.folded = False
        self.kept: tuple[Tensor, int, Tensor] | None = None  # the weight's memory, its version, and the kernel made of it

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Convolution with the standardised kernel."""
        padding = self.padding
        if self.same:
            x, padding = _pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.effective_weight(), None, self.stride, padding)

    def effective_weight(self) -> Tensor:
        """The standardised kernel: computed where a gradient or a compiler needs the computation, else kept."""
        weight = self.weight
        if self.folded:
            return weight
        if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or weight.is_inference():
            return self.standardise(weight)  # traced, or replaced for one call
        if torch.is_grad_enabled() and weight.requires_grad:
            self.kept = None
            return self.standardise(weight)
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if self.kept is not None:
            memory, version, kernel = self.kept  # holding the memory, so that its address cannot be given to another weight
            same_memory = memory.data_ptr() == weight.data_ptr() and memory.stride() == weight.stride()
            if same_memory and version == weight._version and kernel.dtype == dtype:
                return kernel
        with torch.inference_mode(False), torch.no_grad():
            kernel = self.standardise(weight).to(dtype)
            self.kept = (weight.detach(), weight._version, kernel)
        return kernel

    def standardise(self, weight: Float[Tensor, "d c i j"]) -> Float[Tensor, "d c i j"]:
        """Zero mean and unit (biased) variance over inputs and positions, in the weight's own memory order."""
        last = weight.is_contiguous(memory_format=torch.channels_last)
        order, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if last else ((0, 1, 2, 3), (0, 1, 2, 3))
        ordered = weight.permute(order)
        rows = ordered.flatten(1)
        if self.rule == "variance":
            rows = F.layer_norm(rows, rows.shape[1:], eps=self.eps)
        else:
            variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
            rows = (rows - mean) / (variance.sqrt() + self.eps)
        return rows.view(ordered.shape).permute(back)

    def fold(self) -> None:
        """Make the standardised kernel the weight: the same function, for inference."""
        if not self.folded:
            with torch.no_grad():
                self.weight.copy_(self.standardise(self.weight))
            self.folded, self.kept = True, None

    def train(self, mode: bool = True) -> StdConv2d:
        """Switch the mode, and forget the kept kernel."""
        self.kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StdConv2d:
        self.kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the kept kernel."""
        return {**self.__dict__, "kept": None}


def _pad_same(x: Tensor, kernel: int, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """The input, padded if it must be, and the symmetric padding left to the convolution."""
    totals = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]]
    if all(total % 2 == 0 for total in totals):
        return x, (totals[0] // 2, totals[1] // 2)
    (top, left), (height, width) = [total // 2 for total in totals], totals
    return F.pad(x, (left, width - left, top, height - top)), (0, 0)


def max_pool_same(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """3x3 max pooling of stride 2 under TensorFlow's "SAME" padding, which never wins: odd sides get one row on each side,
    even ones a single row at the end, where `ceil_mode` lets the last window reach out.
    """
    return F.max_pool2d(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)


def convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x), by the fast way round a slow kernel.

    On a CPU the backward pass of a strided depth-wise convolution in bfloat16 takes 20 to 50 times as long as the unstrided
    one's (torch 2.15: 47 ms against 2 ms for (8, 384, 14, 14), stride 2): there, every cell is computed and the wanted ones
    are kept. For clips see `depthwise3d`.
    """
    if isinstance(conv, nn.Conv3d):
        if conv.groups == conv.in_channels == conv.out_channels > 1 and isinstance(conv.padding, tuple):
            return depthwise3d(x, conv.weight, conv.bias, conv.stride, conv.padding)  # type: ignore[arg-type]
        return conv(x)
    strided = conv.groups == conv.in_channels > 1 and conv.stride != (1, 1)
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dtype not in LACKING
    if strided and slow and x.requires_grad and torch.is_grad_enabled():
        y = F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, conv.groups)
        return y[:, :, :: conv.stride[0], :: conv.stride[1]].contiguous(memory_format=torch.channels_last)
    return conv(x)


def depthwise3d(
    x: Float[Tensor, "b c t h w"],
    weight: Float[Tensor, "c 1 i j k"],
    bias: Float[Tensor, " c"] | None,
    stride: Volume,
    padding: Volume,
) -> Float[Tensor, "b c u v w2"]:
    """Depthwise convolution of clips, one kernel per channel, by the fast way round slow kernels.

    In float32 on a CPU (torch 2.15, AVX2, channels innermost, one thread) torch's gradients take ten times as long as its
    convolution or more, 24 + 61 ms after 3 ms for (32, 54, 8, 8, 8); here they are the convolution with the turned kernel and,
    step by step in time, convolutions of two dimensions: 13 ms. A kernel over time alone takes 120 ms for (2, 24, 13, 80, 80);
    here it is a sum of weighted frames: 30 ms.
    """
    if type(x) is Tensor and (dtype := lacking_type(x)) is not None:
        return by_float32(depthwise3d, dtype, x, weight, bias, stride, padding)
    same_frames = stride[0] == 1 and 2 * padding[0] + 1 == weight.shape[2]
    real = type(x) is Tensor and not torch.compiler.is_compiling()  # traced or counted, the operation is torch's own
    if not (same_frames and real and in_float32_on_cpu(x)):
        return F.conv3d(x, weight, bias, stride, padding, 1, x.shape[1])
    if weight.shape[3:] == (1, 1) and stride == (1, 1, 1) and padding[1:] == (0, 0):
        y = _OverTime.apply(x, weight)
        return y if bias is None else y + bias[:, None, None, None]
    if bias is None:
        return _Depthwise3d.apply(x, weight, stride, padding)
    return F.conv3d(x, weight, bias, stride, padding, 1, x.shape[1])  # a folded one, which does not learn


def _overlaps(kernel: int, frames: int) -> Iterator[tuple[int, slice, slice]]:
    """(step of a kernel over time, frames that it sees, frames that it answers), where there are any."""
    for tap in range(kernel):
        shift = tap - kernel // 2
        if abs(shift) < frames:
            yield tap, slice(max(shift, 0), frames + min(shift, 0)), slice(max(-shift, 0), frames - max(shift, 0))


def weighted_frames(x: Float[Tensor, "b c t h w"], weight: Float[Tensor, "c 1 i 1 1"]) -> Float[Tensor, "b c t h w"]:
    """Depthwise convolution over time alone, as a sum over the kernel's steps."""
    found = x * weight[:, 0, weight.shape[2] // 2, :, :, None]
    for tap, seen, answered in _overlaps(weight.shape[2], x.shape[2]):
        if tap != weight.shape[2] // 2:
            found[:, :, answered].addcmul_(x[:, :, seen], weight[:, 0, tap, :, :, None])
    return found


class _OverTime(torch.autograd.Function):
    """`weighted_frames` with its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return weighted_frames(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for tap, seen, answered in _overlaps(weight.shape[2], x.shape[2]) if of_weight is not None else ():
            of_weight[:, 0, tap, 0, 0] = (grad[:, :, answered] * x[:, :, seen]).sum((0, 2, 3, 4))  # type: ignore[index]
        return weighted_frames(grad, weight.flip(2)) if ctx.needs_input_grad[0] else None, of_weight


class _Depthwise3d(torch.autograd.Function):
    """A depthwise convolution that keeps the number of frames, with its gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: Volume, padding: Volume) -> Tensor:
        return F.conv3d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Volume, Volume], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[2:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.geometry
        b, c, t, h, w = x.shape
        of_input, of_kernel = ctx.needs_input_grad[:2]
        of_x, of_weight = None, torch.zeros_like(weight) if of_kernel else None
        if of_input and stride == (1, 1, 1) and all(2 * p + 1 == k for p, k in zip(padding, weight.shape[2:], strict=True)):
            of_x, of_input = F.conv3d(grad, weight.flip(2, 3, 4), None, 1, padding, 1, c), False
        frames = torch.zeros(b, t, h, w, c, dtype=x.dtype) if of_input else None
        for tap, seen, answered in _overlaps(weight.shape[2], t) if of_input or of_kernel else ():
            part_x, part_w, _ = torch.ops.aten.convolution_backward(
                _pictures(grad[:, :, answered]), _pictures(x[:, :, seen]), weight[:, :, tap], None, stride[1:], padding[1:],
                (1, 1), False, (0, 0), c, (of_input, of_kernel, False),
            )  # fmt: skip
            if frames is not None:
                frames[:, seen] += part_x.permute(0, 2, 3, 1).reshape(b, -1, h, w, c)
            if of_weight is not None:
                of_weight[:, :, tap] = part_w
        return of_x if frames is None else frames.permute(0, 4, 1, 2, 3), of_weight, None, None


def _pictures(clips: Float[Tensor, "b c t h w"]) -> Float[Tensor, "n c h w"]:
    """Frames as pictures, channels innermost."""
    return clips.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
