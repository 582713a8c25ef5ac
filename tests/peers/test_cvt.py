"""transformers reads our CvT strictly and answers alike; we read what it writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers


def random_cvt(**settings):
    model = create_model("cvt_micro", num_classes=3, depths=(1, 2, 3), activation="gelu", **settings)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else torch.nn.init.normal_(tensor, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "card"),
    [
        ({"image_size": 64}, Preprocess((64, 64), 3, "crop", 0.8, "bicubic", (0.4,), (0.3,))),
        ({"kv_stride": 1, "qkv_bias": False, "mlp_ratio": 3.0}, Preprocess((40, 24), 3, "stretch", 1.0)),
        ({"image_size": 384}, Preprocess((384, 384), 3, "stretch", 1.0, "bicubic")),
    ],
)
def test_transformers_reads_ours(settings: dict, card: Preprocess, tmp_path, record_property) -> None:
    import transformers

    model = random_cvt(**settings)
    model.card = ModelCard(classes=("a", "b", "c"), preprocess=card)
    save_model(model, tmp_path / "out", format="transformers")
    peer, report = transformers.CvtForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    x = torch.randn(2, 3, 40, 56)
    compare(record_property, "cvt", "transformers", WRITES, model(x), peer.eval()(x).logits)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert processor(picture, return_tensors="pt")["pixel_values"].shape[2:] == card.image_size
    again = load_model(tmp_path / "out", quiet=True)
    assert again.card.preprocess.image_size == card.image_size
    assert (again.card.preprocess.fit, again.card.preprocess.crop_fraction) == (card.fit, pytest.approx(card.crop_fraction))
    assert again.card.preprocess.interpolation == card.interpolation
    torch.testing.assert_close(again(x), model(x))


def test_we_read_what_transformers_writes(tmp_path, record_property) -> None:
    import transformers

    settings = transformers.CvtConfig(
        embed_dim=[16, 32, 48], depth=[1, 2, 3], num_heads=[2, 4, 3], patch_sizes=[5, 3, 3], patch_stride=[3, 2, 2],
        patch_padding=[2, 1, 1], stride_kv=[3, 3, 3], id2label={0: "x", 1: "y"},
    )  # fmt: skip
    peer = transformers.CvtForImageClassification(settings).eval()
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    x = torch.randn(2, 3, 50, 40)
    compare(record_property, "cvt", "transformers", READS, model(x), peer(x).logits)
    assert model.card.classes == ("x", "y")


def test_we_read_a_bare_encoder(record_property) -> None:
    import transformers

    peer = transformers.CvtModel(transformers.CvtConfig(embed_dim=[16, 32, 48], depth=[1, 2, 3], num_heads=[1, 2, 3])).eval()
    model = load_model(peer.state_dict(), quiet=True, heads=(1, 2, 3))
    x = torch.randn(2, 3, 64, 64)
    assert model.config.num_classes == 0
    token = peer(x).cls_token_value[:, 0]
    compare(record_property, "cvt", "transformers", READS, model(x), torch.nn.functional.layer_norm(token, (48,), eps=1e-5))
