"""Patch embeddings for patches of another size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitrail.checkpoints import load_model, save_model
from vitrail.layers.embed import resize_patches
from vitrail.models import create_model


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (4, 7)])
def test_larger_patches_of_enlarged_pictures_give_the_same_tokens(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, patches = torch.randn(5, 3, 4, 6).double(), torch.randn(7, 3, 4, 6).double()
    wanted = torch.einsum("dchw,bchw->bd", weight, patches)
    larger = F.interpolate(patches, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.einsum("dchw,bchw->bd", resize_patches(weight, size), larger), wanted)


def test_smaller_patches_are_the_least_squares_answer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 1, 6, 6).double()
    shrink = torch.stack([
        F.interpolate(basis.view(1, 1, 6, 6), (3, 4), mode="bilinear").flatten() for basis in torch.eye(36).double()
    ])  # fmt: skip
    wanted = (torch.linalg.pinv(shrink) @ weight.flatten(1).T).T
    torch.testing.assert_close(resize_patches(weight, (3, 4)).flatten(1), wanted)
    assert resize_patches(weight, (6, 6)) is weight


def test_a_checkpoint_is_loaded_with_other_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16")
    torch.nn.init.normal_(model.head.linear.weight)
    path = save_model(model, tmp_path / "model.safetensors")
    larger = load_model(path, patch=(8, 8), image_size=32)  # the same grid of twice the pixels
    assert "resized: embed.proj.weight (32, 3, 4, 4) -> (32, 3, 8, 8)" in capsys.readouterr().err
    picture = torch.randn(1, 3, 4, 4)
    blocks = F.interpolate(picture, (16, 16), mode="nearest")
    smooth = blocks.unflatten(2, (4, 4)).unflatten(4, (4, 4))  # every patch enlarged by itself
    enlarged = F.interpolate(smooth.permute(0, 2, 4, 1, 3, 5).reshape(16, 3, 4, 4), (8, 8), mode="bilinear")
    enlarged = enlarged.view(1, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 32, 32)
    torch.testing.assert_close(larger(enlarged), model.eval()(blocks), atol=1e-4, rtol=1e-4)
    assert load_model(path, patch=(2, 2), quiet=True).config.grid == (8, 8)
