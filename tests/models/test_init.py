"""Initial weights: as published, or scaled to the width where a model is narrow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrail.models import create_model

CHOOSE = ("vit_micro_patch4_16", "deit_micro", "swin_micro", "cvt_micro", "timesformer_micro", "mvit_micro")


def products(name: str, init: str) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    model = create_model(name, init=init)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n and m.weight.numel() > 255}


@pytest.mark.parametrize("name", CHOOSE)
def test_products_start_as_the_config_says(name: str) -> None:
    found = products(name, "normal")
    assert found
    for layer in found.values():
        if layer.weight.any():  # TimeSformer's steps over time start at zero
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert layer.bias is None or not layer.bias.any()
    for key, layer in products(name, "xavier").items():
        rows, columns = layer.weight.shape
        rows = rows // 3 if key.endswith("qkv") else rows  # q, k and v are products of their own
        assert layer.weight.abs().max().item() == pytest.approx((6 / (rows + columns)) ** 0.5, rel=0.1), key


@pytest.mark.parametrize("name", CHOOSE)
def test_an_unknown_start_is_refused_with_the_valid_ones(name: str) -> None:
    with pytest.raises(ValueError, match="xavier, normal"):
        create_model(name, init="kaiming")
