from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitrail.layers import attention
from vitrail.layers.attention import AttentionSite, attend, attention_sites, record_attention
from vitrail.models import create_model


def operands(tokens: int = 9, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, tokens, 8, generator=generator, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("biased", [False, True])
def test_both_kernels_agree(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    q, k, v = (t.requires_grad_() for t in operands())
    bias = torch.randn(1, 3, 9, 9, dtype=torch.float64) if biased else None
    results = []
    for fused in (True, False):
        monkeypatch.setattr(attention, "_prefers_fused", lambda *_, fused=fused: fused)
        out = attend(q, k, v, bias, site=AttentionSite(), scale=0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_takes_the_fused_kernel_for_inference_with_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = (t.bfloat16() for t in operands())
    trained = q.clone().requires_grad_()
    monkeypatch.setattr(attention, "LACKING", frozenset((torch.bfloat16,)))  # which then goes by float32
    assert attention._prefers_fused(q, k, None)
    monkeypatch.setattr(attention, "LACKING", frozenset())
    for tiles in (True, False):
        monkeypatch.setattr(attention, "_AMX", tiles)
        assert attention._prefers_fused(q, k, None) is tiles
        assert not attention._prefers_fused(trained, k, None)
        with torch.no_grad():
            assert attention._prefers_fused(trained, k, None) is tiles


def test_default_scale_is_the_head_dims() -> None:
    q, k, v = operands()
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, site=AttentionSite()), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_dropout_acts_in_training_only(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(attention, "_prefers_fused", lambda *_: fused)
    q, k, v = operands()
    site = AttentionSite(dropout=0.5)
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v, site=site.eval()), plain)
    assert not torch.allclose(attend(q, k, v, site=site.train()), plain)


def test_recorded_maps_are_the_probabilities() -> None:
    model = create_model("vit_micro_patch4_16").eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with record_attention(model) as maps:
        recorded = model(x)
    torch.testing.assert_close(recorded, expected, atol=1e-5, rtol=1e-5)
    assert list(maps) == [f"blocks.{i}.attn.site" for i in range(3)] == list(attention_sites(model))
    for weights in maps.values():
        assert weights.shape == (2, 4, 17, 17)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 17))
        assert not weights.requires_grad
    maps.clear()
    model(x)
    assert not maps, "nothing is recorded after the context"


def test_recording_some_sites_with_gradients() -> None:
    model = create_model("vit_micro_patch4_16")
    with record_attention(model, sites=r"blocks\.1\.", grad=True) as maps:
        model(torch.randn(1, 3, 16, 16))
    assert list(maps) == ["blocks.1.attn.site"]
    assert maps["blocks.1.attn.site"].requires_grad
    with record_attention(model, sites=["blocks.2.attn.site"]) as maps:
        model(torch.randn(1, 3, 16, 16))
    assert list(maps) == ["blocks.2.attn.site"]


@pytest.mark.parametrize(
    ("name", "sites", "message"),
    [
        ("resnet_micro", None, "this model has no attention to record"),
        ("vit_micro_patch4_16", "time", "no attention site matches 'time'; this model has: blocks.0"),
        ("vit_micro_patch4_16", ["x"], "no attention site 'x'; this model has: blocks.0"),
    ],
)
def test_nothing_to_record_is_an_error(name: str, sites: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), record_attention(create_model(name), sites=sites):
        pass


def test_sites_recover_from_an_error() -> None:
    model = create_model("vit_micro_patch4_16")
    with pytest.raises(ValueError, match="channels"), record_attention(model):
        model(torch.randn(1, 1, 16, 16))
    assert all(site.receiver is None for site in attention_sites(model).values())
