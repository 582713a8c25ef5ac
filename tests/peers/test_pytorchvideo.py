"""MViT, X3D, SlowFast and Slow with pytorchvideo: it reads what we write strictly, we read what it makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.peers.pairs import READS, WRITES, compare
from torch import Tensor, nn

from vitrail.checkpoints import load_model, save_model

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")]
CLASSES = 11


class Peer(NamedTuple):
    """A small model of theirs, what to call on a clip, what our logits become to be compared, and the clip's shape."""

    family: str
    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor]
    ours: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    hints: dict[str, Any]


def _same(x: Tensor) -> Tensor:
    return x


def _mvit() -> nn.Module:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    return create_multiscale_vision_transformers(
        spatial_size=32, temporal_size=4, depth=4, patch_embed_dim=24, embed_dim_mul=[[1, 2.0], [3, 2.0]],
        atten_head_mul=[[1, 2.0], [3, 2.0]], pool_q_stride_size=[[1, 1, 2, 2], [3, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 4, 4], pool_kvq_kernel=[3, 3, 3], head_num_classes=CLASSES,
    )  # fmt: skip


def _x3d() -> nn.Module:
    from pytorchvideo.models.x3d import create_x3d

    return create_x3d(input_clip_length=4, input_crop_size=64, depth_factor=1.0, model_num_class=CLASSES,
                      width_factor=1.0, stem_dim_in=8, head_dim_out=64)  # fmt: skip


def _slowfast() -> nn.Module:
    from pytorchvideo.models.slowfast import create_slowfast

    return create_slowfast(model_depth=18, stem_dim_outs=(16, 2), model_num_class=CLASSES,
                           head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)))  # fmt: skip


def _slow() -> nn.Module:
    from pytorchvideo.models.resnet import create_resnet

    return create_resnet(model_depth=50, stem_dim_out=8, stem_conv_kernel_size=(1, 7, 7), model_num_class=CLASSES,
                         head_pool_kernel_size=(4, 2, 2))  # fmt: skip


def _two_pathways(model: nn.Module, x: Tensor) -> Tensor:
    slow = torch.linspace(0, x.shape[2] - 1, x.shape[2] // 4).long()
    return model([x[:, :, slow], x])


def _one_pathway(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


PEERS = {
    "mvit": Peer("mvit", _mvit, _one_pathway, _same, (3, 4, 32, 32), {"key_strides": ((1, 4, 4), (1, 2, 2), (1, 1, 1))}),
    "x3d": Peer("x3d", _x3d, _one_pathway, lambda logits: logits.softmax(-1), (3, 4, 64, 64), {"image_size": 64, "frames": 4}),
    "slowfast": Peer("slowfast", _slowfast, _two_pathways, _same, (3, 8, 64, 64), {"image_size": 64, "frames": 8}),
    "slow": Peer("slowfast", _slow, _one_pathway, _same, (3, 4, 64, 64), {"image_size": 64, "frames": 4}),
}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", PEERS)
def test_both_ways(name: str, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    peer = PEERS[name]
    theirs = randomised(peer.build())
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "published.pyth")
    ours = load_model(tmp_path / "published.pyth", quiet=True, **peer.hints).eval()
    assert ours.family == peer.family
    x = torch.randn(2, *peer.shape)
    with torch.no_grad():
        answer = peer.call(theirs, x)
        compare(record_property, name, "pytorchvideo", READS, peer.ours(ours(x)), answer, atol=2e-4, rtol=2e-4)

        changed = copy.deepcopy(ours)
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        save_model(changed, tmp_path / "written", format="pytorchvideo")
        back = peer.build().eval()
        back.load_state_dict(torch.load(tmp_path / "written" / "model.pyth", weights_only=True)["model_state"])
        compare(record_property, name, "pytorchvideo", WRITES, peer.ours(changed(x)), peer.call(back, x), atol=2e-4, rtol=2e-4)
        assert not torch.allclose(peer.call(back, x), answer, atol=1e-3)
