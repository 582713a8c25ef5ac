"""Masked patch prediction (Dosovitskiy et al., arXiv 2010.11929, section 4.6 and appendix B.1.2).

Half of the patch embeddings are corrupted: 80 % become a learned mask token, 10 % the embedding of another patch, 10 % stay.
From the last layer's token of every corrupted patch one linear layer guesses what the patch was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .base import Model
from .hybrid import Hybrid
from .pretext import GREY, Pretext, Shown, rows_of, with_rows

RATIO = 0.5
MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest is kept
TARGETS = ("colour", "colours", "pixels")
LEVELS = 8  # 3 bits a channel
CELLS = 4  # a patch downsized to 4 x 4


class Corruption(NamedTuple):
    """What becomes of every patch: `order` has the corrupted ones first; `source` is another patch of the same picture."""

    order: Int[Tensor, "b n"]
    masked: Bool[Tensor, "b n"]
    swapped: Bool[Tensor, "b n"]
    source: Int[Tensor, "b n"]


class MaskedPatches(Pretext):
    """A model that guesses corrupted patches.

    target: `colour`, the mean colour of a patch in 3 bits a channel (512 classes for three channels); `colours`, those of the
    patch downsized to 4 x 4, at once; `pixels`, the whole patch by regression of the normalised values (L2). forward gives the
    "loss" and the "accuracy" of the corrupted patches' classes, or for pixels the "baseline", the loss of answering zero.

    A hybrid's tokens have seen their neighbours' pixels, so there a patch is hidden (or exchanged) in the picture too. Raises
    ValueError for other families, another target, and colours of more than four channels or of patches under 4 x 4 pixels.
    """

    NAME = "masked"
    FAMILIES = ("vit", "deit", "hybrid")
    DRAWS = 3

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float], target: str = "colour", ratio: float = RATIO):
        super().__init__(model, ratio, mean, std)
        if target not in TARGETS:
            raise ValueError(f"mask_target is {target!r}; allowed: {', '.join(TARGETS)}")
        if target != "pixels" and self.channels > 4:
            raise ValueError(
                f"{self.channels} channels of 3 bits are {LEVELS**self.channels:,} colours; use mask_target pixels"
            )
        if target == "colours" and min(self.patch) < CELLS:
            raise ValueError(f"patches of {self.patch} pixels cannot be downsized to 4 x 4; use mask_target colour or pixels")
        self.target, self.colours = target, LEVELS**self.channels
        pixels = self.patch[0] * self.patch[1] * self.channels
        outputs = {"colour": self.colours, "colours": CELLS**2 * self.colours, "pixels": pixels}[target]
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.vit.config.width))
        self.head = nn.Linear(self.vit.config.width, outputs)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def regression(self) -> bool:
        """Whether pixels are guessed, and not classes."""
        return self.target == "pixels"

    def forward(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"] | None = None) -> dict[str, Tensor]:
        """{"loss", "accuracy"}, or {"loss", "baseline"} for pixels; in float32 whatever the model computes in."""
        draws = self.draw(len(images), images.device) if draws is None else draws
        corruption = self.corruption(draws)
        guesses = self.guess(images, corruption).float()
        truth = rows_of(self.truth(images), corruption.order[:, : self.hidden_count])
        if self.target == "pixels":
            return {"loss": F.mse_loss(guesses, truth), "baseline": truth.square().mean()}
        scores = guesses.unflatten(2, (-1, self.colours))  # b m cells colours
        right = (scores.detach().argmax(3) == truth).float().mean()
        return {"loss": F.cross_entropy(scores.flatten(0, 2), truth.flatten()), "accuracy": right}

    def corruption(self, draws: Float[Tensor, "b n k"]) -> Corruption:
        """Exactly `hidden_count` patches of every picture; each of them is masked, swapped or kept with its own probability."""
        order = self.order(draws)
        corrupted = torch.zeros_like(draws[..., 0], dtype=torch.bool).scatter(1, order[:, : self.hidden_count], True)
        kind = draws[..., 1]
        masked, swapped = kind < MASKED, (kind >= MASKED) & (kind < MASKED + SWAPPED)
        steps = (draws[..., 2] * (self.count - 1)).long().clamp(max=self.count - 2) + 1  # never 0, never all the way round
        source = (torch.arange(self.count, device=draws.device) + steps) % self.count
        return Corruption(order, corrupted & masked, corrupted & swapped, source)

    def guess(self, images: Tensor, corruption: Corruption) -> Float[Tensor, "b m o"]:
        """The head's answer for every corrupted patch, in the order of `corruption.order`."""
        if isinstance(self.model, Hybrid):
            images = self.corrupted(images, corruption, torch.zeros_like(self.mean))
        tokens, grid = self.tokens(images)
        if not isinstance(self.model, Hybrid):
            tokens = torch.where(corruption.swapped[..., None], rows_of(tokens, corruption.source), tokens)
        tokens = torch.where(corruption.masked[..., None], self.mask_token.to(tokens.dtype), tokens)
        patches = self.encode(tokens, grid)[:, -self.count :]
        return self.head(rows_of(patches, corruption.order[:, : self.hidden_count]))

    def corrupted(self, images: Tensor, corruption: Corruption, filling: Tensor) -> Tensor:
        """The pictures with masked patches filled and swapped ones exchanged."""
        patches = self.patches(images)
        blank = self.patches(filling.expand_as(images))
        patches = torch.where(corruption.swapped[..., None], rows_of(patches, corruption.source), patches)
        return self.picture(torch.where(corruption.masked[..., None], blank, patches))

    @torch.no_grad()
    def truth(self, images: Float[Tensor, "b c h w"]) -> Tensor:
        """What every patch is: class numbers (b, n, cells), or normalised pixels (b, n, p)."""
        if self.target == "pixels":
            return self.patches(images.float())
        cells = 1 if self.target == "colour" else CELLS
        patches = self.patches(self.scaled(images.float())).unflatten(2, (*self.patch, self.channels))
        means = F.adaptive_avg_pool2d(patches.flatten(0, 1).movedim(3, 1), cells)  # (b n) c cells cells
        # Values on the edge of a level must not fall below it by the rounding of the normalisation.
        levels = (means * 255 / (256 // LEVELS) + 1e-4).long().clamp(0, LEVELS - 1)
        weights = LEVELS ** torch.arange(self.channels - 1, -1, -1, device=images.device)
        return (levels.flatten(2) * weights[:, None]).sum(1).unflatten(0, (len(images), self.count))

    @torch.no_grad()
    def show(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"]) -> Shown:
        """Guessed colours are drawn as the middle of their level."""
        corruption = self.corruption(draws)
        guesses = self.guess(images, corruption).float()
        if self.target == "pixels":
            pixels = self.patches(self.scaled(self.picture(self._spread(guesses, corruption))))
        else:
            pixels = self._spread(self._coloured(guesses), corruption)
        original = self.scaled(images.float())
        hidden = torch.zeros_like(corruption.masked).scatter(1, corruption.order[:, : self.hidden_count], True)
        guessed = self.picture(torch.where(hidden[..., None], pixels, self.patches(original)))
        return Shown(original, self.corrupted(original, corruption, torch.full_like(self.mean, GREY)), guessed)

    def _coloured(self, guesses: Tensor) -> Tensor:
        """Patches of the likeliest colours (b, m, p) on a scale of 0 to 1."""
        numbers = guesses.unflatten(2, (-1, self.colours)).argmax(3)  # b m cells
        weights = LEVELS ** torch.arange(self.channels - 1, -1, -1, device=guesses.device)
        shades = (numbers[..., None] // weights % LEVELS + 0.5) / LEVELS  # b m cells c
        side = round(numbers.shape[2] ** 0.5)
        maps = shades.flatten(0, 1).unflatten(1, (side, side)).movedim(3, 1)
        return F.interpolate(maps, self.patch, mode="nearest").movedim(1, 3).flatten(1).unflatten(0, guesses.shape[:2])

    def _spread(self, patches: Tensor, corruption: Corruption) -> Tensor:
        """Patches of the corrupted places among empty ones (b, n, p)."""
        empty = patches.new_zeros(len(patches), self.count, patches.shape[2])
        return with_rows(empty, corruption.order[:, : self.hidden_count], patches)

    def describe(self) -> str:
        """What is hidden and what is guessed, for a person."""
        what = {
            "colour": f"their mean colour, one of {self.colours}",
            "colours": f"their 4 x 4 colours, each one of {self.colours}",
            "pixels": "their pixels (L2)",
        }[self.target]
        return f"masked patch prediction, {super().describe()} corrupted; guessed: {what}"
