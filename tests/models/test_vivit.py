"""The four models of ViViT: what attends to what, what it costs, and the published sizes."""

from __future__ import annotations

import pytest
import torch

from vitrail import cost
from vitrail.layers.attention import record_attention
from vitrail.layers.fold import SCHEMES, fold, groups_per_axis, unfold
from vitrail.models import ShapesOnly, create_model

# arXiv 2103.15691, Table 2: parameters in millions (as counted from the text; the paper prints 88.9, 115.1, 117.3, 88.9).
PARAMETERS = {
    "vivit_base_16x2": 88_954_000, "vivit_base_16x2_factorised_encoder": 115_062_928,
    "vivit_base_16x2_factorised_self_attention": 117_319_312, "vivit_base_16x2_factorised_dot_product": 88_952_464,
}  # fmt: skip
MODELS = ("joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")


def small(model: str, **settings) -> torch.nn.Module:
    made = create_model("vivit_micro", model=model, **{"pool": "mean", **settings}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with ShapesOnly():
        model = create_model(name)
    assert cost.count_parameters(model) == PARAMETERS[name]


def test_averaging_frames_is_the_smallest_model_of_table_2() -> None:
    with ShapesOnly():
        model = create_model("vivit_base_16x2_factorised_encoder", temporal_depth=0)
    assert round(cost.count_parameters(model) / 1e6, 1) == 86.7
    tiny = small("factorised_encoder", temporal_depth=0, pool="cls")
    x = torch.randn(2, *tiny.input_shape)
    within, frames = tiny.pyramid(x)
    assert (within.grid, frames.grid, frames.prefix) == ((2, 4, 4), (2, 1, 1), 0)
    torch.testing.assert_close(tiny(x.flip(2)[:, :, [1, 0, 3, 2]]), tiny(x))  # the order of tubelets does not matter


@pytest.mark.parametrize("frames", [4, 6, 10])
@pytest.mark.parametrize("model", MODELS)
def test_attention_costs_what_the_paper_says(model: str, frames: int) -> None:
    """Products of queries and keys, and of weights and values: 2 * 2 FLOPs per pair and channel (section 3.3)."""
    made = create_model("vivit_micro", model=model, pool="mean", frames=frames)
    c, t, s = made.config, frames // 2, 16
    pairs = {
        "joint": c.depth * (s * t) ** 2,
        "factorised_encoder": c.depth * t * s**2 + c.temporal_depth * t**2,
        "factorised_self_attention": c.depth * (t * s**2 + s * t**2),
        "factorised_dot_product": c.depth * (t * s**2 + s * t**2) // 2,
    }[model]
    tokens = {"factorised_encoder": c.depth * s * t + c.temporal_depth * t}.get(model, c.depth * s * t)
    attention_products = 8 * (2 if model == "factorised_self_attention" else 1) * c.width**2
    products = tokens * (attention_products + 4 * c.width * c.mlp_dim)
    rest = 2 * s * t * c.width * 3 * 2 * 4 * 4 + 2 * c.width * c.num_classes
    assert cost.count_flops(made) == products + rest + 4 * c.width * pairs


@pytest.mark.parametrize(
    ("model", "settings", "sites"),
    [
        ("factorised_encoder", {"pool": "cls", "temporal_heads": 2}, {"blocks.0.attn.site": (4, 4, 17, 17),
                                                                      "temporal_blocks.3.attn.site": (2, 2, 3, 3)}),
        ("factorised_self_attention", {}, {"blocks.0.attn.time.site": (32, 4, 2, 2),
                                           "blocks.0.attn.space.site": (4, 4, 16, 16)}),
        ("factorised_dot_product", {}, {"blocks.0.attn.time": (32, 2, 2, 2), "blocks.0.attn.space": (4, 2, 16, 16)}),
    ],
)  # fmt: skip
def test_sites_tell_time_from_space(model: str, settings: dict, sites: dict) -> None:
    made = small(model, **settings)
    x = torch.randn(2, *made.input_shape)
    with record_attention(made) as maps:
        recorded = made(x)
    torch.testing.assert_close(recorded, made(x), atol=1e-5, rtol=1e-4)
    assert {name: tuple(maps[name].shape) for name in sites} == sites


@pytest.mark.parametrize("model", MODELS[2:])
def test_factorised_attention_is_joint_attention_under_masks(model: str) -> None:
    """A block's first attention, from its own products, with every pair of another frame or place masked out."""
    made = small(model, width=16, heads=4, depth=1)
    grid, heads, d = (2, 4, 4), 4, 4
    x = torch.randn(2, 32, 16)
    t, place = torch.arange(32) // 16, torch.arange(32) % 16
    seen = {"time": place[:, None] == place, "space": t[:, None] == t}

    def masked(qkv: torch.nn.Linear, y: torch.Tensor, axis: str) -> torch.Tensor:
        q, k, v = qkv(y).view(2, 32, 3, heads, d).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / d**0.5).masked_fill(~seen[axis], -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2)

    block = made.blocks[0]
    if model == "factorised_dot_product":
        over = [masked(block.attn.qkv, block.norm1(x), axis) for axis in ("time", "space")]
        y = x + block.attn.proj(torch.cat([over[0][:, :, :2], over[1][:, :, 2:]], 2).flatten(2))
    else:
        y = x
        for axis in ("time", "space"):
            attn = block.attn[axis]
            y = y + attn.proj(masked(attn.qkv, block.norm[axis](y), axis).flatten(2))
    torch.testing.assert_close(block(x, grid), y + block.mlp(block.norm2(y)), atol=1e-5, rtol=1e-4)


def test_order_of_factorised_self_attention() -> None:
    first = small("factorised_self_attention")
    second = create_model("vivit_micro", model="factorised_self_attention", pool="mean", order="space_time").eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, *first.input_shape)
    assert list(second.blocks[0].attn) == ["space", "time"]
    assert not torch.allclose(first(x), second(x), atol=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_and_exports(model: str) -> None:
    made = create_model("vivit_micro", model=model, pool="mean", drop_path=0.1, position="separate")
    torch.nn.init.normal_(made.head.linear.weight)
    made.set_checkpointing()
    x = torch.randn(4, *made.input_shape)
    made(x).square().sum().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    ids = made.layer_ids()
    assert sorted(set(ids.values())) == list(range(max(ids.values()) + 1))
    program = torch.export.export(made.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    torch.testing.assert_close(program.module()(x[:3]), made(x[:3]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_of_tokens(scheme: str) -> None:
    grid = (4, 6, 2)
    numbers = torch.arange(2 * 48).view(2, 48, 1)
    groups = fold(numbers.float(), grid, scheme).long()
    assert torch.equal(unfold(groups.float(), grid, scheme).long(), numbers)
    t, h, w = torch.unravel_index(groups[..., 0] % 48, grid)
    same = {
        "time": (h, w), "space": (t,), "width": (t, h), "height": (t, w), "local": (h // 3, w), "sparse": (t % 2, h % 2, w % 2),
    }[scheme]  # fmt: skip
    assert all((coordinate == coordinate[:, :1]).all() for coordinate in same)
    cuts = groups_per_axis(grid, scheme)
    assert groups.shape == (2 * cuts[0] * cuts[1] * cuts[2], 48 // (cuts[0] * cuts[1] * cuts[2]), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "factorised_dot_product"}, "allowed pool: mean"),
        ({"model": "factorised_dot_product", "pool": "mean", "heads": 1}, "nearest: 2"),
        ({"model": "sparse"}, "allowed: joint, factorised_encoder"),
        ({"frames": 5}, "5 frames .* nearest valid: 4 or 6"),
        ({"image_size": (18, 16)}, "nearest valid: 16x16 or 20x16"),
        ({"temporal_heads": 5}, "nearest valid: 4 or 2"),
    ],
)
def test_wrong_choices_name_the_right_ones(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("vivit_micro", **settings)
