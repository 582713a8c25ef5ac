from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitrail.inspection.attention import PLAIN, RESIDUAL, NoPathError, Placed, distance, even_distance, look, rollout, spans
from vitrail.layers.attention import attention_sites, record_attention
from vitrail.layers.route import Cells, Links, Route, Site, Step, tile, whole
from vitrail.models import create_model

VARIED: list[tuple[str, dict]] = [
    ("vit_micro_patch4_16", {"pool": "cls_mean", "registers": 2}),
    ("deit_micro", {}),
    ("hybrid_micro", {}),
    ("swin_micro", {"fit": "call", "image_size": (22, 18)}),  # maps of 11 x 9: windows padded and shifted, merging rounds up
    ("swinv2_micro", {"pad_first": False, "image_size": (22, 18)}),
    ("cvt_micro", {"image_size": (18, 13)}),
    ("mvitv2_micro", {"image_size": (18, 13)}),
    ("mvitv2_micro_clip", {}),
    ("mvit_micro", {}),
    ("vivit_micro", {}),
    ("vivit_micro", {"model": "factorised_encoder"}),
    ("vivit_micro", {"model": "factorised_encoder", "pool": "mean", "temporal_depth": 0}),
    ("vivit_micro", {"model": "factorised_self_attention", "pool": "mean"}),
    ("vivit_micro", {"model": "factorised_dot_product", "pool": "mean"}),
    *(("timesformer_micro", {"attention": scheme}) for scheme in ("space", "joint", "divided", "local_global", "axial")),
    ("slowfast_micro", {"nonlocals": ((), (0,))}),
]


def lively(name: str, **settings):
    """A micro model whose every parameter counts."""
    torch.manual_seed(0)
    model = create_model(name, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def route_of(model) -> Route:
    return model.attention_route(model.input_shape[1:])


def planted(site: Site, choose) -> torch.Tensor:
    """(g, 1, n, m) in which row i of group g looks at the column that `choose` picks of the offsets (m, 3) to its keys."""
    asked, held = (
        torch.cat([cells.centres(), torch.full((1, 3), math.nan)])[rows]
        for cells, rows in ((site.asking, site.queries), (site.cells, site.keys))
    )
    weights = torch.zeros(len(asked), 1, asked.shape[1], held.shape[1])
    for g, i in itertools.product(range(len(asked)), range(asked.shape[1])):
        weights[g, 0, i, choose(held[g] - asked[g, i])] = 1
    return weights


def beside(offsets: torch.Tensor, step: float, axis: int = 2) -> int:
    """The key one step to the left, or to the right at the edge; the first where there is neither."""
    others = [a for a in range(3) if a != axis]
    for wanted in (-step, step):
        found = (offsets[:, axis] == wanted) & (offsets[:, others] == 0).all(1)
        if found.any():
            return int(found.nonzero()[0])
    return 0


@pytest.mark.parametrize(("name", "settings"), VARIED)
def test_the_route_of_every_family_fits_what_is_recorded(name: str, settings: dict) -> None:
    model = lively(name, **settings)
    route = route_of(model)
    assert list(route.sites) == list(attention_sites(model))
    inputs = torch.randn(2, *model.input_shape)
    with record_attention(model) as maps, torch.no_grad():
        model(inputs)
    count = route.first.tokens
    for step in route.steps:
        for site in step.sites:
            groups, queries, keys = len(site.queries), site.queries.shape[1], site.keys.shape[1]
            assert maps[site.name].shape[0] == 2 * groups == 2 * len(site.keys)
            assert maps[site.name].shape[2:] == (queries, keys)
            assert int(site.queries.max()) < site.asking.tokens == step.after.tokens
            assert int(site.keys.max()) < site.cells.tokens
            if route.readout:
                assert (count if site.links is None else site.links.counts[1]) == count
        assert step.shortcut is None or not route.readout or step.shortcut.counts == (step.after.tokens, count)
        count = step.after.tokens
    for weights in route.readout.values():
        assert weights.shape == (count,)
        assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("blend", [RESIDUAL, PLAIN])
@pytest.mark.parametrize(("name", "settings"), VARIED[:-1])
def test_rollout_rows_stay_shares(name: str, settings: dict, blend) -> None:
    model = lively(name, **settings)
    route = route_of(model)
    with record_attention(model) as maps, torch.no_grad():
        model.pool(model.features(torch.randn(2, *model.input_shape)))
    learned = [step.shortcut for step in route.steps if not step.sites and step.shortcut is not None]
    sums = rollout(route, maps, blend=blend).sum(-1)
    if all(len(links.later.unique()) == links.counts[0] for links in learned):
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:  # a class token that joins on the way brings nothing from the input
        assert (sums > 0).all()
        assert (sums < 1 + 1e-5).all()


REACH = [
    ("swin_micro", {"depths": (2,), "heads": (2,), "image_size": (22, 18), "fit": "call"}),
    ("swinv2_micro", {"depths": (2,), "heads": (2,), "image_size": (22, 18), "pad_first": False}),
    ("swin_micro", {"depths": (1, 1), "image_size": (22, 18)}),
    ("vivit_micro", {"model": "factorised_encoder", "depth": 1}),
    ("vivit_micro", {"model": "factorised_self_attention", "pool": "mean", "depth": 1}),
    ("vivit_micro", {"model": "factorised_dot_product", "pool": "mean", "depth": 1}),
    *(("timesformer_micro", {"attention": scheme, "depth": 1}) for scheme in ("space", "divided", "local_global", "axial")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), REACH)
def test_a_changed_patch_reaches_the_tokens_that_the_rollout_says_and_no_others(name: str, settings: dict) -> None:
    model = lively(name, **settings).double()
    route, inputs = route_of(model), torch.randn(1, *model.input_shape, dtype=torch.float64)
    with record_attention(model, reduce=lambda _, weights: weights.double()) as maps, torch.no_grad():
        before = model.features(inputs)
        joint = rollout(route, maps)[0]
    cells = route.first
    centre = cells.centres()[cells.prefix + 5]
    t, y, x = (int(place - step / 2) for place, step in zip(centre, cells.step, strict=True))
    height, width = (int(step) for step in cells.step[1:])
    changed = inputs.clone()
    changed[..., y : y + height, x : x + width] += 1 if inputs.ndim == 4 else 0
    if inputs.ndim == 5:
        changed[:, :, t : t + int(cells.step[0]), y : y + height, x : x + width] += 1
    with torch.no_grad():
        moved = (model.features(changed).tokens - before.tokens).abs().amax(2)[0] > 1e-9
    reached = joint[:, cells.prefix + 5] > 1e-7  # a masked window gives exp(-100)
    if len(reached) > len(moved):  # the class tokens of the frames were averaged
        tokens = reached[: cells.prefix]
        reached = torch.cat([tokens.any()[None], reached[cells.prefix :]])
    assert torch.equal(moved, reached)
    assert not model.takes_clips or moved.any()


@pytest.mark.parametrize("blend", [RESIDUAL, PLAIN])
def test_rollout_of_identity_attention_is_the_identity(blend) -> None:
    for name, settings in VARIED:
        model = lively(name, **settings)
        route = route_of(model)
        pure = [step for step in route.steps if all(s.links is None for s in step.sites) and step.shortcut is not None]
        steps = [step for step in pure if step.sites and step.after == pure[0].after]
        if not steps or not route.readout:
            continue
        eyes = {s.name: torch.eye(s.keys.shape[1]).expand(len(s.keys), 2, -1, -1) for step in steps for s in step.sites}
        found = rollout(Route(steps[0].after, tuple(steps)), eyes, blend=blend)
        torch.testing.assert_close(found[0], torch.eye(steps[0].after.tokens), atol=1e-6, rtol=0, msg=name)


def test_identity_attention_through_merging_is_the_mean_of_what_was_merged() -> None:
    model = create_model("swin_micro", image_size=(16, 12))  # maps of 8 x 6, then 4 x 3
    route = route_of(model)
    eyes = {name: torch.eye(site.keys.shape[1]).expand(len(site.keys), 1, -1, -1) for name, site in route.sites.items()}
    found = rollout(route, eyes)[0].view(4, 3, 8, 6)
    expected = torch.zeros(4, 3, 8, 6)
    for y, x in itertools.product(range(4), range(3)):
        expected[y, x, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 0.25
    torch.testing.assert_close(found, expected)


def test_pooled_keys_give_their_window_in_equal_shares() -> None:
    """CvT's keys see three by three tokens, every second one; a window that leaves the map shares out what is inside."""
    model = create_model("cvt_micro", depths=(1, 1, 1))
    route = route_of(model)
    assert route.first == Cells((1, 8, 8), (0.5, 0.5, 0.5), (1.0, 2.0, 2.0))  # a kernel of 3 is centred on every second pixel
    site = route.sites["stages.0.blocks.0.attn.site"]
    weights = torch.zeros(1, 1, 64, 16)
    weights[..., 5] = 1  # everybody looks at key (1, 1), centred on token (2, 2)
    found = rollout(Route(route.first, route.steps[:1]), {site.name: weights}, blend=PLAIN)[0, 0].view(8, 8)
    expected = torch.zeros(8, 8)
    expected[1:4, 1:4] = 1 / 9
    torch.testing.assert_close(found, expected)
    weights = weights.roll(-5, 3)  # key (0, 0), on token (0, 0): a window of which four tokens lie on the map
    found = rollout(Route(route.first, route.steps[:1]), {site.name: weights}, blend=PLAIN)[0, 0].view(8, 8)
    assert found[:2, :2].flatten().tolist() == pytest.approx([0.25] * 4)
    assert site.cells.centres()[5].tolist() == [0.5, 4.5, 4.5]


def test_rollout_follows_the_path_backwards_through_the_layers() -> None:
    cells = tile((1, 1, 3), (1, 3))
    route = Route(cells, (whole("first", cells), whole("second", cells)))
    one_hot = torch.nn.functional.one_hot
    first = one_hot(torch.tensor([1, 2, 0]), 3).float()[None, None]  # token i of layer 1 comes from i + 1 of the input
    second = one_hot(torch.tensor([2, 2, 2]), 3).float()[None, None]  # all of layer 2 comes from token 2 of layer 1
    maps = {"first": first, "second": second}
    assert rollout(route, maps, blend=PLAIN)[0].argmax(1).tolist() == [0, 0, 0]
    expected = (0.5 * second[0, 0] + 0.5 * torch.eye(3)) @ (0.5 * first[0, 0] + 0.5 * torch.eye(3))
    torch.testing.assert_close(rollout(route, maps)[0], expected)
    torch.testing.assert_close(rollout(route, maps, torch.tensor([[[0.0, 0.5, 0.5]]]))[0, 0], expected[1:].mean(0))


def test_copies_of_a_token_are_the_mean_of_their_answers() -> None:
    cells = tile((2, 1, 1), (2, 1, 1), prefix=1)
    site = Site("copies", torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0, 1], [0, 2]]), cells, cells)
    links = Links(torch.arange(3), torch.arange(3), torch.ones(3), (3, 3))
    weights = torch.tensor([[[[0.2, 0.8], [0, 1]]], [[[1.0, 0.0], [0, 1]]]])
    found = rollout(Route(cells, (Step(cells, (site,), links),)), {"copies": weights}, blend=PLAIN)
    torch.testing.assert_close(found[0, 0], torch.tensor([0.6, 0.4, 0.0]))


def test_rollout_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        rollout(Route(tile((1, 2, 2), (2, 2))), {})


@pytest.mark.parametrize("fit", ["built", "call"])
def test_a_head_that_looks_beside_itself_has_the_distance_of_a_patch_through_shifted_windows(fit: str) -> None:
    model = create_model("swin_micro", image_size=(32, 24), fit=fit)  # maps of 16 x 12 and 8 x 6; windows of 4 x 4
    for name, site in route_of(model).sites.items():
        pixels = site.cells.step[2]
        assert pixels == (2.0 if name.startswith("stages.0") else 4.0)
        for axis in (1, 2):
            weights = planted(site, lambda offsets, axis=axis, pixels=pixels: beside(offsets, pixels, axis))
            if (site.queries >= 0).all() and site.cells.grid[2] % 4 == 0:
                assert distance(weights, site).item() == pytest.approx(pixels), name


def test_a_head_that_looks_left_has_exactly_the_offset_with_global_attention_and_frames() -> None:
    site = route_of(create_model("vivit_micro", tubelet=(2, 4, 8), image_size=(16, 32))).sites["blocks.0.attn.site"]
    for axis, step in ((2, 8.0), (1, 4.0)):
        weights = planted(site, lambda offsets, axis=axis, step=step: beside(offsets, step, axis))
        assert distance(weights, site).item() == pytest.approx(step)
        assert distance(weights, site, "time").item() == 0
    weights = planted(site, lambda offsets: beside(offsets, 2.0, 0))  # the frame before, or after the first
    assert (distance(weights, site).item(), distance(weights, site, "time").item()) == (0, 2)


def test_distances_through_pooled_keys_are_those_between_centres() -> None:
    """MViT's keys lie on every second token: of those asking, half sit on a key's column and half beside one."""
    model = create_model("mvitv2_micro", image_size=(16, 16), key_strides=((2, 2), (2, 2)))
    site = route_of(model).sites["blocks.0.attn.site"]
    assert (site.asking.grid, site.cells.grid, site.asking.step[2], site.cells.step[2]) == ((1, 8, 8), (1, 4, 4), 2.0, 4.0)
    assert site.cells.centres()[:2].tolist() == [[0.5, 0.5, 0.5], [0.5, 0.5, 4.5]]

    def nearest(offsets: torch.Tensor) -> int:
        return int(torch.hypot(offsets[:, 1], offsets[:, 2]).argmin())

    apart = [(0 if y % 2 == 0 else 2, 0 if x % 2 == 0 else 2) for y, x in itertools.product(range(8), repeat=2)]
    expected = sum(math.hypot(*pair) for pair in apart) / 64
    assert distance(planted(site, nearest), site).item() == pytest.approx(expected)


@pytest.mark.parametrize("windows", [True, False])
def test_a_block_local_head_has_the_known_mean_distance(windows: bool) -> None:
    """Even attention within blocks of 4 x 4 patches of 2 pixels, by Swin's windows or by a planted head of a ViT."""
    places = list(itertools.product(range(4), repeat=2))
    known = 2 * sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2
    if windows:
        site = route_of(create_model("swin_micro")).sites["stages.0.blocks.0.attn.site"]
        weights = torch.full((4, 1, 16, 16), 1 / 16)
    else:
        site = whole("head", tile((1, 8, 8), (16, 16), prefix=1)).sites[0]
        block = torch.tensor([(y // 4) * 2 + x // 4 for y, x in itertools.product(range(8), repeat=2)])
        weights = torch.full((1, 1, 65, 65), 0.7)  # what goes to and comes from the class token counts for nothing
        weights[0, 0, 1:, 1:] = (block[:, None] == block) * 0.3 / 16
    assert distance(weights, site).item() == pytest.approx(known, rel=1e-5)
    if windows:
        assert even_distance(site) == pytest.approx(known, rel=1e-5)


def test_padding_of_windows_neither_asks_nor_counts() -> None:
    model = lively("swin_micro", fit="call", image_size=(10, 10), depths=(1,), heads=(2,))  # 5 x 5 tokens in windows of 4
    site = route_of(model).sites["stages.0.blocks.0.attn.site"]
    assert (site.keys < 0).any()
    alone = [g for g in range(4) if (site.keys[g] >= 0).sum() == 1]  # the window of the last corner holds one token
    even = torch.full((4, 1, 16, 16), 1 / 16)
    joint = rollout(route_of(model), {site.name: even}, blend=PLAIN)[0]
    assert len(alone) == 1
    assert joint[24, 24].item() == pytest.approx(1)
    rows = [[(y, x) for y in ys for x in xs] for ys in (range(4), range(4, 5)) for xs in (range(4), range(4, 5))]
    known = sum(2 * math.dist(a, b) / len(group) for group in rows for a in group for b in group) / 25
    assert distance(even, site).item() == pytest.approx(known, rel=1e-5)


def test_what_a_site_reaches_across() -> None:
    sites = route_of(create_model("timesformer_micro")).sites
    assert spans(sites["blocks.0.steps.time.attn.site"]) == (True, False)
    assert spans(sites["blocks.0.attn.space.site"]) == (False, True)
    assert spans(route_of(create_model("vivit_micro")).sites["blocks.0.attn.site"]) == (True, True)
    frames = route_of(create_model("vivit_micro", model="factorised_encoder")).sites
    assert spans(frames["blocks.0.attn.site"]) == (False, True)
    assert spans(frames["temporal_blocks.0.attn.site"]) == (True, False)


def test_shares_are_laid_over_the_pixels_of_their_cells() -> None:
    shares = torch.arange(4.0).view(1, 1, 2, 2)
    over = Placed(shares, tile((1, 2, 2), (4, 6))).over(4, 6)[0, 0]
    assert over.tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    shifted = Placed(shares, Cells((1, 2, 2), (0.5, 0.5, 0.5), (1, 2, 2))).over(3, 4)[0, 0]  # cells centred on pixels 0 and 2
    assert shifted[0].tolist() == [0, 1, 1, 1]
    assert shifted[:, 0].tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("settings", "asking"),
    [
        ({}, "the class token"),
        ({"pool": "mean", "class_token": False}, "the mean over all patches"),
        ({"pool": "attention", "registers": 2}, "the pooling query"),
    ],
)
def test_look_at_a_model(settings: dict, asking: str) -> None:
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16", **settings).train()
    view = look(model, torch.randn(2, 3, 16, 24))
    assert view is not None
    assert view.asking == asking
    assert view.last.shares.shape == view.rollout.shares.shape == (2, 1, 4, 6)
    assert (view.last.shares >= 0).all()
    assert (view.rollout.shares.flatten(1).sum(1) <= 1 + 1e-5).all()
    assert len(view.distances) == 3
    assert not view.frames
    assert all(d.min() > 0 and d.max() < 24 for d in view.distances.values())
    assert model.training


@pytest.mark.parametrize(("name", "settings"), VARIED[1:-1])
def test_look_at_every_family(name: str, settings: dict) -> None:
    model = lively(name, **settings)
    view = look(model, torch.randn(1, *model.input_shape))
    assert view is not None
    for placed in (view.last, view.rollout):
        over = placed.over(*model.config.image_size)
        assert over.shape[2:] == model.config.image_size
        assert placed.shares.min() >= 0
        assert 0 < placed.shares.sum() <= 1 + 1e-5
    assert view.rollout.cells.grid == route_of(model).first.grid
    assert set(view.distances) == set(view.even_distances)
    assert bool(view.frames) == (
        model.takes_clips and settings.get("attention") != "space" and "temporal_depth" not in settings
    )


def test_look_finds_the_planted_patch() -> None:
    """Keys of one patch made to win every query: both maps must light up there and nowhere else."""
    torch.manual_seed(0)
    model = create_model("vit_micro_patch4_16", depth=1, **{"position.kind": "none"})
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 8:12, 4:8] = torch.rand(3, 4, 4)  # the only patch that is not empty: row 2, column 1
    with torch.no_grad():
        token = model.blocks[0].norm1(model.embed(images)[0])[0, 2 * 4 + 1]
        width = token.shape[0]
        qkv = model.blocks[0].attn.qkv
        qkv.weight.zero_()
        qkv.bias.zero_()
        qkv.weight[width : 2 * width] = 30 * torch.outer(torch.ones(width), token / token.norm() ** 2)
        qkv.bias[:width] = 1.0  # a constant query that the planted token's key answers
    view = look(model, images)
    assert view is not None
    last, rolled = view.last.shares[0, 0], view.rollout.shares[0, 0]
    assert last.argmax().item() == rolled.argmax().item() == 2 * 4 + 1
    assert last[2, 1] > 0.99


def test_models_that_cannot_be_looked_into() -> None:
    assert look(create_model("resnet_micro"), torch.randn(1, 3, 16, 16)) is None
    model = lively(*VARIED[-1][:1], **VARIED[-1][1])
    with pytest.raises(NoPathError, match="convolutions lie between the attention layers of this slowfast"):
        look(model, torch.randn(1, *model.input_shape))


@pytest.mark.parametrize(("name", "settings"), VARIED)
def test_attention_to_all_alike_has_the_even_distance(name: str, settings: dict) -> None:
    """A model of zeros attends evenly; of a torn window only to what it may reach, however it is padded and shifted."""
    model = lively(name, **settings)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    sites = route_of(model).sites
    with record_attention(model) as maps, torch.no_grad():
        model(torch.randn(1, *model.input_shape))
    for site in sites.values():
        for axis, crosses in zip(("time", "space"), spans(site), strict=True):
            if crosses and site.asking.tokens > site.asking.prefix:
                assert distance(maps[site.name], site, axis).mean().item() == pytest.approx(even_distance(site, axis), rel=1e-4)
