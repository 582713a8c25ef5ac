"""A masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377).

The encoder sees a quarter of the patches; a small decoder gets its tokens, with a learned mask token in every hidden place, and
guesses the hidden patches' pixels. Only the encoder is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.block import Block, BlockConfig, init_encoder
from vitrail.layers.position import PositionConfig, PositionTable

from .base import Model
from .pretext import GREY, Pretext, Shown, rows_of, with_rows

RATIO = 0.75
EPS = 1e-6  # beside the variance of a patch


class MaskedAutoencoder(Pretext):
    """A model that guesses the pixels of hidden patches from the visible ones.

    The loss is the mean squared error of the hidden patches' pixels, which `patch_norm` normalises patch by patch. width, depth
    and heads are the decoder's; a width of 0 is half of the encoder's. forward gives "loss" and "baseline", the loss of
    always answering zero (about 1 with `patch_norm`). Raises ValueError for families other than ViT and DeiT, for relative
    positions, and for widths that do not divide.
    """

    NAME = "mae"
    FAMILIES = ("vit", "deit")
    DRAWS = 1

    def __init__(
        self,
        model: Model,
        mean: Sequence[float],
        std: Sequence[float],
        ratio: float = RATIO,
        *,
        width: int = 0,
        depth: int = 2,
        heads: int = 0,
        patch_norm: bool = True,
    ):
        super().__init__(model, ratio, mean, std)
        c = self.vit.config
        if c.position.kind == "relative":
            raise ValueError("objective mae leaves patches out, which relative positions do not allow; use 1d, 2d or sincos")
        heads = heads or c.heads
        width = width or max(round(c.width / 2 / (4 * heads)), 1) * 4 * heads  # sine-cosine positions need fours
        if width % heads or width % 4:
            step = 4 * heads
            raise ValueError(
                f"decoder_width {width} is not divisible by decoder_heads {heads} and by 4; "
                f"nearest valid: {max(round(width / step), 1) * step}"
            )
        self.patch_norm, self.depth = patch_norm, depth
        self.enter = nn.Linear(c.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = PositionTable(PositionConfig("sincos"), width, self.grid, 0)
        shared = BlockConfig(width, heads, 4 * width, c.norm_eps, c.activation)
        self.blocks = nn.ModuleList(Block(shared) for _ in range(depth))
        self.norm = nn.LayerNorm(width, c.norm_eps)
        self.guesser = nn.Linear(width, self.patch[0] * self.patch[1] * self.channels)
        for part in (self.enter, self.blocks, self.guesser):
            init_encoder(nn.ModuleList([part]))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def regression(self) -> bool:
        """Always: pixels are guessed."""
        return True

    def forward(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"] | None = None) -> dict[str, Tensor]:
        """{"loss", "baseline"} over the hidden patches, in float32 whatever the model computes in."""
        draws = self.draw(len(images), images.device) if draws is None else draws
        order = self.order(draws)
        guesses = self.guess(images, order).float()
        truth = rows_of(self.truth(images)[0], order[:, : self.hidden_count])
        return {"loss": (guesses - truth).square().mean(), "baseline": truth.square().mean()}

    def guess(self, images: Tensor, order: Tensor) -> Float[Tensor, "b m p"]:
        """The decoder's answer for the hidden patches, the first ones of `order`."""
        hidden, keep = order[:, : self.hidden_count], order[:, self.hidden_count :]
        tokens, grid = self.tokens(images)
        seen = self.enter(self.encode(tokens, grid, keep))  # prefix and visible patches
        prefix, visible = seen[:, : -keep.shape[1]], seen[:, -keep.shape[1] :]
        everywhere = self.mask_token.to(seen.dtype).expand(len(images), self.count, -1)
        patches = with_rows(everywhere, keep, visible) + self.position(self.grid)[1]
        x = torch.cat([prefix, patches], 1)
        for block in self.blocks:
            x = self.model.run_block(block, x)
        return self.guesser(self.norm(rows_of(x[:, -self.count :], hidden)))

    @torch.no_grad()
    def truth(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """What is guessed of every patch (b, n, p), and the shift and scale (b, n, 1) that give its pixels back."""
        patches = self.patches(images.float())
        if not self.patch_norm:
            return patches, torch.zeros_like(patches[..., :1]), torch.ones_like(patches[..., :1])
        mean, spread = patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + EPS).sqrt()
        return (patches - mean) / spread, mean, spread

    @torch.no_grad()
    def show(self, images: Float[Tensor, "b c h w"], draws: Float[Tensor, "b n k"]) -> Shown:
        """Guesses of normalised patches get the true patch's mean and contrast, which the model does not guess."""
        order = self.order(draws)
        hidden = order[:, : self.hidden_count]
        _, mean, spread = self.truth(images)
        guesses = self.guess(images, order).float() * rows_of(spread, hidden) + rows_of(mean, hidden)
        original = self.scaled(images.float())
        pixels = with_rows(self.patches(images.float()), hidden, guesses)
        blank = with_rows(self.patches(original), hidden, torch.full_like(guesses, GREY))
        return Shown(original, self.picture(blank), self.scaled(self.picture(pixels)))

    def describe(self) -> str:
        """What is hidden and what is guessed, for a person."""
        what = "their pixels, each patch normalised" if self.patch_norm else "their pixels"
        decoder = f"decoder {self.depth} x {self.mask_token.shape[2]}"
        return f"masked autoencoder, {super().describe()} hidden; guessed: {what}; {decoder}"
