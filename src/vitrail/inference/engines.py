"""A trained model made ready to answer: a private copy, folded, in the device's fast precision and layout."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitrail.config import Preprocess
from vitrail.cost import DTYPES, memory_format
from vitrail.data.transforms import Normalise
from vitrail.layers.conv import ConvNorm, StdConv2d
from vitrail.layers.halves import half_products
from vitrail.models import Model

M = TypeVar("M", bound=nn.Module)


def fold_batchnorm(model: M) -> M:
    """A copy in eval mode of the same function: batch norms and weight standardisations are part of the convolutions."""
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, (ConvNorm, StdConv2d)):
            module.fold()
    return folded


class Engine:
    """Answers batches of uint8 pictures (b, c, h, w) or clips (b, c, t, h, w) with float32 scores (b, k) on the CPU.

    The model given is left as it is. In half precision the copy's weights are converted once, where autocast would convert
    them at every call; normalisation of pixels stays in float32.
    """

    def __init__(self, model: Model, preprocess: Preprocess, device: torch.device, precision: str):
        self.device, self.dtype = device, DTYPES[precision]
        self.normalise = Normalise(preprocess).to(device)
        prepared = fold_batchnorm(model).requires_grad_(False).to(device, self.dtype)
        self.layout = memory_format(prepared, precision)
        self.model = prepared.to(memory_format=self.layout)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "b c *t h w"]) -> Float[Tensor, "b k"]:
        """Raw scores."""
        x = self.normalise(images.to(self.device, non_blocking=True)).to(self.dtype, memory_format=self.layout)
        with half_products(self.dtype, self.device.type):
            return self.model(x).float().cpu()
