"""Convolution parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

ReLU = partial(nn.ReLU, inplace=True)  # what it overwrites (a normalised map, a sum) is needed by nobody else


class ConvNorm(nn.Module):
    """Bias-free convolution, batch normalisation and, unless `act` is None, an activation.

    `fold()` merges the normalisation into the convolution for inference.
    """

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, act: Callable[[], nn.Module] | None = ReLU, groups: int = 1
    ):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(cout)
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, cin, h, w) to (b, cout, h', w')."""
        return self.act(self.norm(self.conv(x)))

    def fold(self) -> None:
        """Replace convolution and normalisation by one convolution of the same function in eval mode."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = nn.utils.fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()
