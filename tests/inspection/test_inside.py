"""Weights, layers, gradients and the maps of the page: each on something planted."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from vitrail.inspection.attention import NoPathError
from vitrail.inspection.gradients import grad_cam, gradient_rollout
from vitrail.inspection.hover import hover_maps
from vitrail.inspection.layers import CKA, Passed, logit_lens, run_blocks, token_similarity
from vitrail.inspection.weights import bias_tables, filter_components, position_similarity
from vitrail.layers.attention import record_attention
from vitrail.models import create_model
from vitrail.models.base import intercept_blocks


def lively(name: str, **settings):
    torch.manual_seed(0)
    model = create_model(name, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_filters_made_of_two_patterns_have_these_as_components() -> None:
    model = create_model("vivit_micro")
    patterns = torch.linalg.qr(torch.randn(3 * 2 * 4 * 4, 2)).Q.T  # orthonormal, one three times as strong
    amounts = torch.linalg.qr(torch.randn(32, 3) - torch.randn(32, 3).mean(0)).Q[:, :2]
    amounts = amounts - amounts.mean(0)
    with torch.no_grad():
        model.embed.proj.weight.copy_((amounts * torch.tensor([3.0, 1.0]) @ patterns).view(32, 3, 2, 4, 4) + 5)
    found = filter_components(model)
    assert found.components.shape == (2, 3, 2, 4, 4)
    torch.testing.assert_close(found.variance.sum(), torch.tensor(1.0))
    space = found.components.flatten(1)
    torch.testing.assert_close(space @ patterns.T @ patterns, space, atol=1e-4, rtol=1e-4)
    assert (space.gather(1, space.abs().argmax(1, keepdim=True)) > 0).all()


def test_filters_of_every_first_layer() -> None:
    for name, shape in (("resnet_micro", (3, 1, 3, 3)), ("cvt_micro", (3, 1, 3, 3)), ("mvit_micro", (3, 3, 3, 3))):
        assert filter_components(create_model(name), 4).components.shape == (4, *shape)


def test_positions_that_name_their_row_are_alike_along_rows() -> None:
    model = create_model("vit_micro_patch4_16", width=32, image_size=(16, 24))
    rows = torch.eye(4, 32).repeat_interleave(6, 0)
    with torch.no_grad():
        model.positions[0].table[0, 1:] = rows
    (found,) = position_similarity(model)
    assert found.time is None
    assert found.structure() == {"same row": 1, "same column": 0, "neither": 0}
    torch.testing.assert_close(found.space[2, 3], torch.eye(4)[2][:, None].expand(4, 6))


def test_positions_of_clips_have_a_time_apart() -> None:
    model = lively("timesformer_micro")
    (found,) = position_similarity(model)
    unit = torch.nn.functional.normalize(model.position.time[0], dim=1)
    torch.testing.assert_close(found.time, (unit @ unit.T).detach())
    assert found.space.shape == (4, 4, 4, 4)
    assert position_similarity(create_model("cvt_micro")) == []


def test_bias_tables_are_pictures_of_offsets() -> None:
    model = lively("swin_micro")
    found = {table.name: table for table in bias_tables(model)}
    layer = model.stages[0].blocks[1].attn.bias
    expected = layer.table.detach().T.reshape(2, 7, 7)
    assert torch.equal(found["stages.0.blocks.1.attn.bias"].heads, expected)
    computed = bias_tables(lively("swinv2_micro"))[0]
    assert computed.heads.shape == (2, 7, 7)
    assert {table.name.split(".")[-1] for table in bias_tables(create_model("mvitv2_micro"))} == {"rows", "columns"}


@pytest.mark.parametrize("name", ["vit_micro_patch4_16", "deit_micro", "swin_micro", "cvt_micro", "mvitv2_micro", "vivit_micro",
                                  "timesformer_micro", "hybrid_micro", "resnet_micro"])  # fmt: skip
def test_the_last_lens_is_the_answer_and_blocks_that_do_nothing_change_none(name: str) -> None:
    model = lively(name)
    inputs = torch.randn(2, *model.input_shape)
    lenses = logit_lens(model, inputs)
    torch.testing.assert_close(lenses[-1].logits, model(inputs))
    assert [lens.name for lens in lenses][-1] == run_blocks(model, inputs)[-1].name
    if len(lenses) < 2 or name in ("swin_micro", "resnet_micro"):
        return
    assert not torch.allclose(lenses[-2].logits, lenses[-1].logits)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if f"{lenses[-1].name}." in part and ("proj" in part or "fc2" in part or ".fc." in part):
                parameter.zero_()
    silent = logit_lens(model, inputs)
    torch.testing.assert_close(silent[-2].logits, silent[-1].logits)


def test_no_lens_where_other_layers_follow_the_blocks() -> None:
    model = create_model("slowfast_micro").eval()
    with pytest.raises(ValueError, match="not what its classifier reads"):
        logit_lens(model, torch.randn(1, *model.input_shape))


def test_two_tokens_through_depth() -> None:
    model = lively("deit_micro")
    inputs = torch.randn(2, 3, 16, 16)
    found = token_similarity(model, inputs)
    assert list(found) == ["input", "backbone.blocks.0", "backbone.blocks.1", "backbone.blocks.2"]
    with torch.no_grad():
        model.backbone.registers.copy_(model.backbone.class_token)
        model.backbone.positions[0].table[0, 1] = model.backbone.positions[0].table[0, 0]
    for value in token_similarity(model, inputs).values():
        torch.testing.assert_close(value, torch.ones(2))


def test_cka_is_blind_to_rotation_and_scale_and_sees_independence() -> None:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(64, 5, 8, generator=generator)
    turned = 3 * state.flatten(1) @ torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    other = torch.randn(64, 5, 8, generator=generator)
    compared = CKA()
    layers = [Passed("state", state, state), Passed("other", other, other)]
    for part in (slice(0, 32), slice(32, 64)):
        compared.add([p._replace(made=p.made[part]) for p in layers], [Passed("turned", turned, turned[part])], 32)
    found = compared.result()
    assert compared.names == (["state", "other"], ["turned"])
    assert found[0, 0].item() == pytest.approx(1, abs=1e-5)
    assert abs(found[1, 0].item()) < 0.1
    with pytest.raises(ValueError, match="at least 4"):
        compared.add(layers, layers, 3)


def test_grad_cam_of_a_mean_is_the_classifier_at_every_place() -> None:
    for name in ("resnet_micro", "swin_micro"):
        model = lively(name)
        inputs, classes = torch.randn(2, 3, 16, 16), torch.tensor([3, 7])
        found = grad_cam(model, inputs, classes)
        with torch.no_grad():
            features = model.features(inputs)
            scores = torch.einsum("bnc,bc->bn", features.tokens, model.head.linear.weight[classes]) / features.tokens.shape[1]
        torch.testing.assert_close(found.shares.flatten(1), scores.relu())


@pytest.mark.parametrize(("name", "settings"), [
    ("vit_micro_patch4_16", {}), ("mvit_micro", {}), ("vivit_micro", {"model": "factorised_encoder"}),
    ("timesformer_micro", {"attention": "space"}), ("timesformer_micro", {}),
])  # fmt: skip
def test_grad_cam_goes_where_the_class_token_reads(name: str, settings: dict) -> None:
    model = lively(name, **settings)
    found = grad_cam(model, torch.randn(2, *model.input_shape), torch.tensor([0, 1]))
    assert found.shares.shape[1:] == found.cells.grid
    assert found.shares.max() > 0


def test_gradient_rollout_shows_nothing_where_nothing_is_read() -> None:
    model = lively("vit_micro_patch4_16", depth=1)
    inputs, classes = torch.randn(2, 3, 16, 16), torch.tensor([1, 1])
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight
        weight[:64].zero_()
        model.blocks[0].attn.qkv.bias[:64].zero_()  # attention alike for all tokens, so only the gradient tells them apart
        tokens = model.blocks[0].norm1(model._add_prefix(*model.embed(inputs)))
    found = gradient_rollout(model, inputs, classes).shares.flatten(1)
    with record_attention(model, grad=True) as maps:
        model(inputs)[:, 1].sum()
    assert tokens.shape == (2, 17, 32)
    assert found.shape == (2, 16)
    assert (found >= 0).all()
    assert found.max() > 0
    with torch.no_grad():
        weight[64:].zero_()
        model.blocks[0].attn.qkv.bias[64:].zero_()  # values are nothing: no share raises any logit
    assert gradient_rollout(model, inputs, classes).shares.abs().max() == 0
    assert maps["blocks.0.attn.site"].shape == (2, 4, 17, 17)
    with pytest.raises(NoPathError, match="no path of attention through this resnet"):
        gradient_rollout(create_model("resnet_micro"), inputs, classes)


def test_gradient_rollout_of_frozen_weights() -> None:
    model = lively("swin_micro").requires_grad_(False)
    found = gradient_rollout(model, torch.randn(1, 3, 16, 16), torch.tensor([2]))
    assert found.shares.max() > 0


def unpack(text: str, kind: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.mark.parametrize("name", ["vit_micro_patch4_16", "swin_micro", "cvt_micro", "timesformer_micro"])
def test_the_pages_maps_are_the_recorded_ones(name: str) -> None:
    model = lively(name)
    inputs = torch.randn(1, *model.input_shape)
    with record_attention(model) as maps, torch.no_grad():
        model(inputs)
    packed = hover_maps(model, inputs)
    assert packed["sides"] == [1, *inputs.shape[2:]][-3:]
    for layer in packed["layers"]:
        weights = maps[f"{layer['name']}.site"]
        rows = unpack(layer["rows"], np.int32).reshape(-1, 2)
        shares = unpack(layer["shares"], np.uint8).reshape(layer["heads"], len(rows), layer["width"]) / 255
        peaks = unpack(layer["peaks"], np.float32).reshape(layer["heads"], len(rows), 1)
        assert layer["every"] == 1
        site = model.attention_route(inputs.shape[2:]).sites[f"{layer['name']}.site"]
        for r, (token, group) in enumerate(rows[:: max(1, len(rows) // 20)].tolist()):
            r *= max(1, len(rows) // 20)
            place = site.queries[group].tolist().index(token)
            found = torch.from_numpy(shares[:, r] * peaks[:, r])
            torch.testing.assert_close(found, weights[group, :, place].double(), atol=1 / 255, rtol=0, check_dtype=False)


def test_too_many_tokens_are_sampled_and_it_is_said() -> None:
    model = create_model("vit_micro_patch4_16", image_size=64).eval()  # 257 tokens, 4 heads, 3 layers
    inputs = torch.randn(1, 3, 64, 64)
    for budget, every in ((10**7, 1), (100_000, 3)):
        layers = hover_maps(model, inputs, budget)["layers"]
        assert [layer["every"] for layer in layers] == [every] * 3
        assert sum(len(unpack(layer["shares"], np.uint8)) for layer in layers) <= budget
        assert unpack(layers[0]["rows"], np.int32)[0] == 0  # the class token is always among those that may be asked
    with pytest.raises(ValueError, match="no attention"):
        hover_maps(create_model("resnet_micro"), inputs)


def test_blocks_are_left_alone_after_an_error() -> None:
    model = lively("deit_micro")

    def fail(name: str, *args) -> torch.Tensor:
        raise KeyError(name)

    with pytest.raises(KeyError, match=r"backbone\.blocks\.0"), intercept_blocks(model, fail):
        model(torch.randn(1, 3, 16, 16))
    model(torch.randn(1, 3, 16, 16))


def test_what_is_shown_of_a_bias_is_what_softmax_sees() -> None:
    """Swin v2's network gives about 8 everywhere at first, beside which its structure would not be seen."""
    torch.manual_seed(0)
    for table in bias_tables(create_model("swinv2_micro")):
        assert table.heads.mean() > 5
        torch.testing.assert_close(table.contrast.mean((1, 2)), torch.zeros(len(table.heads)), atol=1e-5, rtol=0)
        torch.testing.assert_close(table.contrast.diff(dim=2), table.heads.diff(dim=2), atol=1e-5, rtol=0)
