"""What learning without labels has in common: a ViT-like model, patches to hide, and a head that guesses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from .base import Model
from .deit import DeiT
from .hybrid import Hybrid
from .vit import ViT

GREY = 0.5  # of a hidden patch in a picture for the eye, on a scale of 0 to 1
_WHY_NOT = {
    "resnet": "has no patches as tokens", "bit": "has no patches as tokens", "cvt": "mixes patches by convolutions",
    "swin": "merges patches and needs whole windows of them", "mvit": "pools patches and needs whole grids of them",
    "hybrid": "mixes patches by convolutions", "x3d": "takes clips", "slowfast": "takes clips", "vivit": "takes clips",
    "timesformer": "takes clips",
}  # fmt: skip


class Shown(NamedTuple):
    """Pictures (b, c, h, w) on a scale of 0 to 1: as given, with patches hidden, and with the guesses in their place."""

    original: Tensor
    hidden: Tensor
    guessed: Tensor


class Pretext(nn.Module, ABC):
    """A model together with what trains it without labels; only the model is kept afterwards.

    forward(images, draws) gives {"loss", ...}, means over the pictures. What is hidden is decided by `draws`, uniform random
    numbers (b, patches, DRAWS) from `draw`, so that whoever calls decides how they are seeded. mean, std: of the preprocessing,
    on a scale of 0 to 1. Raises ValueError for a family that cannot be trained so, naming those that can, and for a share of
    hidden patches outside 0 to 1.
    """

    NAME: ClassVar[str]
    FAMILIES: ClassVar[tuple[str, ...]]
    DRAWS: ClassVar[int]  # random numbers per patch
    model: ViT | DeiT | Hybrid
    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, ratio: float, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if model.family not in self.FAMILIES or not isinstance(model, (ViT, DeiT, Hybrid)):
            reason = _WHY_NOT.get(model.family, "is no plain ViT")
            raise ValueError(
                f"objective {self.NAME} trains models of the families {', '.join(self.FAMILIES)}; {model.name or 'this model'} "
                f"({model.family}) {reason}; nearest: vit_tiny_patch16_224"
            )
        if not 0 < ratio < 1:
            raise ValueError(f"mask_ratio is {ratio:g}; allowed: above 0, below 1 (masked: 0.5, mae: 0.75)")
        self.model = model
        (height, width), (rows, columns) = model.config.image_size, model.config.grid
        if height % rows or width % columns or rows * columns < 2:
            raise ValueError(f"a picture of {height}x{width} pixels does not divide into {rows}x{columns} patches to hide")
        self.grid, self.patch = (rows, columns), (height // rows, width // columns)
        self.count = rows * columns
        self.hidden_count = min(max(round(ratio * self.count), 1), self.count - 1)
        self.channels = model.config.in_channels
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        # A classifier's parts that no patch goes through: left alone, so that every trained parameter gets a gradient.
        for idle in (self.vit.attention_pool, self.vit.mask_token):
            if idle is not None:
                idle.requires_grad_(False)

    @property
    def vit(self) -> ViT:
        """The transformer inside the model."""
        return self.model if isinstance(self.model, ViT) else self.model.backbone

    @property
    def input_shape(self) -> tuple[int, ...]:
        """That of the model."""
        return self.model.input_shape

    def draw(self, count: int, device: torch.device | str, generator: torch.Generator | None = None) -> Float[Tensor, "b n k"]:
        """The random numbers that decide what is hidden in `count` pictures."""
        return torch.rand(count, self.count, self.DRAWS, device=device, generator=generator)

    def draw_for(self, numbers: Sequence[int]) -> Float[Tensor, "b n k"]:
        """The random numbers of these samples of a data set, the same whenever and with whatever others they are asked for."""
        return torch.cat([self.draw(1, "cpu", torch.Generator().manual_seed(number)) for number in numbers])

    @property
    @abstractmethod
    def regression(self) -> bool:
        """Whether pixels are guessed, so that forward gives "loss" and "baseline", and not "loss" and "accuracy"."""

    @abstractmethod
    def forward(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"] | None = None) -> dict[str, Tensor]:
        """Means over the pictures: "loss", and what else says how good the guesses are. Without `draws` they are drawn."""

    @abstractmethod
    def show(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"]) -> Shown:
        """The pictures, what the model saw of them, and what it made of that."""

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Embedded patches (b, n, c), without positions, and their grid."""
        self.model.check_input(images)
        maps = self.model.maps(images) if isinstance(self.model, Hybrid) else images
        return self.vit.embed(maps)

    def encode(self, tokens: Tensor, grid: tuple[int, int, int], keep: Tensor | None = None) -> Tensor:
        """The prefix tokens and the patches (those of `keep` alone, if given) after the last block, normalised."""
        return self.vit.norm(self.vit.encode(tokens, grid, keep))

    def order(self, draws: Tensor) -> Tensor:
        """The patches of every picture in random order (b, n): the first `hidden_count` are hidden."""
        return draws[..., 0].argsort(1)

    def patches(self, images: Tensor) -> Float[Tensor, "b n p"]:
        """Pictures cut into patches, row by row, pixels of a patch row by row with channels innermost."""
        (rows, columns), (height, width) = self.grid, self.patch
        x = images.unflatten(2, (rows, height)).unflatten(4, (columns, width))  # b c rows height columns width
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def picture(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b c h w"]:
        """The inverse of `patches`."""
        x = patches.unflatten(2, (*self.patch, self.channels)).unflatten(1, self.grid)  # b rows columns height width c
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def scaled(self, images: Tensor) -> Tensor:
        """Normalised pictures on a scale of 0 to 1."""
        return (images * self.std + self.mean).clamp(0, 1)

    def own_state(self) -> dict[str, Tensor]:
        """The parameters that the model does not have."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `own_state`. Raises RuntimeError for parameters of other settings."""
        self.load_state_dict({**{f"model.{name}": t for name, t in self.model.state_dict().items()}, **state})

    def layer_ids(self) -> dict[str, int]:
        """Those of the model; what guesses at the depth of its head."""
        ids = self.model.layer_ids()
        last = max(ids.values())
        return {name: ids.get(name.removeprefix("model."), last) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Those of the model, and the mask token."""
        return {f"model.{name}" for name in self.model.no_weight_decay()} | {"mask_token"}

    def describe(self) -> str:
        """What is hidden and what is guessed, for a person."""
        return f"{self.hidden_count} of {self.count} patches of {self.patch[0]} x {self.patch[1]} pixels"


def rows_of(tokens: Shaped[Tensor, "b n c"], numbers: Tensor) -> Shaped[Tensor, "b m c"]:
    """The tokens with these numbers (b, m)."""
    return tokens.gather(1, numbers[..., None].expand(-1, -1, tokens.shape[2]))


def with_rows(tokens: Float[Tensor, "b n c"], numbers: Tensor, rows: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
    """A copy with these rows (b, m, c) at these numbers (b, m)."""
    index: Any = numbers[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.scatter(1, index, rows.to(tokens.dtype))
