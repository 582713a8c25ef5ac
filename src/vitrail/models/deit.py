"""DeiT (Touvron et al., "Training data-efficient image transformers & distillation through attention", arXiv 2012.12877).

A plain DeiT is a ViT with other initial weights and its own recipe: those rows are `ViTConfig`. A distilled one has a second
learned token beside the class token, read by a second head that a teacher trains (section 3).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.layers.features import Features
from vitrail.layers.position import PositionConfig
from vitrail.layers.route import Route

from .base import Model
from .vit import ViT, ViTConfig

PREDICTIONS = ("joint", "class", "distillation")


@dataclass(frozen=True)
class DeiTConfig:
    """Everything that decides the function of a distilled DeiT; sizes are (height, width) in pixels."""

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    in_channels: int = 3
    num_classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    prediction: str = "joint"  # the mean of both logits (original code; the paper adds probabilities), class, distillation
    position: PositionConfig = field(default_factory=PositionConfig)
    norm_eps: float = 1e-6  # timm and the original; transformers: 1e-12
    activation: str = "gelu"
    qkv_bias: bool = True
    init: str = "normal"
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        check_prediction(self.prediction)
        _ = self.backbone

    @property
    def backbone(self) -> ViTConfig:
        """The encoder: a headless ViT whose one register is the distillation token."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "prediction"}
        return ViTConfig(**{**shared, "num_classes": 0, "registers": 1})

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row at the built image size."""
        return self.backbone.grid

    @property
    def pool(self) -> str:
        """What a picture's answer is read from: the class token, and beside it the distillation token."""
        return "cls"


def check_prediction(name: str) -> None:
    """Raise ValueError for an answer that a distilled model cannot give."""
    if name not in PREDICTIONS:
        raise ValueError(f"prediction is {name!r}; allowed: {', '.join(PREDICTIONS)}")


class TwoHeads(nn.Module):
    """A linear classifier for the class token and another for the distillation token; both start at zero.

    Without classes (num_classes = 0) the embeddings pass through.
    """

    def __init__(self, width: int, num_classes: int, prediction: str = "joint"):
        super().__init__()
        self.prediction = prediction
        self.linear = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.distilled = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b c2"]) -> Float[Tensor, "b k"]:
        """The answer that `prediction` names: the mean of both logits, or those of one head."""
        first, second = x.chunk(2, 1)
        if self.prediction == "class":
            return self.linear(first)
        if self.prediction == "distillation":
            return self.distilled(second)
        return (self.linear(first) + self.distilled(second)) / 2

    def both(self, x: Float[Tensor, "b c2"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Logits of the class head and of the distillation head, which training compares with different truths."""
        first, second = x.chunk(2, 1)
        return self.linear(first), self.distilled(second)

    @property
    def unread(self) -> nn.Module | None:
        """The head that takes no part in the answer that `prediction` names, None where both do."""
        return {"class": self.distilled, "distillation": self.linear}.get(self.prediction)

    def extra_repr(self) -> str:
        """Shown in the model's repr."""
        return f"prediction={self.prediction}"


class DeiT(Model):
    """A distilled DeiT for images of any size that the patch divides. Tokens: class, distillation, patches."""

    family = "deit"
    config: DeiTConfig
    head: TwoHeads

    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.config = config
        self.backbone = ViT(config.backbone)
        self.head = TwoHeads(config.width, config.num_classes, config.prediction)

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Normalised tokens after the last block. Raises ValueError for a size or channels that the model does not take."""
        return self.backbone.features(x)

    def pool(self, features: Features) -> Float[Tensor, "b c2"]:
        """The class and the distillation embedding side by side, (b, 2 * width)."""
        return features.tokens[:, :2].flatten(1)

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """That of the ViT; the classifiers read two tokens, the main one first."""
        route = self.backbone.attention_route(size).below("backbone")
        readout = route.readout | {"the distillation token": torch.eye(2, route.first.tokens)[1]}
        if self.head.prediction == "distillation":
            readout = dict(reversed(readout.items()))
        return route._replace(readout=readout)

    def both(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Logits (b, classes) of the class head and of the distillation head."""
        return self.head.both(self.pool(self.features(x)))

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The patch."""
        return self.config.patch

    def reset_head(self, num_classes: int) -> None:
        """Two zero-initialised heads in place of the old ones."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        head = TwoHeads(self.config.width, num_classes, self.head.prediction)
        self.head = head.to(self.backbone.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """Those of the ViT; both heads at depth + 1."""
        ids = {f"backbone.{name}": depth for name, depth in self.backbone.layer_ids().items()}
        return ids | {f"head.{name}": self.config.depth + 1 for name, _ in self.head.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Both tokens and position tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_checkpointing(self, on: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        super().set_checkpointing(on)
        self.backbone.set_checkpointing(on)


class BothLogits(nn.Module):
    """A distilled model called for both logits: what is compiled and replicated where the two heads learn different things."""

    def __init__(self, model: DeiT):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class head and of the distillation head."""
        return self.model.both(x)


# Table 1 of the paper (width, depth, heads); 384: fine-tuned at higher resolution (section 5.1, Table 5).
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}


def _row(config: Any, size: str, side: int, **more: Any) -> Any:
    width, depth, heads = _SIZES[size]
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": 4 * width}
    return config(image_size=(side, side), **sizes, init="normal", **more)


VARIANTS: dict[str, Any] = {f"deit_{s}_patch16_{side}": _row(ViTConfig, s, side) for s in _SIZES for side in (224, 384)}
VARIANTS |= {f"deit_{s}_distilled_patch16_{side}": _row(DeiTConfig, s, side) for s in _SIZES for side in (224, 384)}
VARIANTS["deit_micro"] = DeiTConfig((16, 16), (4, 4), num_classes=10, width=32, depth=3, heads=4, mlp_dim=128)

CONFIG = DeiTConfig
MODEL = DeiT
