"""Hybrid ViTs and timm: it loads what we write and we load what it writes, with the same logits."""

from __future__ import annotations

import pytest
import torch
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.mapping import CheckpointError
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 3}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
        ("vit_small_r26_s32_224", {"img_size": (96, 61)}),
        ("vit_base_r50_s16_224", {"img_size": 64, "global_pool": "avg", "in_chans": 2}),
    ],
)
def test_timm(name: str, settings: dict, tmp_path, record_property) -> None:
    import timm

    peer = lively(timm.create_model(name, **SMALL, **settings))
    hints = {"built_size": settings["img_size"]} if isinstance(settings["img_size"], tuple) else {}
    model = load_model(peer.state_dict(), quiet=True, heads=4, **hints)
    size = settings["img_size"] if hints else (64, 64)
    x = torch.randn(2, settings.get("in_chans", 3), *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compare(record_property, "hybrid", "timm", READS, model(x), peer(x), **CLOSE)
        model.card = ModelCard(
            classes=("a", "b", "c"), preprocess=Preprocess(size, x.shape[1], "crop", 0.8, "bilinear", (0.4,), (0.3,))
        )
        save_model(model, tmp_path / "out", format="timm")
        other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        other_x = torch.randn(2, x.shape[1], *model.config.image_size, generator=torch.Generator().manual_seed(1))
        compare(record_property, "hybrid", "timm", WRITES, model(other_x), other(other_x), **CLOSE)
    assert timm.data.resolve_model_data_config(other)["crop_pct"] == 0.8


def test_timm_reads_what_we_write_for_google(tmp_path) -> None:
    import timm

    google = {"trunk.std_eps": 1e-5, "trunk.std_rule": "deviation", "trunk.norm_eps": 1e-6, "activation": "gelu_tanh"}
    model = lively(create_model("vit_tiny_r_s16_p8_224", num_classes=3, image_size=64, depth=2, **google))
    with pytest.raises(CheckpointError, match="timm cannot hold"):
        save_model(model, tmp_path / "timm", format="timm")
    path = save_model(model, tmp_path / "out", format="google")
    again = load_model(path, quiet=True)
    peer = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=3, img_size=64, depth=2).eval()
    peer.load_pretrained(str(path))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
        # timm's own epsilons and GELU: the same network, but not the same function
        torch.testing.assert_close(peer(x), model(x), atol=2e-2, rtol=2e-2)
