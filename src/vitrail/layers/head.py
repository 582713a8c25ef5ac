"""From tokens to an embedding, and from an embedding to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .attention import AttentionSite, attend
from .block import MLP
from .features import Features


class AttentionPool(nn.Module):
    """Pooling by one learned query ("MAP head": Set Transformer, arXiv 1810.00825; big_vision's ViT)."""

    def __init__(self, width: int, heads: int, mlp_dim: int, norm_eps: float = 1e-6, activation: str = "gelu"):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.probe)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.site = AttentionSite()
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, norm_eps)
        self.mlp = MLP(width, mlp_dim, activation)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        """The query's answer, refined by a residual MLP."""
        b, n, c = tokens.shape
        d = c // self.heads
        q = self.q(self.probe).view(1, 1, self.heads, d).transpose(1, 2).expand(b, -1, -1, -1)
        k, v = self.kv(tokens).view(b, n, 2, self.heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(attend(q, k, v, site=self.site).transpose(1, 2).reshape(b, 1, c))
        return (x + self.mlp(self.norm(x)))[:, 0]


class ClassifierHead(nn.Module):
    """A linear classifier, optionally behind a tanh representation layer (ViT's pre-training head, section 3.1).

    The linear layer starts at zero, as in the paper's fine-tuning, with a constant bias if asked for. Without classes
    (num_classes = 0) the embedding passes through.
    """

    def __init__(self, width: int, num_classes: int, representation: int | None = None, bias: float = 0.0):
        super().__init__()
        self.representation = nn.Linear(width, representation) if representation else None
        self.linear = nn.Linear(representation or width, num_classes) if num_classes else nn.Identity()
        if isinstance(self.linear, nn.Linear):
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, bias)

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b k"]:
        """Logits (b, classes)."""
        return self.linear(self.represent(x))

    def represent(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b r"]:
        """What the linear layer sees ("pre-logits")."""
        return x if self.representation is None else torch.tanh(self.representation(x))


def window_means(features: Features, window: tuple[int, int, int]) -> Float[Tensor, "b p c"]:
    """Means of the map under a (T, H, W) window at all its positions, where a network is run fully convolutionally.

    A window larger than the map is cut to it.
    """
    t, h, w = (min(side, size) for side, size in zip(window, features.grid, strict=True))
    return F.avg_pool3d(features.maps(), (t, h, w), 1).flatten(2).transpose(1, 2)
