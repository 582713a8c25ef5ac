"""`vitrail convert` asks the peer itself."""

from __future__ import annotations

import pytest
import torch

from vitrail.checkpoints import save_model
from vitrail.checkpoints.parity import check_written
from vitrail.models import create_model

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("vit_micro_patch4_16", "timm"),
        ("vit_micro_patch4_16", "transformers"),
        ("vit_micro_patch4_16", "torchvision"),
        ("resnet18", "timm"),
        ("resnet18", "torchvision"),
    ],
)
def test_the_peer_is_asked(name: str, format: str, tmp_path) -> None:
    settings = {"norm_eps": 1e-12} if format == "transformers" else {}
    model = create_model(name, num_classes=3, image_size=32, **settings)
    torch.nn.init.normal_(model.head.linear.weight)
    parity = check_written(model, save_model(model, tmp_path / "out", format=format), format)
    assert parity.peer.startswith(format)
    assert parity.peer_difference is not None
    assert parity.agrees
    assert parity.lines()[-1].startswith(parity.peer)
