from __future__ import annotations

import pytest
import torch

from vitrail.config import Preprocess
from vitrail.inference.engines import Engine, fold_batchnorm
from vitrail.models import create_model


def lively(name: str) -> torch.nn.Module:
    """A model whose normalisations have seen data and whose head is not zero."""
    torch.manual_seed(0)
    model = create_model(name).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        model.head.linear.weight.normal_(std=0.5)
        for _ in range(5):
            model(torch.randn(8, 3, 16, 16))
    return model.eval()


def test_folding_includes_weight_standardisation() -> None:
    model, images = lively("resnetv2_micro"), torch.randn(4, 3, 16, 16)
    folded = fold_batchnorm(model)
    assert not torch.equal(folded.stem.conv.weight, model.stem.conv.weight)
    with torch.no_grad():
        assert torch.allclose(folded(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet_micro", "cvt_micro"])
def test_folding_keeps_the_function_and_the_model(name: str) -> None:
    model = lively(name)
    images = torch.randn(4, 3, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        expected = model(images)
        assert expected.std() > 0.1
        assert torch.allclose(folded(images), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet_micro", "vit_micro_patch4_16", "cvt_micro"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_engine_answers_as_the_model_does(name: str, precision: str, tolerance: float) -> None:
    model = lively(name).train()
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    preprocess = Preprocess(image_size=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    scores = Engine(model, preprocess, torch.device("cpu"), precision)(pictures)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        expected = model.eval()((pictures / 255 - mean) / std)
    assert scores.dtype == torch.float32
    assert (scores - expected).abs().max() <= tolerance * expected.abs().max()


def test_engine_leaves_the_model_alone() -> None:
    model = lively("vit_micro_patch4_16").train()
    engine = Engine(model, Preprocess(image_size=(16, 16)), torch.device("cpu"), "bf16")
    assert model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in engine.model.parameters())


def test_convolutions_run_channels_last_and_transformers_do_not() -> None:
    preprocess = Preprocess(image_size=(16, 16))
    layouts = {
        name: Engine(create_model(name), preprocess, torch.device("cpu"), "fp32").layout
        for name in ("resnet_micro", "vit_micro_patch4_16")
    }
    assert layouts == {"resnet_micro": torch.channels_last, "vit_micro_patch4_16": torch.contiguous_format}
