"""MViT: published sizes and costs, grids of the pools, one function for pictures and clips."""

from __future__ import annotations

import pytest
import torch
from tests.models.counting import measured

from vitrail.layers.attention import attention_sites, record_attention
from vitrail.models import create_model

# Parameters, and GMACs as printed: v1 paper, Table 4 (arXiv 2104.11227); v2 paper, Tables 4 and 5 (arXiv 2112.01526) with the
# model zoo of PySlowFast; exact counts from torchvision, timm and pytorchvideo.
PUBLISHED = {
    "mvit_base_16x4": (36_610_672, 70.5), "mvit_base_32x3": (36_611_440, 170), "mvit_base_64x3": (36_612_976, 455),
    "mvitv2_small_16x4": (34_537_744, 64), "mvitv2_base_32x3": (51_230_128, 225), "mvitv2_tiny": (24_173_320, 4.7),
    "mvitv2_small": (34_870_216, 7.0), "mvitv2_base": (51_472_744, 10.2),
}  # fmt: skip
COUNTED = {"mvit_base_16x4": 141_198_815_616, "mvitv2_small_16x4": 128_447_631_744, "mvitv2_tiny": 9_353_915_904,
           "mvit_base_32x3": 339_916_247_424}  # fmt: skip


def test_published_sizes_and_costs(run_python) -> None:
    found = measured(run_python, dict.fromkeys(PUBLISHED))
    for name, (parameters, printed) in PUBLISHED.items():
        assert found[name][0] == parameters
        # The papers' tables print 10.1024 as 10.2 and 224.47 as 225.
        assert found[name][1] / 2e9 == pytest.approx(printed, rel=0.011), name
    for name, flops in COUNTED.items():  # what torch counts in the public implementations
        assert found[name][1] == flops


def lively(name: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", ["mvit_micro", "mvitv2_micro_clip"])
def test_every_map_lies_on_the_grids_that_are_told(name: str) -> None:
    model = lively(name)
    with record_attention(model) as maps:
        model(torch.randn(1, 3, 6, 18, 13))  # nothing divides
    sites = model.attention_route((6, 18, 13)).sites
    grids = {name: (site.asking.grid, site.cells.grid) for name, site in sites.items()}
    assert set(grids) == set(attention_sites(model)) == set(maps)
    assert grids["blocks.0.attn.site"] == ((3, 9, 7), (3, 3, 2))
    for site, (queries, keys) in grids.items():
        rows, columns = maps[site].shape[-2:]
        prefix = model.config.prefix
        assert (rows, columns) == (prefix + torch.Size(queries).numel(), prefix + torch.Size(keys).numel())
        torch.testing.assert_close(maps[site].sum(-1), torch.ones(maps[site].shape[:-1]))
    last = model.features(torch.randn(1, 3, 6, 18, 13))
    assert last.grid == grids["blocks.2.attn.site"][0] == (3, 5, 4)


def test_stages_grow_and_coarsen() -> None:
    model = lively("mvit_micro")
    x = torch.randn(2, 3, 4, 16, 16)
    first, last = model.pyramid(x)
    assert (first.grid, first.tokens.shape) == ((2, 8, 8), (2, 129, 32))  # v1 has widened before the next scale begins
    assert (last.grid, last.tokens.shape) == ((2, 4, 4), (2, 33, 32))
    torch.testing.assert_close(last.tokens, model.features(x).tokens)
    assert lively("mvitv2_micro_clip").pyramid(x)[0].tokens.shape == (2, 128, 16)


@pytest.mark.parametrize("mode", ["conv", "max", "avg"])
def test_a_picture_is_a_clip_of_one_frame(mode: str) -> None:
    picture = lively("mvitv2_micro", pool_mode=mode)
    deep = {name: tuple((1, *steps) for steps in getattr(picture.config, name)) for name in ("query_strides", "key_strides")}
    clip = create_model(
        "mvitv2_micro", frames=1, patch_kernel=(1, 3, 3), patch_stride=(1, 2, 2), pool_kernel=(1, 3, 3), pool_mode=mode, **deep
    ).eval()
    state = {k: v.unsqueeze(2) if v.ndim == 4 else v for k, v in picture.state_dict().items()}
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected
    assert {key.rsplit(".", 1)[-1] for key in missing} == {"frames"}  # all at one time: the same bias for every key
    x = torch.randn(2, 3, 16, 12)
    torch.testing.assert_close(clip(x[:, :, None]), picture(x), atol=1e-4, rtol=1e-4)


def test_heads_share_their_pool() -> None:
    model = lively("mvitv2_micro")
    attention = model.blocks[2].attn
    pooled = attention.pool_k(torch.randn(1, 16, 32).repeat(1, 1, 1), (1, 4, 4), 2, 0)
    assert pooled.shape == (1, 4, 2, 16)
    tokens = torch.randn(1, 16, 16)
    both = attention.pool_k(torch.cat([tokens, tokens], 2), (1, 4, 4), 2, 0)
    torch.testing.assert_close(both[:, :, 0], both[:, :, 1])


def test_the_class_token_passes_by_the_pool_but_not_by_its_norm() -> None:
    attention = lively("mvit_micro").blocks[0].attn
    x = torch.randn(1, 1 + 2 * 8 * 8, 16)
    pooled = attention.pool_k(x, (2, 8, 8), 1, 1)
    torch.testing.assert_close(pooled[:, 0, 0], attention.pool_k.norm(x[:, 0]))
    moved = torch.cat([x[:, :1], x[:, 1:].roll(1, 1)], 1)
    torch.testing.assert_close(attention.pool_k(moved, (2, 8, 8), 1, 1)[:, 0], pooled[:, 0])


@pytest.mark.parametrize("position", ["none", "separable", "joint"])
def test_positions_tell_frames_and_places_apart(position: str) -> None:
    torch.manual_seed(0)
    model = lively("mvit_micro", position=position, pool_mode="max", pool_kernel=(1, 1, 1),
                   key_strides=((1, 1, 1), (1, 1, 1)), patch_kernel=(1, 1, 1), patch_stride=(1, 4, 4))  # fmt: skip
    x = torch.randn(1, 3, 4, 16, 16)
    blind = torch.allclose(model(x), model(x.flip(2)), atol=1e-4)
    assert blind == (position == "none")
    assert model(torch.randn(1, 3, 5, 8, 20)).shape == (1, 10)
    names = {n for n in model.no_weight_decay() if n.startswith("positions")}
    assert len(names) == {"none": 0, "separable": 3, "joint": 1}[position]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query_strides": ((1, 1), (3, 3))}, "nearest: 2, 4"),
        ({"pool_kernel": (3, 3, 3)}, r"pictures \(frames is None\) two"),
        ({"frames": 4}, "clips three"),
        ({"heads": (1, 3)}, "width 32 is not divisible by heads 3"),
        ({"widths": (16, 32, 64)}, "widths has 3 entries; depths names 2"),
        ({"pool": "cls"}, "allowed without a class token: mean"),
        ({"pool_mode": "sum"}, "allowed: conv, max, avg"),
    ],
)
def test_wrong_choices_name_the_right_ones(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("mvitv2_micro", **settings)
