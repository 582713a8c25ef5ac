"""The transformer encoder block and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .attention import AttentionSite, attend

PositionBias = Callable[[Tensor], Tensor]  # queries (b, k, n, d) to a bias (b, k, n, n) of the logits


class GELU(nn.GELU):
    """x * Phi(x); written over x where no gradient is asked for: the hidden layer, a block's largest tensor, exists once."""

    def forward(self, x: Tensor) -> Tensor:
        """Element-wise. Without gradients x is overwritten."""
        if torch.is_grad_enabled():
            return super().forward(x)
        result: Tensor = torch.ops.aten.gelu_(x, approximate=self.approximate)
        return result


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), computed as silu(1.702 x) / 1.702: one kernel less, and one tensor less to keep for training."""

    def forward(self, x: Tensor) -> Tensor:
        """Element-wise. Without gradients x is overwritten, as by `GELU`."""
        if torch.is_grad_enabled():
            return F.silu(1.702 * x) * (1 / 1.702)
        return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,  # exact (erf): timm, torchvision, DeiT, Swin
    "gelu_tanh": lambda: GELU(approximate="tanh"),  # flax.linen.gelu: the original ViT, big_vision, ViViT
    "quick_gelu": QuickGELU,  # CvT, CLIP
}


MLPS = ("plain", "swiglu")
INITS = ("xavier", "normal")


@dataclass(frozen=True)
class BlockConfig:
    """What every block of an encoder has in common."""

    width: int
    heads: int
    mlp_dim: int
    norm_eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None  # initial value of the per-channel gain of each branch; None: no gain
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp: str = "plain"  # swiglu: DINOv2's giant


def heads_problem(width: int, heads: int) -> str:
    """Why channels do not divide into heads, with the nearest valid numbers of heads; "" when they do."""
    if width % heads == 0:
        return ""
    valid = [h for h in range(1, width + 1) if width % h == 0]
    nearest = " or ".join(map(str, sorted(valid, key=lambda v: abs(v - heads))[:2]))
    return f"width {width} is not divisible by heads {heads}; nearest valid: {nearest}"


class DropPath(nn.Module):
    """Stochastic depth per sample: a residual branch is dropped with probability `rate`, kept ones scaled by 1/(1-rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, " b *rest"]) -> Float[Tensor, " b *rest"]:
        """The branch, or zero, per sample."""
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        """Shown in the model's repr."""
        return f"rate={self.rate:.3g}"


class LayerScale(nn.Module):
    """A learned gain per channel (CaiT, arXiv 2103.17239, section 2.2)."""

    def __init__(self, width: int, initial: float):
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Scaled channels."""
        return x * self.gain


class Attention(nn.Module):
    """Multi-head self-attention with a fused q, k, v projection; rows of `qkv` are ordered [q, k, v] x heads x head dim."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        head_dim = width // config.heads
        self.q_norm = nn.LayerNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.site = AttentionSite(config.attention_dropout)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b n c"], position: PositionBias | None = None) -> Float[Tensor, "b n c"]:
        """`position`, if given, makes a bias of the queries (relative positions)."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # b k n d
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if position is None else position(q)
        y = attend(q, k, v, bias, site=self.site)
        return self.drop(self.proj(y.transpose(1, 2).reshape(b, n, c)))


class MLP(nn.Module):
    """Two linear layers around an activation, dropout after each; `out` channels if not as many as come in."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, out or width)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b e"]:
        """Position-wise."""
        x = self.act(self.fc1(x))
        if self.dropout and self.training:
            return F.dropout(self.fc2(F.dropout(x, self.dropout)), self.dropout)
        return self.fc2(x)


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202): fc2(silu(a) * b), where fc1 gives a and b side by side."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        """Position-wise."""
        gate, value = self.fc1(x).chunk(2, -1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * value)))


@torch.no_grad()
def init_encoder(model: nn.Module, kind: str = "xavier") -> None:
    """Initial weights of all products but the head's.

    xavier: uniform, and nearly zero MLP biases, as in the original ViT code (vit_jax/models_vit.py); normal: 0.02 and zero
    biases (DeiT, TimeSformer).
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith("head"):
            continue
        if kind == "normal":
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            continue
        if name.endswith("qkv"):  # flax initialises q, k and v apart
            for part in module.weight.chunk(3):
                nn.init.xavier_uniform_(part)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if ".mlp." in name else nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)) (ViT, equations 2 and 3)."""

    def __init__(self, config: BlockConfig, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp: nn.Module = (
            SwiGLU(config.width, config.mlp_dim, config.dropout)
            if config.mlp == "swiglu"
            else MLP(config.width, config.mlp_dim, config.activation, config.dropout)
        )
        scaled = config.layer_scale is not None
        self.scale1 = LayerScale(config.width, config.layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.scale2 = LayerScale(config.width, config.layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n c"], position: PositionBias | None = None) -> Float[Tensor, "b n c"]:
        """`position` goes to the attention (see `Attention`)."""
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x), position)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
