"""BiT and the libraries that have it: they load what we write and we load what they write, with the same logits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.mapping import CheckpointError
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 61, 48, generator=torch.Generator().manual_seed(0))


def test_timm(tmp_path, pictures: torch.Tensor, record_property) -> None:
    import timm

    peer = lively(timm.create_model("resnetv2_50x1_bit", num_classes=3))
    model = load_model(peer.state_dict(), quiet=True)
    with torch.no_grad():
        compare(record_property, "bit", "timm", READS, model(pictures), peer(pictures), **CLOSE)
        model.card = ModelCard(
            classes=("a", "b", "c"), preprocess=Preprocess((96, 96), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,))
        )
        save_model(model, tmp_path / "out", format="timm")
        other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        compare(record_property, "bit", "timm", WRITES, model(pictures), other(pictures), **CLOSE)
    assert timm.data.resolve_model_data_config(other)["crop_pct"] == 0.8
    assert load_model(tmp_path / "out", quiet=True).config.image_size == (96, 96)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layer_type": "bottleneck"},
        {"global_padding": "same"},
        {"layer_type": "bottleneck", "global_padding": "same"},
        {"layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True},
    ],
)
def test_transformers(settings: dict, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    config = transformers.BitConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_groups=4, id2label={0: "x", 1: "y"}, **settings
    )
    peer = lively(transformers.BitForImageClassification(config))
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", quiet=True)
    assert model.card.classes == ("x", "y")
    with torch.no_grad():
        compare(record_property, "bit", "transformers", READS, model(pictures), peer(pictures).logits, **CLOSE)
        save_model(model, tmp_path / "ours", format="transformers")
        other, report = transformers.BitForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        compare(record_property, "bit", "transformers", WRITES, model(pictures), other.eval()(pictures).logits, **CLOSE)
    assert list(other.config.id2label.values()) == ["x", "y"]
    transformers.BitImageProcessor.from_pretrained(tmp_path / "ours")


def test_timm_reads_what_we_write_for_google(tmp_path, pictures: torch.Tensor, record_property) -> None:
    import timm

    model = lively(create_model("resnetv2_50x1_bit", num_classes=3, **{"trunk.std_eps": 1e-10}))
    path = save_model(model, tmp_path / "out", format="google")
    peer = timm.create_model("resnetv2_50x1_bit", num_classes=3).eval()
    peer.load_pretrained(str(path))
    with torch.no_grad():
        compare(record_property, "bit", "google npz", WRITES, model(pictures), peer(pictures), **CLOSE)
        again = load_model(path, quiet=True)
        torch.testing.assert_close(again(pictures), model(pictures))
    assert again.config.image_size == (448, 448)


def test_a_different_standardisation_is_not_written_silently(tmp_path) -> None:
    model = create_model("resnetv2_50x1_bit", num_classes=3, **{"trunk.std_eps": 1e-10})
    with pytest.raises(CheckpointError, match="timm cannot hold std_eps=1e-10"):
        save_model(model, tmp_path / "out", format="timm")
    path = save_model(model, tmp_path / "google", format="google")
    changed = load_model(path, quiet=True, **{"trunk.std_eps": 1e-8})
    save_model(changed, tmp_path / "out", format="timm")
    assert "head.fc.weight" in load_file(tmp_path / "out" / "model.safetensors")
