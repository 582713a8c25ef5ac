"""MViT with torchvision (clips) and timm (pictures): each reads what we write strictly, we read what each makes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CARD = ModelCard(classes=("a", "b", "c"), preprocess=Preprocess((64, 64), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,)))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def torchvision_peer(model: torch.nn.Module) -> torch.nn.Module:
    """torchvision's class with our model's blocks."""
    from torchvision.models.video.mvit import MSBlockConfig
    from torchvision.models.video.mvit import MViT as Peer

    from vitrail.models.mvit import block_shapes

    c = model.config
    blocks = [
        MSBlockConfig(s.heads, s.cin, s.cout, list(s.query_kernel or ()), list(s.key_kernel),
                      list(s.query_stride) if s.query_kernel else [], list(s.key_stride))
        for s in block_shapes(c)
    ]  # fmt: skip
    return Peer(
        c.image_size, c.frames, blocks, residual_pool=c.residual_pool, residual_with_cls_embed=c.residual_class,
        rel_pos_embed=c.relative, proj_after_attn=c.grow == "attention", num_classes=c.num_classes,
    ).eval()  # fmt: skip


SMALL = {"patch_kernel": (3, 7, 7), "patch_stride": (2, 4, 4), "image_size": (32, 32), "num_classes": 3}


@pytest.mark.parametrize("name", ["mvit_micro", "mvitv2_micro_clip"])
@pytest.mark.parametrize("whole", [False, True])
def test_torchvision_reads_ours(name: str, whole: bool, tmp_path, record_property) -> None:
    model = randomised(create_model(name, **SMALL, class_token=True, pool="cls", residual_class=whole))
    save_model(model, tmp_path / "out", format="torchvision")
    peer = torchvision_peer(model)
    peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(2, *model.input_shape)
    compare(record_property, "mvit", "torchvision", WRITES, model(x), peer(x))


@pytest.mark.parametrize("name", ["mvit_base_16x4", "mvitv2_small_16x4"])  # torchvision's mvit_v1_b and mvit_v2_s
def test_we_read_what_torchvision_makes(name: str, tmp_path, record_property) -> None:
    with torch.device("meta"):
        published = create_model(name, image_size=64, frames=4)
    peer = randomised(torchvision_peer(published))
    torch.save(peer.state_dict(), tmp_path / f"{name}.pth")
    model = load_model(tmp_path / f"{name}.pth", quiet=True)
    assert model.input_shape == (3, 4, 64, 64)
    x = torch.randn(1, 3, 4, 64, 64)
    compare(record_property, "mvit", "torchvision", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)
    assert (model.card.preprocess.mean, model.card.preprocess.crop_fraction) == ((0.45,), 0.875)


def test_timm_reads_ours(tmp_path, record_property) -> None:
    import timm

    model = randomised(create_model("mvitv2_tiny", num_classes=3, image_size=64, in_channels=4))
    model.card = CARD
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 4, 64, 64)
    compare(record_property, "mvit", "timm", WRITES, model(x), peer(x), atol=1e-4, rtol=1e-4)
    data = timm.data.resolve_model_data_config(peer)
    assert (tuple(data["std"]), data["crop_pct"]) == ((0.3,) * 4, 0.8)


@pytest.mark.parametrize("name", ["mvitv2_small", "mvitv2_small_cls"])
def test_we_read_what_timm_makes(name: str, tmp_path, record_property) -> None:
    import timm

    peer = randomised(timm.create_model(name, img_size=64, num_classes=5))
    torch.save(peer.state_dict(), tmp_path / f"{name}.pth")
    model = load_model(tmp_path / f"{name}.pth", quiet=True)
    assert model.config.class_token == model.config.residual_class == name.endswith("cls")
    x = torch.randn(1, 3, 64, 64)
    compare(record_property, "mvit", "timm", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)
