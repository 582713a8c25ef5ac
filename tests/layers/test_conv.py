"""Convolutions: weight standardisation (rules, padding, a kept kernel that is never stale); depthwise ones of clips."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers.conv import StdConv2d, depthwise3d, max_pool_same


def by_formula(weight: torch.Tensor, eps: float, rule: str) -> torch.Tensor:
    rows = weight.double().flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    scale = (variance + eps).sqrt() if rule == "variance" else variance.sqrt() + eps
    return (centred / scale).view_as(weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("rule", "eps"), [("variance", 1e-2), ("deviation", 1e-1)])
def test_standardisation_rules(rule: str, eps: float, layout: torch.memory_format) -> None:
    conv = StdConv2d(5, 6, 3, eps=eps, rule=rule).to(memory_format=layout)
    want = by_formula(conv.weight, eps, rule)
    torch.testing.assert_close(conv.standardise(conv.weight).double(), want, atol=1e-6, rtol=1e-5)
    assert conv.standardise(conv.weight).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 11)])
def test_same_padding_puts_the_odd_one_last(kernel: int, size: tuple[int, int]) -> None:
    conv = StdConv2d(2, 3, kernel, 2, eps=1e-8, padding="same")
    x = torch.randn(1, 2, *size)
    totals = [max((-(-side // 2) - 1) * 2 + kernel - side, 0) for side in size]
    (h, w) = totals
    padded = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
    got = conv(x)
    assert got.shape[2:] == (-(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(got, F.conv2d(padded, conv.standardise(conv.weight), stride=2))


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 11), (5, 6)])
def test_same_pooling_ignores_the_border(size: tuple[int, int]) -> None:
    x = -torch.rand(1, 2, *size) - 1  # negative: padded zeros would win
    h, w = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in size]
    padded = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2), value=-torch.inf)
    torch.testing.assert_close(max_pool_same(x), F.max_pool2d(padded, 3, 2))


def in_inference_mode(conv: StdConv2d) -> None:
    with torch.inference_mode():
        conv.weight.mul_(torch.rand_like(conv.weight))


CHANGES = {
    "in place": lambda conv: conv.weight.mul_(torch.rand_like(conv.weight)),
    "averaged": lambda conv: torch._foreach_lerp_([conv.weight.detach()], [torch.randn_like(conv.weight)], 0.5),
    "in inference mode": in_inference_mode,
    "behind torch's back": lambda conv: conv.weight.data.mul_(torch.rand_like(conv.weight)) is conv.eval(),
    "optimiser": lambda conv: torch.optim.SGD(conv.parameters(), 1.0).step() or None,
    "replaced": lambda conv: setattr(conv, "weight", torch.nn.Parameter(torch.randn_like(conv.weight))),
    "data replaced": lambda conv: setattr(conv.weight, "data", torch.randn_like(conv.weight)),
    "loaded": lambda conv: conv.load_state_dict({"weight": torch.randn_like(conv.weight)}),
    "converted": lambda conv: conv.double().float(),
    "layout": lambda conv: conv.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_kernel_follows_the_weight(change: str, mode) -> None:
    conv, x = StdConv2d(3, 4, 3, eps=1e-8).eval(), torch.randn(2, 3, 6, 6)
    conv.weight.grad = torch.randn_like(conv.weight)
    with mode():
        conv(x)
        kept = conv.effective_weight()
        assert conv.effective_weight() is kept  # computed once
    with torch.no_grad():
        CHANGES[change](conv)
    with mode():
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.standardise(conv.weight), padding=1))
        with torch.autocast("cpu", torch.bfloat16):
            assert conv.effective_weight().dtype == torch.bfloat16
        assert conv.effective_weight().dtype == torch.float32


def test_gradients_flow_through_the_standardisation() -> None:
    conv, x = StdConv2d(3, 4, 3, eps=1e-8).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        conv(x)
    assert torch.autograd.gradcheck(
        lambda w: F.conv2d(x, conv.standardise(w)), (torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True),)
    )
    conv(x).square().sum().backward()
    assert conv.kept is None
    row = conv.weight.grad.flatten(1)  # standardised kernels do not change when all of a kernel's weights move together
    torch.testing.assert_close(row.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-8, rtol=0)


def test_kept_kernel_serves_frozen_weights_with_gradients_of_the_input() -> None:
    conv = StdConv2d(3, 4, 3, eps=1e-8).requires_grad_(False)
    with torch.inference_mode():
        conv(torch.randn(1, 3, 6, 6))
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_folding_and_copying() -> None:
    conv, x = StdConv2d(3, 4, 3, eps=1e-8), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = conv(x)
        twin = copy.deepcopy(conv)
        assert twin.kept is None
        conv.fold()
        conv.fold()
        torch.testing.assert_close(conv(x), before)
        torch.testing.assert_close(twin(x), before)
        assert conv.effective_weight() is conv.weight


@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [
        ((2, 6, 5, 8, 9), (3, 3, 3), (1, 1, 1)),
        ((2, 6, 5, 8, 9), (3, 3, 3), (1, 2, 2)),
        ((1, 6, 1, 7, 7), (3, 3, 3), (1, 4, 4)),  # no frame before or after the only one
        ((2, 6, 5, 4, 4), (5, 1, 1), (1, 1, 1)),
        ((1, 6, 2, 4, 4), (5, 1, 1), (1, 1, 1)),  # fewer frames than the kernel reaches
        ((2, 6, 6, 8, 8), (3, 3, 3), (2, 2, 2)),  # frames are lost: torch's own way
        ((1, 6, 5, 8, 8), (1, 3, 3), (1, 1, 1)),
    ],
)
def test_depthwise_convolution_of_clips_has_torchs_values_and_gradients(shape, kernel, stride, innermost: bool) -> None:
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    x, weight, bias = torch.randn(shape), torch.randn(shape[1], 1, *kernel), torch.randn(shape[1])
    if innermost:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    for with_bias in (False, True):
        found, wanted = [], []
        for dtype, results in ((torch.float32, found), (torch.float64, wanted)):
            inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)[: 2 + with_bias]]
            if dtype is torch.float32:
                y = depthwise3d(inputs[0], inputs[1], inputs[2] if with_bias else None, stride, padding)
                with torch.no_grad():
                    again = depthwise3d(inputs[0], inputs[1], inputs[2] if with_bias else None, stride, padding)
                torch.testing.assert_close(again, y)
            else:
                y = F.conv3d(inputs[0], inputs[1], inputs[2] if with_bias else None, stride, padding, 1, shape[1])
            results += [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs)]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for_are_computed() -> None:
    x, weight = torch.randn(1, 4, 3, 6, 6), torch.randn(4, 1, 3, 3, 3)
    for stride in ((1, 1, 1), (1, 2, 2)):
        for chosen in (x, weight):
            chosen.requires_grad_()
            (gradient,) = torch.autograd.grad(depthwise3d(x, weight, None, stride, (1, 1, 1)).sum(), [chosen])
            (wanted,) = torch.autograd.grad(F.conv3d(x, weight, None, stride, 1, 1, 4).sum(), [chosen])
            torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
            chosen.requires_grad_(False)
