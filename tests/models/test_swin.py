"""Swin: windows and masks against brute force, attention back on the map, what it costs, and its configuration."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitrail.cost import count_flops
from vitrail.layers.attention import record_attention
from vitrail.layers.window import window_mask, window_rows
from vitrail.models import MODELS, create_model
from vitrail.models.swin import FITS, SwinConfig

V1, V2 = "swin_micro", "swinv2_micro"


def random_swin(name: str = V1, **settings):
    torch.manual_seed(0)
    model = create_model(name, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def brute_force(grid, window, shift, pad_first):
    """Windows by following every token one by one: {window: {row: token}}, and whether two tokens may see each other."""
    (h, w), (wh, ww), (sy, sx) = grid, window, shift
    padded_h, padded_w = -(-h // wh) * wh, -(-w // ww) * ww
    places = {}
    for y, x in itertools.product(range(padded_h), range(padded_w)):
        roll_h, roll_w = (padded_h, padded_w) if pad_first else (h, w)
        if not pad_first and (y >= h or x >= w):
            continue  # padding stays where it is
        to = ((y - sy) % roll_h, (x - sx) % roll_w)
        token = y * w + x if y < h and x < w else -1
        places[to] = token
    rows, regions = {}, {}
    for y, x in itertools.product(range(padded_h), range(padded_w)):
        window_index, row = (y // wh) * (padded_w // ww) + x // ww, (y % wh) * ww + x % ww
        rows[window_index, row] = places.get((y, x), -1)
        # Rolled in from the other side: the last `shift` rows or columns of the padded map.
        regions[window_index, row] = (bool(sy) and y >= padded_h - sy, bool(sx) and x >= padded_w - sx)
    return rows, regions


@pytest.mark.parametrize("pad_first", [True, False])
@pytest.mark.parametrize(("grid", "window", "shift"), [
    ((11, 9), (4, 4), (2, 2)), ((5, 13), (4, 3), (2, 1)), ((7, 7), (7, 7), (0, 0)), ((3, 10), (4, 4), (0, 2)),
    ((3, 5), (4, 4), (2, 2)),
])  # fmt: skip
def test_windows_and_masks_against_brute_force(grid, window, shift, pad_first: bool) -> None:
    rows, mask = window_rows(grid, window, shift, pad_first), window_mask(grid, window, shift)
    expected, regions = brute_force(grid, window, shift, pad_first)
    assert rows.shape == (len(expected) // rows.shape[1], window[0] * window[1])
    for (w, r), token in expected.items():
        assert rows[w, r] == token
        for other in range(rows.shape[1]):
            assert bool(mask[w, r, other]) == (regions[w, r] != regions[w, other])
    assert sorted(rows[rows >= 0].tolist()) == list(range(grid[0] * grid[1]))


def test_attention_maps_lead_back_to_pixels() -> None:
    """A huge key at one patch draws the attention of its whole window and of nobody else."""
    size = (22, 18)  # maps of 11x9 tokens: padded windows
    model = random_swin(image_size=size)
    grid = model.attention_route(size).first.grid[1:]
    planted = 4 * grid[1] + 5
    with torch.no_grad():
        for block in model.stages[0].blocks:
            block.attn.bias.table.zero_()
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.qkv.bias[:16] = 1.0  # all queries alike; keys answer to channel 0 of the token
            block.attn.qkv.weight[16:32, 0] = 1.0
            block.norm1.weight.fill_(1.0), block.norm1.bias.zero_()
            for parameter in (*block.attn.proj.parameters(), *block.mlp.parameters()):
                parameter.zero_()
        model.embed_norm.weight.fill_(1.0), model.embed_norm.bias.zero_()
        model.embed.proj.weight.zero_(), model.embed.proj.bias.zero_()
        model.embed.proj.weight[0, 0] = 1.0
    picture = torch.zeros(1, 3, *size)
    y, x = divmod(planted, grid[1])
    picture[0, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 10.0
    with torch.no_grad(), record_attention(model, sites=r"stages\.0\.") as maps:
        model.features(picture)
    for site, weights in maps.items():
        rows = model.attention_route(size).sites[site].queries
        received = torch.zeros(grid[0] * grid[1] + 1)
        shares = weights.mean(1).amax(1)  # the most that any query of the window gives each key
        received.scatter_reduce_(0, torch.where(rows < 0, grid[0] * grid[1], rows).flatten(), shares.flatten(), "amax")
        assert int(received[:-1].argmax()) == planted
        assert received[planted] > 0.3


@pytest.mark.parametrize("name", [V1, V2])
def test_shifted_windows_carry_news_across_borders(name: str) -> None:
    model = random_swin(name, depths=(2,), heads=(2,), image_size=(32, 32))
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 0:2, 0:2] += 1.0  # the first patch
    moved = (model.features(changed).maps() - model.features(x).maps()).abs().amax(1)[0, 0] > 1e-7
    # Its window is rows and columns 0-3; shifted by 2, windows of 2-5 pass it on; those that wrap around are masked.
    assert moved[:6, :6].all()
    assert not moved[6:].any()
    assert not moved[:, 6:].any()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("pad_first", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (34, 6)])
def test_every_plan_runs_and_agrees_with_whole_window_attention(fit: str, pad_first: bool, size) -> None:
    model = random_swin(fit=fit, pad_first=pad_first, image_size=size)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    for s, stage in enumerate(model.stages):
        plan = stage.plan(*stage.built)
        assert plan.plain.mask is None
        assert (plan.shifted.mask is not None) == (model.config.shift(s, stage.built[1]) != (0, 0))


def test_where_maps_fit_the_window() -> None:
    def shifts(fit: str, image, window=(7, 7)):
        c = SwinConfig(image_size=image, fit=fit, window=window)
        grids = [(image[0] // 4 >> s, image[1] // 4 >> s) for s in range(4)]
        return [c.windows[s] for s in range(4)], [c.shift(s, grids[s]) for s in range(4)]

    same = ([(7, 7)] * 4, [(3, 3)] * 3 + [(0, 0)])
    for fit in ("built", "built_both", "call", "call_both"):  # the published size: all sources agree
        assert shifts(fit, (224, 224)) == same
    assert shifts("always", (224, 224))[1] == [(3, 3)] * 4
    windows, moved = shifts("built", (128, 448))
    assert (windows[3], moved[3]) == ((4, 7), (0, 3))
    windows, moved = shifts("built_both", (128, 448))
    assert (windows[3], moved[3]) == ((4, 4), (0, 0))
    windows, moved = shifts("call", (128, 448))
    assert (windows[3], moved[3]) == ((7, 7), (0, 3))
    windows, moved = shifts("call_both", (128, 448))
    assert (windows[3], moved[3]) == ((7, 7), (0, 0))


def test_other_sizes_follow_the_fit() -> None:
    """Built for 16x16 (second map 4x4, as large as the window), called with 32x32 (second map 8x8)."""
    built, called = random_swin(fit="built"), random_swin(fit="call")
    called.load_state_dict(built.state_dict())
    small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(built(small), called(small))
    assert not torch.allclose(built(large), called(large))
    site = "stages.1.blocks.1.attn.site"
    rows = built.attention_route((32, 32)).sites[site].queries
    assert torch.equal(rows, window_rows((8, 8), (4, 4)))
    rows = called.attention_route((32, 32)).sites[site].queries
    assert torch.equal(rows, window_rows((8, 8), (4, 4), (2, 2)))


def attention_flops(model, size: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter, record_attention(model):  # recorded attention is two plain products
        model(torch.randn(1, 3, size, size))
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "bmm" in str(op))


def test_windowed_attention_costs_grow_with_the_pixels_and_global_ones_with_their_square() -> None:
    windowed = create_model(V1, image_size=64).eval()
    glob = create_model("vit_micro_patch4_16", image_size=64, class_token=False, pool="mean").eval()
    assert attention_flops(windowed, 128) == 4 * attention_flops(windowed, 64)
    assert attention_flops(glob, 128) == 16 * attention_flops(glob, 64)


# From the field's own counters: torchvision's documentation and FlopCounterMode on timm's and torchvision's models.
@pytest.mark.parametrize(("name", "flops"), [
    ("swin_tiny_patch4_window7_224", 8_981_133_312), ("swin_base_patch4_window12_384", 94_166_269_952),
    ("swinv2_tiny_window16_256", 13_321_238_528),
])  # fmt: skip
def test_published_costs(name: str, flops: int) -> None:
    assert count_flops(create_model(name)) == pytest.approx(flops, rel=2e-4)


@pytest.mark.parametrize("name", [V1, V2])
def test_the_bias_is_made_once_per_weights(name: str) -> None:
    model, x = random_swin(name), torch.randn(1, 3, 16, 16)
    attention = model.stages[0].blocks[1].attn
    made, combine = [], attention._combine
    attention._combine = lambda *a: made.append(1) or combine(*a)
    weight = next(attention.bias.parameters())

    def runs() -> int:
        made.clear()
        for _ in range(2):
            with torch.inference_mode():
                model(x)
        return len(made)

    assert runs() == 1
    assert runs() == 0
    with torch.no_grad():
        weight.add_(0.1)
    assert runs() == 1
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert runs() == 1
    model.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}, assign=True)
    assert runs() == 1
    model.train().eval()
    weight = next(attention.bias.parameters())
    weight.data.mul_(2.0)
    assert runs() == 1
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        made.clear(), model(x), model(x)
    assert len(made) == 1
    model.double(), made.clear()
    with torch.no_grad():
        assert model(x.double()).dtype == torch.float64
    assert len(made) == 1
    made.clear()
    model(x.double()).sum().backward()  # eval mode, but with a gradient
    assert len(made) == 1
    assert weight.grad is None or weight.grad.abs().sum() > 0
    model.train(), made.clear()
    model(x.double()), model(x.double())
    assert len(made) == 2


@pytest.mark.parametrize("name", [V1, V2])
def test_kept_answers_equal_fresh_ones(name: str) -> None:
    model = random_swin(name)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.mul_(1.5), b.mul_(1.5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), twin(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), twin(x))
        for size in ((18, 14), (24, 10), (18, 14)):  # sizes it is not built for
            y = torch.randn(1, 3, *size)
            torch.testing.assert_close(model(y), twin(y))
    torch.testing.assert_close(model.train()(x), twin.train()(x))  # layouts made in inference mode serve training too
    model(torch.randn(1, 3, 18, 14)).sum().backward()


def test_pyramid() -> None:
    model = random_swin()
    x = torch.randn(2, 3, 16, 24)
    first, last = model.pyramid(x)
    assert (first.grid, last.grid) == ((1, 8, 12), (1, 4, 6))
    assert (first.tokens.shape, last.tokens.shape) == ((2, 96, 16), (2, 24, 32))
    torch.testing.assert_close(last.tokens, model.features(x).tokens)


def test_numbering_and_decay() -> None:
    model = create_model(V2, position_table=True)
    ids, free = model.layer_ids(), model.no_weight_decay()
    assert ids["stages.1.merge.reduction.weight"] == ids["stages.0.blocks.1.mlp.fc1.weight"] == 2
    assert (ids["position.table"], ids["norm.weight"]) == (0, 5)
    assert {"position.table", "stages.0.blocks.0.attn.logit_scale", "stages.1.blocks.1.attn.bias.fc2.weight"} <= free
    assert not any("qkv" in name or "mlp" in name for name in free)


@pytest.mark.parametrize(("change", "message"), [
    ({"fit": "calls"}, "allowed: built, built_both, call"), ({"version": 3}, "allowed: 1, 2"),
    ({"heads": (2, 5)}, "not divisible"), ({"heads": (2,)}, "one positive number per stage"),
    ({"window": (0, 4)}, "at least"), ({"image_size": (15, 16)}, "14x16 or 16x16"),
    ({"pretrained_windows": ((8, 8),)}, "names 1 stages of 2"), ({"bias_resize": "cubic"}, "allowed: bicubic_corners"),
])  # fmt: skip
def test_wrong_settings_name_the_right_ones(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(V1, **change)


def test_rows_of_the_registry() -> None:
    assert [n for n in MODELS if n.startswith("swin_tiny")] == ["swin_tiny_patch4_window7_224"]
    assert MODELS["swinv2_base_window16_256"].windows == ((16, 16), (16, 16), (16, 16), (8, 8))
