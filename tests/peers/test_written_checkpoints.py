"""What `save_model` writes is loaded strictly by the other library itself and gives the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CARD = ModelCard(classes=("a", "b", "c"), preprocess=Preprocess((32, 32), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,)))


def random_vit(**settings):
    model = create_model("vit_micro_patch4_16", num_classes=3, image_size=32, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.card = CARD
    return model


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"registers": 2},
        {"registers": 2, "position.prefix": False},
        {"pool": "mean", "norm_after_pool": True},
        {"pool": "mean", "class_token": False},
        {"qk_norm": True, "layer_scale": 0.1, "qkv_bias": False},
        {"stem_norm": True, "patch_bias": False},
    ],
)
def test_timm_reads_ours(settings: dict, tmp_path, pictures: torch.Tensor) -> None:
    import timm

    model = random_vit(**settings)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(peer(pictures), model(pictures), atol=2e-5, rtol=1e-5)
    settings = timm.data.resolve_model_data_config(peer)
    assert tuple(settings["mean"]) == (0.4, 0.4, 0.4)
    assert settings["crop_pct"] == 0.8
    assert settings["interpolation"] == "bilinear"


def test_timm_reads_our_resnet(tmp_path) -> None:
    import timm

    model = create_model("resnet18", num_classes=3).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model("resnet18", num_classes=3)
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(peer.eval()(x), model(x), atol=1e-4, rtol=1e-4)


def test_transformers_reads_ours(tmp_path, pictures: torch.Tensor) -> None:
    import transformers

    model = random_vit(norm_eps=1e-12)
    save_model(model, tmp_path / "out", format="transformers")
    peer, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(peer.eval()(pictures).logits, model(pictures), atol=2e-5, rtol=1e-5)
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 40, "width": 40}
    assert processor["crop_size"] == {"height": 32, "width": 32}
    again = load_model(tmp_path / "out", quiet=True)
    assert again.card.preprocess.crop_fraction == pytest.approx(0.8)
    assert again.card.preprocess.fit == "crop"


def test_we_read_what_transformers_writes(tmp_path, pictures: torch.Tensor) -> None:
    import transformers

    settings = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4,
        id2label={0: "x", 1: "y"}, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    peer = transformers.ViTForImageClassification(settings).eval()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    torch.testing.assert_close(model(pictures), peer(pictures).logits, atol=2e-5, rtol=1e-5)
    assert model.card.classes == ("x", "y")


def test_torchvision_reads_ours(tmp_path, pictures: torch.Tensor) -> None:
    import torchvision

    model = random_vit()
    save_model(model, tmp_path / "out", format="torchvision")
    peer = torchvision.models.VisionTransformer(32, 4, 3, 4, 32, 128, num_classes=3).eval()
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(peer(pictures), model(pictures), atol=2e-5, rtol=1e-5)
