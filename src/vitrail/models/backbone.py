"""A model as a backbone: stage feature maps as detection and segmentation heads (torchvision's among them) want them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .base import Model


def as_backbone(model: Model, fpn: int | None = None) -> nn.Module:
    """A module from images (b, c, h, w) to an OrderedDict of maps "0", "1", ... (b, c_i, h_i, w_i), finest first.

    Its `out_channels` are those of the maps, as torchvision's FeaturePyramidNetwork takes them; with `fpn` such a network of
    that width is put behind, out_channels is one number, and torchvision's FasterRCNN takes it whole. The model is used, not
    copied, and loses its classifier. Pictures of any size are padded with zeros on the right and below.
    Raises ValueError for a model of clips.
    """
    if model.takes_clips:
        raise ValueError(f"{model.name or model.family} takes clips; a backbone is made of a model of images")
    backbone = Backbone(model)
    return backbone if fpn is None else PyramidBackbone(backbone, fpn)


class Backbone(nn.Module):
    """Maps of every stage, normalised; of a plain model a simple feature pyramid (see `as_backbone`)."""

    def __init__(self, model: Model):
        super().__init__()
        model.reset_head(0)
        self.model = model
        channels = _stage_channels(model)
        plain = len(channels) == 1
        self.rescale = SimplePyramid(channels[0]) if plain else None
        self.out_channels = channels * 4 if plain else channels
        raw = 0 if plain or model.normalised_stages else len(channels) - 1  # the last stage is normalised by the model
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels[:raw])

    def forward(self, x: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        """Maps by number, finest first."""
        down, right = (-side % step for side, step in zip(x.shape[2:], self.model.input_multiple, strict=True))
        stages = self.model.pyramid(F.pad(x, (0, right, 0, down)) if down or right else x)
        norms = [*self.norms, *[nn.Identity()] * (len(stages) - len(self.norms))]
        maps = [f._replace(tokens=norm(f.patches), prefix=0).maps()[:, :, 0] for f, norm in zip(stages, norms, strict=True)]
        maps = maps if self.rescale is None else self.rescale(maps[0])
        return OrderedDict((str(i), level) for i, level in enumerate(maps))


class SimplePyramid(nn.Module):
    """One map at 4, 2, 1 and 1/2 times its resolution: strides 4, 8, 16 and 32 behind patches of 16 (ViTDet, 2203.16527)."""

    def __init__(self, width: int):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), nn.GroupNorm(1, width), nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, 2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Four maps, finest first."""
        return [self.up4(x), self.up2(x), x, F.max_pool2d(x, 2, ceil_mode=True)]


class PyramidBackbone(nn.Module):
    """A backbone behind a feature pyramid network (arXiv 1612.03144): maps of one width, out_channels one number."""

    def __init__(self, backbone: Backbone, width: int):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.backbone, self.out_channels = backbone, width
        self.fpn = FeaturePyramidNetwork(list(backbone.out_channels), width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        """Maps by number, finest first."""
        return self.fpn(self.backbone(x))


class Segmenter(nn.Module):
    """Class scores of every pixel from a backbone's maps.

    head "linear": one linear layer on all maps, each enlarged to the finest; "fpn": the maps of a feature pyramid network of
    `width` channels, enlarged, added up, and two convolutions. Raises ValueError for another head.
    """

    def __init__(self, model: Model, num_classes: int, head: str = "linear", width: int = 64):
        super().__init__()
        if head not in ("linear", "fpn"):
            raise ValueError(f"head is {head!r}; allowed: linear, fpn")
        self.backbone = as_backbone(model, width if head == "fpn" else None)
        channels: Sequence[int] | int = self.backbone.out_channels  # type: ignore[assignment]
        if isinstance(channels, int):
            self.levels = nn.ModuleList()
            self.classify: nn.Module = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_classes, 1)
            )
        else:  # a linear layer on concatenated maps is the sum of linear layers on each
            self.levels = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in channels)
            self.classify = nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """Logits of every pixel."""
        maps = list(self.backbone(x).values())
        if self.levels:
            maps = [level(m) for level, m in zip(self.levels, maps, strict=True)]
        finest = maps[0].shape[2:]
        total = torch.stack([_enlarged(m, finest) for m in maps]).sum(0)
        h, w = x.shape[2:]
        step = self.input_multiple
        padded = (h + -h % step[0], w + -w % step[1])
        return _enlarged(self.classify(total), padded)[:, :, :h, :w]

    @property
    def input_multiple(self) -> tuple[int, int]:
        """What the backbone pads pictures to."""
        inner = self.backbone.backbone if isinstance(self.backbone, PyramidBackbone) else self.backbone
        return inner.model.input_multiple  # type: ignore[union-attr,return-value]


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, (size[0], size[1]), mode="bilinear", align_corners=False)


def _stage_channels(model: Model) -> tuple[int, ...]:
    """Channels of every stage, found on tensors without storage."""
    mode = model.training
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        channels = tuple(stage.tokens.shape[2] for stage in model.pyramid(torch.empty(1, *model.input_shape)))
    model.train(mode)
    return channels
