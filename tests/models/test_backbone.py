"""Every family of images behind torchvision's detection parts, and segmentation of pasted emoji."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from vitrail.data.composites import Composites
from vitrail.evaluation.metrics import mean_iou
from vitrail.models import MODELS, Segmenter, as_backbone, create_model
from vitrail.training.objectives import Segment

MICROS = [name for name in MODELS if "_micro" in name and not create_model(name).takes_clips]


@pytest.mark.parametrize("name", MICROS)
def test_maps_of_any_picture(name: str) -> None:
    backbone = as_backbone(create_model(name)).eval()
    maps = backbone(torch.randn(2, 3, 34, 50))
    assert list(maps) == [str(i) for i in range(len(backbone.out_channels))]
    assert tuple(level.shape[1] for level in maps.values()) == backbone.out_channels
    areas = [level.shape[2] * level.shape[3] for level in maps.values()]
    assert areas == sorted(areas, reverse=True)
    pyramid = FeaturePyramidNetwork(list(backbone.out_channels), 8)(maps)
    assert all(level.shape[1] == 8 for level in pyramid.values())


def test_maps_are_those_of_the_pyramid() -> None:
    model = create_model("resnet_micro").eval()
    x = torch.randn(2, 3, 16, 24)
    stages = [stage.maps()[:, :, 0] for stage in model.pyramid(x)]
    for got, stage in zip(as_backbone(model)(x).values(), stages, strict=True):
        torch.testing.assert_close(got, stage)


def test_stages_are_normalised() -> None:
    backbone = as_backbone(create_model("cvt_micro")).eval()
    maps = backbone(100 * torch.randn(2, 3, 32, 32))
    for level in list(maps.values())[:-1]:
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-4, rtol=0)


def test_a_plain_model_gets_four_resolutions() -> None:
    maps = as_backbone(create_model("vit_micro_patch4_16"))(torch.randn(1, 3, 16, 32))
    assert [tuple(level.shape[2:]) for level in maps.values()] == [(16, 32), (8, 16), (4, 8), (2, 4)]


@pytest.mark.parametrize("name", MICROS)
def test_a_detector_trains(name: str) -> None:
    """One step of torchvision's Faster R-CNN: every parameter of model, pyramid network and norms gets a gradient."""
    torch.manual_seed(0)
    backbone = as_backbone(create_model(name), fpn=16)
    levels = len(backbone.backbone.out_channels)
    anchors = AnchorGenerator(tuple((2 ** (3 + i),) for i in range(levels)), ((1.0,),) * levels)
    pooling = MultiScaleRoIAlign([str(i) for i in range(levels)], 3, 2)
    detector = FasterRCNN(
        backbone, num_classes=3, rpn_anchor_generator=anchors, box_roi_pool=pooling, min_size=32, max_size=48
    ).train()
    for module in backbone.modules():  # a zero gain at the end of a branch hides the gradients before it
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 20.0, 24.0]]), "labels": torch.tensor([i + 1])} for i in range(2)]
    losses = detector([torch.rand(3, 32, 40), torch.rand(3, 36, 32)], targets)
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_objectness"}
    sum(losses.values()).backward()
    silent = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_wrong_choices_name_the_right_ones() -> None:
    with pytest.raises(ValueError, match="allowed: linear, fpn"):
        Segmenter(create_model("resnet_micro"), 2, head="upernet")


@pytest.mark.parametrize("head", ["linear", "fpn"])
@pytest.mark.parametrize("name", MICROS)
def test_segmenter_answers_every_pixel(name: str, head: str) -> None:
    model = Segmenter(create_model(name), 4, head, width=8)
    assert model(torch.randn(2, 3, 18, 27)).shape == (2, 4, 18, 27)


@cache
def composites() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures and masks to learn from, and new ones by another designer."""
    train = Composites(160, (32, 32), designers=("noto", "twemoji", "fluent3d"))
    new = Composites(24, (32, 32), seed=1, designers=("emojione2",))
    return [tuple(torch.stack(part) for part in zip(*(d[i] for i in range(len(d))), strict=True)) for d in (train, new)]


def learned(name: str, head: str, steps: int = 60) -> tuple[float, float]:
    """(mean IoU of the commonest class everywhere, of a model after some steps) on new pictures by other designers."""
    torch.manual_seed(0)
    (pictures, masks), (images, truth) = composites()
    model, objective = Segmenter(create_model(name), 2, head, width=16), Segment()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = torch.arange(8 * step, 8 * step + 8) % len(pictures)
        objective(model, pictures[chosen] / 127.5 - 1, masks[chosen])["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        predicted = model.eval()(images / 127.5 - 1).argmax(1)
    return mean_iou(torch.full_like(truth, truth.flatten().mode().values), truth, 2), mean_iou(predicted, truth, 2)


@pytest.mark.parametrize(("name", "head"), [("vit_micro_patch4_16", "linear"), ("cvt_micro", "fpn")])
def test_emoji_are_told_from_texture(name: str, head: str) -> None:
    majority, reached = learned(name, head)
    assert reached > majority + 0.1
