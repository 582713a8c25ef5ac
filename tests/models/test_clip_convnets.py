"""X3D and SlowFast: published sizes and costs, what each pathway sees, folding, non-local blocks."""

from __future__ import annotations

import pytest
import torch
from tests.models.counting import measured

from vitrail.cost import count_parameters
from vitrail.inference.engines import fold_batchnorm
from vitrail.layers.attention import record_attention
from vitrail.models import ShapesOnly, create_model
from vitrail.models.slowfast import NonLocal
from vitrail.models.x3d import squeeze_width

# (parameters, input, GMACs as printed): X3D's project page and the papers that cite XL; SlowFast paper, Table 2 and the model
# zoos (256 x 256 test crops). Counts of public implementations where there are any.
PUBLISHED = {
    "x3d_xs": (3_794_322, None, 0.60), "x3d_s": (3_794_322, None, 1.96), "x3d_m": (3_794_322, None, 4.73),
    "x3d_l": (6_153_432, None, 18.37), "x3d_xl": (11_095_904, (3, 16, 356, 356), 48.4),
    "slowfast_r50_4x16": (34_480_216, (3, 32, 256, 256), 36.1), "slowfast_r50_8x8": (34_566_488, (3, 32, 256, 256), 65.7),
    "slowfast_r101_8x8": (53_774_808, (3, 32, 256, 256), 106), "slowfast_r101_16x8": (53_774_808, (3, 64, 256, 256), 213),
    "slow_r50_4x16": (32_454_096, (3, 4, 256, 256), 27.3), "slow_r50_8x8": (32_454_096, (3, 8, 256, 256), 54.5),
    "slowfast_r101_16x8_nonlocal": (60_080_088, (3, 64, 256, 256), 234),
}  # fmt: skip


def test_published_sizes_and_costs(run_python) -> None:
    found = measured(run_python, {name: shape for name, (_, shape, _) in PUBLISHED.items()})
    for name, (parameters, _, printed) in PUBLISHED.items():
        assert found[name][0] == parameters, name
        assert found[name][1] / 2e9 == pytest.approx(printed, rel=0.009), name


def test_a_bare_first_shortcut_has_the_count_of_pytorchvideo() -> None:
    with ShapesOnly():
        assert count_parameters(create_model("x3d_m", plain_shortcut=True)) == 3_794_274


def test_widths_of_the_gates() -> None:
    assert [squeeze_width(n) for n in (54, 108, 216, 432, 72, 162, 306, 630)] == [8, 8, 16, 32, 8, 16, 24, 40]


def lively(name: str, **settings) -> torch.nn.Module:
    """A model whose normalisations have seen data and whose gains are not zero."""
    torch.manual_seed(0)
    model = create_model(name, **settings).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    torch.nn.init.normal_(model.head.linear.weight)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, *model.input_shape))
    return model.eval()


@pytest.mark.parametrize("name", ["x3d_micro", "slowfast_micro"])
def test_folding_keeps_the_function(name: str) -> None:
    model = lively(name)
    folded, x = fold_batchnorm(model), torch.randn(2, *model.input_shape)
    left = [n for n, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert all("nonlocal" in n for n in left)  # behind a product with a bias, and few
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["x3d_micro", "slowfast_micro"])
def test_published_probabilities(name: str) -> None:
    model = lively(name)
    x = torch.randn(2, *model.input_shape)
    with torch.inference_mode():
        assert model.position_logits(x).shape == (2, 1, 10)
        torch.testing.assert_close(model.probabilities(x), model(x).softmax(-1), atol=1e-6, rtol=1e-4)
        large = torch.randn(2, 3, 6, 40, 24)
        assert model.position_logits(large).shape[1] > 4
        assert not torch.allclose(model.probabilities(large), model(large).softmax(-1), atol=1e-4)
        torch.testing.assert_close(model.probabilities(large).sum(-1), torch.ones(2))
        assert model.position_logits(x[:, :, :2, :8]).shape == (2, 1, 10)  # smaller than the window


def test_which_frames_the_slow_pathway_sees() -> None:
    clip = torch.arange(32.0).view(1, 1, 32, 1, 1).expand(1, 3, 32, 8, 8)
    seen = {}
    for rule in ("every", "linspace"):
        slow, fast = create_model("slowfast_micro", alpha=4, slow_frames=rule).split(clip)
        seen[rule] = slow[0, 0, :, 0, 0].tolist()
        assert fast.shape[2] == 32
    assert seen == {"every": [0, 4, 8, 12, 16, 20, 24, 28], "linspace": [0, 4, 8, 13, 17, 22, 26, 31]}
    slow, fast = create_model("slowfast_micro", alpha=None).split(clip)
    assert fast is None
    assert slow.shape == clip.shape


def test_pooling_joins_the_means_of_both_pathways() -> None:
    model = lively("slowfast_micro")
    x = torch.randn(2, 3, 8, 16, 24)
    slow, fast = model.pathways(x)
    assert (slow.grid, fast.grid) == ((4, 2, 3), (8, 2, 3))
    features = model.features(x)
    assert features.grid == slow.grid
    torch.testing.assert_close(model.pool(features), torch.cat([slow.tokens.mean(1), fast.tokens.mean(1)], 1))
    first, last = model.pyramid(x)
    assert first.grid == (4, 4, 6)
    torch.testing.assert_close(last.tokens, features.tokens)
    alone = lively("slowfast_micro", alpha=None)
    torch.testing.assert_close(alone.features(x).tokens, alone.pathways(x)[0].tokens)


def test_non_local_blocks() -> None:
    model = lively("slowfast_micro")
    with record_attention(model) as maps:
        model(torch.randn(2, *model.input_shape))
    (site,) = maps
    assert site == "slow.stages.1.1.nonlocal_block.site"
    assert maps[site].shape == (2, 1, 2 * 2 * 2, 2 * 1 * 1)
    for kind in ("softmax", "dot_product"):
        block = NonLocal(6, kind).eval()
        x = torch.randn(2, 6, 2, 4, 4)
        q = block.query(x).flatten(2).transpose(1, 2)
        pooled = torch.nn.functional.max_pool3d(x, (1, 2, 2))
        k, v = (conv(pooled).flatten(2).transpose(1, 2) for conv in (block.key, block.value))
        logits = q @ k.transpose(1, 2)
        weights = (logits / 3**0.5).softmax(-1) if kind == "softmax" else logits / k.shape[1]
        mixed = block.norm(block.proj((weights @ v).transpose(1, 2).unflatten(2, (2, 4, 4))))
        torch.testing.assert_close(block(x), x + mixed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("slowfast_micro", frames=5), "nearest valid: 4 or 6"),
        (lambda: create_model("slowfast_micro", slow_frames="first"), "allowed: every, linspace"),
        (lambda: create_model("slowfast_micro", nonlocal_kind="gauss"), "allowed: softmax, dot_product"),
        (lambda: create_model("slowfast_micro", depths=(1, 1, 1)), "entries; depths names 3 stages"),
        (lambda: create_model("slowfast_micro", width=10), "width 10 is not divisible by beta_inv 4; nearest: 8"),
        (lambda: create_model("x3d_micro", depths=(1,)), "must name as many stages"),
    ],
)
def test_wrong_choices_name_the_right_ones(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
