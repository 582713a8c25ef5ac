from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.layers import conv as layers_conv
from vitrail.layers.conv import ConvNorm, convolve


@pytest.mark.parametrize(("size", "stride"), [((9, 6), 2), ((8, 7), 2), ((7, 10), 3)])
def test_the_way_round_a_slow_kernel_is_the_same_function(
    size: tuple[int, int], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_conv, "LACKING", frozenset())  # a CPU that lacks the type has another way round
    conv = nn.Conv2d(6, 6, 3, stride, 1, groups=6).bfloat16()
    x = torch.randn(2, 6, *size).bfloat16().requires_grad_()
    y = convolve(conv, x)
    assert y.grad_fn.name() != "ConvolutionBackward0", "the convolution itself was strided"
    assert y.shape == conv(x).shape
    cotangent = torch.randn(y.shape).bfloat16()
    wanted = torch.autograd.grad(conv(x), (x, conv.weight, conv.bias), cotangent)
    for got, want in zip(torch.autograd.grad(y, (x, conv.weight, conv.bias), cotangent), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=0.05, rtol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(convolve(conv, x), y, atol=0.02, rtol=0.02)


def test_folding_twice_is_folding_once() -> None:
    part = ConvNorm(4, 4, 3, 2, act=None, groups=4)
    part(torch.randn(8, 4, 9, 9))
    x = torch.randn(2, 4, 9, 7)
    wanted = part.eval()(x)
    part.fold()
    part.fold()
    assert isinstance(part.norm, nn.Identity)
    torch.testing.assert_close(part(x), wanted, atol=1e-5, rtol=1e-5)
