"""What `save_model` writes is loaded strictly by the other library itself and gives the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.peers.pairs import READS, WRITES, compare

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
def test_timm_reads_ours(settings: dict, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import timm

    model = random_vit(**settings)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    compare(record_property, "vit", "timm", WRITES, model(pictures), peer(pictures))
    settings = timm.data.resolve_model_data_config(peer)
    assert tuple(settings["mean"]) == (0.4, 0.4, 0.4)
    assert settings["crop_pct"] == 0.8
    assert settings["interpolation"] == "bilinear"


def test_timm_reads_our_resnet(tmp_path, record_property) -> None:
    import timm

    model = create_model("resnet18", num_classes=3).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model("resnet18", num_classes=3)
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    compare(record_property, "resnet", "timm", WRITES, model(x), peer.eval()(x), atol=1e-4, rtol=1e-4)


def test_transformers_reads_ours(tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    model = random_vit(norm_eps=1e-12)
    save_model(model, tmp_path / "out", format="transformers")
    peer, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    compare(record_property, "vit", "transformers", WRITES, model(pictures), peer.eval()(pictures).logits)
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 40, "width": 40}
    assert processor["crop_size"] == {"height": 32, "width": 32}
    again = load_model(tmp_path / "out", quiet=True)
    assert again.card.preprocess.crop_fraction == pytest.approx(0.8)
    assert again.card.preprocess.fit == "crop"


def test_we_read_what_transformers_writes(tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    settings = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4,
        id2label={0: "x", 1: "y"}, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    peer = transformers.ViTForImageClassification(settings).eval()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    compare(record_property, "vit", "transformers", READS, model(pictures), peer(pictures).logits)
    assert model.card.classes == ("x", "y")


def test_torchvision_reads_ours(tmp_path, pictures: torch.Tensor, record_property) -> None:
    import torchvision

    model = random_vit()
    save_model(model, tmp_path / "out", format="torchvision")
    peer = torchvision.models.VisionTransformer(32, 4, 3, 4, 32, 128, num_classes=3).eval()
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    compare(record_property, "vit", "torchvision", WRITES, model(pictures), peer(pictures))


def random_peer(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "settings", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"global_pool": "avg", "class_token": False}]
)
def test_we_read_what_timm_writes(settings: dict, pictures: torch.Tensor, record_property) -> None:
    import timm

    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    peer = random_peer(timm.create_model("vit_tiny_patch16_224", **size, **settings))
    model = load_model(peer.state_dict(), quiet=True, heads=4)
    compare(record_property, "vit", "timm", READS, model(pictures), peer(pictures))


def test_we_read_what_torchvision_writes(pictures: torch.Tensor, record_property) -> None:
    import torchvision

    peer = random_peer(torchvision.models.VisionTransformer(32, 4, 3, 4, 32, 128, num_classes=3))
    model = load_model(peer.state_dict(), quiet=True, heads=4)
    compare(record_property, "vit", "torchvision", READS, model(pictures), peer(pictures))


@pytest.mark.parametrize("peer_name", ["torchvision", "timm"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_of_peers(name: str, peer_name: str, tmp_path, record_property) -> None:
    import timm
    import torchvision

    peer = (torchvision.models.get_model if peer_name == "torchvision" else timm.create_model)(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = load_model(peer.state_dict(), quiet=True)
    compare(record_property, "resnet", peer_name, READS, model(x), peer(x), atol=1e-4, rtol=1e-4)
    save_model(model, tmp_path / "out", format=peer_name)
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    compare(record_property, "resnet", peer_name, WRITES, model(x), peer(x), atol=1e-4, rtol=1e-4)
