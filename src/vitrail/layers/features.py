"""What a backbone hands out: tokens that know where they lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Tokens (b, prefix + T*H*W, c) in (T, H, W) order behind `prefix` class, distillation or register tokens.

    grid is (T, H, W), with T = 1 for an image. A NamedTuple, because torch.export cannot return a dataclass.
    """

    tokens: Tensor
    grid: tuple[int, int, int]
    prefix: int

    @property
    def patches(self) -> Tensor:
        """The tokens without the prefix, (b, T*H*W, c)."""
        return self.tokens[:, self.prefix :]

    def maps(self) -> Tensor:
        """The patch tokens laid out as they lie in the input, (b, c, T, H, W)."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)
