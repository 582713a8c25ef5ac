"""DeiT with timm and transformers: each reads what we write strictly, we read what each writes, the logits are the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CARD = ModelCard(classes=("a", "b", "c"), preprocess=Preprocess((32, 32), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,)))


def random_deit(**settings):
    model = create_model("deit_micro", num_classes=3, image_size=32, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.card = CARD
    return model


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False, "mlp_dim": 64, "depth": 2}])
def test_timm_reads_ours(settings: dict, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import timm

    model = random_deit(**settings)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    compare(record_property, "deit", "timm", WRITES, model(pictures), peer(pictures))
    peer.train().set_distilled_training(True)
    for theirs, ours in zip(peer(pictures), model.both(pictures), strict=True):
        compare(record_property, "deit", "timm", WRITES, ours, theirs)
    data = timm.data.resolve_model_data_config(peer)
    assert (tuple(data["mean"]), data["crop_pct"]) == ((0.4, 0.4, 0.4), 0.8)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"])
def test_we_read_what_timm_makes(name: str, tmp_path, record_property) -> None:
    import timm

    peer = timm.create_model(name).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(peer.state_dict(), tmp_path / f"{name}.fb_in1k.safetensors")
    model = load_model(tmp_path / f"{name}.fb_in1k.safetensors", quiet=True)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    compare(record_property, "deit", "timm", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)
    assert model.card.preprocess.mean == peer.default_cfg["mean"]


@pytest.mark.parametrize("prediction", ["joint", "class"])
def test_transformers_reads_ours(prediction: str, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    model = random_deit(norm_eps=1e-12, prediction=prediction)
    save_model(model, tmp_path / "out", format="transformers")
    kind = "DeiTForImageClassification" + ("WithTeacher" if prediction == "joint" else "")
    peer, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    compare(record_property, "deit", "transformers", WRITES, model(pictures), peer.eval()(pictures).logits)
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    assert load_model(tmp_path / "out", quiet=True).card.preprocess.crop_fraction == pytest.approx(0.8)


@pytest.mark.parametrize("kind", ["DeiTForImageClassificationWithTeacher", "DeiTForImageClassification", "DeiTModel"])
def test_we_read_what_transformers_writes(kind: str, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    settings = transformers.DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4,
        id2label={0: "x", 1: "y"}, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    peer = getattr(transformers, kind)(settings).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    if kind == "DeiTModel":
        tokens = peer(pictures).last_hidden_state
        compare(record_property, "deit", "transformers", READS, model.features(pictures).tokens, tokens)
        return
    compare(record_property, "deit", "transformers", READS, model(pictures), peer(pictures).logits)
    assert model.card.classes == ("x", "y")
