"""Hybrid ViTs (Dosovitskiy et al., arXiv 2010.11929, section 3.1): a ViT whose patches are cells of a ResNet's feature map."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.layers.features import Features
from vitrail.layers.head import ClassifierHead
from vitrail.layers.norm import in_float32_on_cpu
from vitrail.layers.position import PositionConfig
from vitrail.layers.route import Route, tile

from .base import Model
from .bit import Stem, TrunkConfig, build_stages, init_trunk
from .vit import ViT, ViTConfig


@dataclass(frozen=True)
class HybridConfig:
    """Everything that decides the function of a hybrid; image_size is (height, width) in pixels, patch in cells of the map."""

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (1, 1)
    in_channels: int = 3
    num_classes: int = 1000
    trunk: TrunkConfig = field(default_factory=lambda: _trunk(3, 4, 9))
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    pool: str = "cls"
    class_token: bool = True
    position: PositionConfig = field(default_factory=PositionConfig)
    norm_eps: float = 1e-6
    norm_after_pool: bool = False  # the final norm acts on the pooled embedding (timm's mean pooling)
    activation: str = "gelu"  # gelu_tanh in the original JAX code
    qkv_bias: bool = True
    representation: int | None = None
    head_bias: float = 0.0
    init: str = "xavier"
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        _ = self.backbone

    @property
    def backbone(self) -> ViTConfig:
        """The headless ViT that reads the feature map."""
        names = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(ViTConfig)}
        shared = {name: getattr(self, name) for name in names}
        cells = (-(-self.image_size[0] // self.trunk.stride), -(-self.image_size[1] // self.trunk.stride))
        own = {"image_size": cells, "in_channels": self.trunk.width, "num_classes": 0, "representation": None}
        return ViTConfig(**{**shared, **own})

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row at the built image size."""
        return self.backbone.grid


class Hybrid(Model):
    """A hybrid for images of any size (of any multiple of the patch's pixels, where the patch is larger than a cell)."""

    family = "hybrid"
    config: HybridConfig

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = c = config
        self.stem = Stem(c.in_channels, c.trunk)
        self.stages = build_stages(c.trunk, 0.0)
        init_trunk(self)
        self.backbone = ViT(c.backbone)
        self.head = ClassifierHead(c.width, c.num_classes, c.representation, c.head_bias)

    def features(self, x: Float[Tensor, "b c h w"]) -> Features:
        """Normalised tokens after the last block. Raises ValueError for a size or channels that the model does not take."""
        return self.backbone.features(self.maps(x))

    def maps(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """The trunk's feature map, whose cells are the ViT's pixels."""
        self.check_input(x)
        # Faster with channels innermost, where the ViT's tokens want them too, except where group norms then lose digits.
        x = self.stem(x if in_float32_on_cpu(x) else x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = self.run_block(block, x)
        return x

    def attention_route(self, size: tuple[int, ...]) -> Route:
        """That of the ViT; a token is taken to lie over its even share of the picture, whatever more its convolutions see."""
        rows, columns = (self.config.trunk.map_side(side) // p for side, p in zip(size, self.config.patch, strict=True))
        return self.backbone.route_over(tile((1, rows, columns), size, self.backbone.config.prefix)).below("backbone")

    def pool(self, features: Features) -> Float[Tensor, "b c"]:
        """The class token, the mean of the patch tokens, or the attention pool's answer."""
        return self.backbone.pool(features)

    @property
    def input_multiple(self) -> tuple[int, int]:
        """The pixels of a patch; any size works where a patch is one cell of the map."""
        if self.config.patch == (1, 1):
            return (1, 1)
        return self.config.patch[0] * self.config.trunk.stride, self.config.patch[1] * self.config.trunk.stride

    def reset_head(self, num_classes: int) -> None:
        """A zero-initialised linear head in place of the whole old one, representation layer included."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes, representation=None)
        self.head = ClassifierHead(self.config.width, num_classes).to(self.backbone.norm.weight.device)

    def layer_ids(self) -> dict[str, int]:
        """The convolutions belong to the stem, 0; then those of the ViT; the head at depth + 1."""
        ids = {name: 0 for name, _ in self.named_parameters()}
        ids |= {f"backbone.{name}": depth for name, depth in self.backbone.layer_ids().items()}
        return ids | {f"head.{name}": self.config.depth + 1 for name, _ in self.head.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """Those of the ViT."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_checkpointing(self, on: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        super().set_checkpointing(on)
        self.backbone.set_checkpointing(on)


def _trunk(*depths: int) -> TrunkConfig:
    widths = tuple(256 * 2**s for s in range(len(depths)))
    return TrunkConfig(depths, widths, preactivation=False, padding="same", stem_pool="same")


# Width, depth and heads as of the ViT's; depths of the trunk: the paper's section 4.1 ("/16": stage 4's blocks are in stage 3),
# AugReg, arXiv 2106.10270, Table 2 (R+Ti/16, R26+S/32). R+Ti/16 has no stages: its 8x8 patches lie on the stem's map.
_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_TRUNKS = {"r_s16_p8": (), "r26_s32": (2, 2, 2, 2), "r50_s16": (3, 4, 9), "r50_s32": (3, 4, 6, 3)}


def _row(size: str, trunk: str, side: int) -> HybridConfig:
    width, depth, heads = _SIZES[size]
    sizes: dict[str, Any] = {"width": width, "depth": depth, "heads": heads, "mlp_dim": 4 * width}
    patch = (8, 8) if trunk.endswith("p8") else (1, 1)
    return HybridConfig((side, side), patch, trunk=_trunk(*_TRUNKS[trunk]), **sizes)


VARIANTS: dict[str, HybridConfig] = {
    f"vit_{size}_{trunk}_{side}": _row(size, trunk, side)
    for size, trunk, side in (
        ("tiny", "r_s16_p8", 224), ("tiny", "r_s16_p8", 384), ("small", "r26_s32", 224), ("small", "r26_s32", 384),
        ("base", "r26_s32", 224), ("base", "r50_s32", 224), ("base", "r50_s16", 224), ("base", "r50_s16", 384),
        ("large", "r50_s32", 224), ("large", "r50_s32", 384), ("large", "r50_s16", 224),
    )
}  # fmt: skip
VARIANTS["hybrid_micro"] = HybridConfig(
    (16, 16), num_classes=10, width=32, depth=2, heads=4, mlp_dim=64,
    trunk=TrunkConfig((1,), (32,), 16, groups=8, preactivation=False, padding="same", stem_pool="same"),
)  # fmt: skip

CONFIG = HybridConfig
MODEL = Hybrid
