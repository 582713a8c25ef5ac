"""ViViT with transformers: it reads what we write strictly, we read what it writes, the logits are the same."""

from __future__ import annotations

import pytest
import torch
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False, "activation": "gelu", "norm_eps": 1e-5}])
def test_transformers_reads_ours(settings: dict, tmp_path, clips: torch.Tensor, record_property) -> None:
    import transformers

    model = create_model("vivit_micro", num_classes=3, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = Preprocess((16, 16), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,))
    model.card = ModelCard(classes=("a", "b", "c"), preprocess=made)
    save_model(model, tmp_path / "out", format="transformers")
    peer, report = transformers.VivitForVideoClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    compare(record_property, "vivit", "transformers", WRITES, model(clips), peer.eval()(clips.transpose(1, 2)).logits)
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    again = load_model(tmp_path / "out", quiet=True).card
    assert again.classes == ("a", "b", "c")
    assert again.preprocess.mean == pytest.approx((0.4,) * 3)
    assert again.preprocess.crop_fraction == pytest.approx(0.8)


@pytest.mark.parametrize("kind", ["VivitForVideoClassification", "VivitModel"])
def test_we_read_what_transformers_writes(kind: str, tmp_path, clips: torch.Tensor, record_property) -> None:
    import transformers

    settings = transformers.VivitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, num_frames=4,
        tubelet_size=[2, 4, 4], id2label={0: "x", 1: "y"},
    )  # fmt: skip
    peer = getattr(transformers, kind)(settings).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    with torch.no_grad():
        answer = peer(clips.transpose(1, 2))
    if kind == "VivitModel":
        compare(record_property, "vivit", "transformers", READS, model.features(clips).tokens, answer.last_hidden_state)
        return
    compare(record_property, "vivit", "transformers", READS, model(clips), answer.logits)
    assert (model.config.frames, model.card.classes) == (4, ("x", "y"))
