"""What every model of the package offers, and what the registry needs to know about a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.layers.embed import frames_problem, size_problem
from vitrail.layers.features import Features
from vitrail.layers.halves import recomputing
from vitrail.layers.route import Route, tile


class Model(nn.Module, ABC):
    """A classifier made of a backbone, a pooling and a head: forward(x) = head(pool(features(x))).

    `config` is the family's frozen dataclass; `name` the registry id ("" if built from a bare config); `card` what travels
    with the weights (labels, preprocessing, provenance), None for random weights.
    """

    family: ClassVar[str]
    normalised_stages: ClassVar[bool] = False  # whether every stage of pyramid(), not only the last, comes out normalised
    config: Any
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.card: Any = None
        self.checkpointing = False
        self.around_block: Callable[..., Tensor] | None = None
        self.frozen: tuple[str, ...] = ()  # submodules that stay in eval mode while the model trains

    def train(self, mode: bool = True) -> Model:  # type: ignore[override]
        """As for every module, but what is frozen stays in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    @abstractmethod
    def features(self, x: Tensor) -> Features:
        """Tokens of a normalised input, (b, c, h, w) or (b, c, t, h, w)."""

    def pyramid(self, x: Tensor) -> list[Features]:
        """One Features per stage, finest first; the last is features(x). A plain (single-scale) model has one."""
        return [self.features(x)]

    @abstractmethod
    def pool(self, features: Features) -> Tensor:
        """The embedding (b, c) that the head, probes and nearest neighbours use."""

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """Where recorded attention lies, step by step, for inputs of (height, width) or (frames, height, width).

        A model without attention has no steps.
        """
        return Route(tile((1, 1, 1), size))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (channels, height, width), or (channels, frames, height, width) of a model that takes clips."""
        return (self.config.in_channels, *self.config.image_size)

    @property
    def takes_clips(self) -> bool:
        """Whether an input is a clip (b, c, t, h, w) and not an image (b, c, h, w)."""
        return len(self.input_shape) == 4

    @property
    @abstractmethod
    def input_multiple(self) -> tuple[int, int]:
        """(height, width) that image sizes must be multiples of."""

    @property
    def frame_multiple(self) -> int:
        """What the number of frames of a clip must be a multiple of."""
        return 1

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError for another rank, another number of channels, or frames or sides that do not divide."""
        shape = self.input_shape
        if x.ndim != len(shape) + 1:
            wanted = "clips (b, c, t, h, w)" if self.takes_clips else "images (b, c, h, w)"
            raise ValueError(f"the model takes {wanted}, the input has shape {tuple(x.shape)}")
        if problem := size_problem((x.shape[-2], x.shape[-1]), self.input_multiple):
            raise ValueError(problem)
        if x.shape[1] != shape[0]:
            raise ValueError(f"the model takes {shape[0]} channels, the input has {x.shape[1]}")
        if self.takes_clips and (problem := frames_problem(x.shape[2], self.frame_multiple)):
            raise ValueError(problem)

    @abstractmethod
    def reset_head(self, num_classes: int) -> None:
        """Replace the classifier by a new one, zero-initialised."""

    @abstractmethod
    def layer_ids(self) -> dict[str, int]:
        """{parameter name: depth}: 0 for the stem up to L + 1 for the head, for layer-wise learning-rate decay."""

    @classmethod
    def replan(cls, built: Any, asked: Any) -> tuple[Any, list[str]]:
        """The config under which weights built for one config serve another one (input size, windows), and what to report."""
        return asked, []

    def refit(self, name: str, found: Tensor, built: Any) -> Tensor | None:
        """A checkpoint's tensor of another shape, built for config `built`, as this model needs it; None if there is no way."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Parameters that are no weights of a product: tokens and positions (one-dimensional ones go without saying)."""
        return set()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of a normalised input."""
        return self.head(self.pool(self.features(x)))

    def set_checkpointing(self, on: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        self.checkpointing = on

    def run_block(self, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """One block, recomputed in the backward pass where that is switched on; see `intercept_blocks`."""
        if self.around_block is not None:
            return self.around_block(block, x, *args)
        if self.checkpointing and self.training and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # which repeats the products that it traced
                return checkpoint(block, x, *args, use_reentrant=False)
            return checkpoint(block, x, *args, use_reentrant=False, context_fn=recomputing(x))
        return block(x, *args)


@contextmanager
def intercept_blocks(model: Model, around: Callable[..., Tensor]) -> Iterator[None]:
    """While inside, `around(name, block, x, *args)` is called in place of every `block(x, *args)` of a model.

    The way to read or change what blocks pass on, as attention's recorder is the way to its probabilities. A compiled model
    must be given as it was before compiling.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parts = [module for module in model.modules() if isinstance(module, Model)]
    try:
        for part in parts:
            part.around_block = lambda block, x, *args: around(names[id(block)], block, x, *args)
        yield
    finally:
        for part in parts:
            part.around_block = None


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth grows linearly from 0 to `rate` over the blocks (arXiv 1603.09382)."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
