"""What holds for every family: checked on its micro variant, and on meta tensors for the published sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from tests.awake import awake
from tests.models.counting import measured

from vitrail.layers.features import Features
from vitrail.layers.position import KINDS, PLACES
from vitrail.models import FAMILIES, MODELS, Model, build, create_model, family_of, list_models

MICROS = [name for name in MODELS if "_micro" in name]
# Parameter counts: ViT paper and AugReg (facts checked against timm); ResNet: torchvision's documentation;
# CvT: transformers (W24: 277.196 million).
PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416, "vit_small_patch16_224": 22_050_664, "vit_small_patch32_224": 22_878_952,
    "vit_base_patch16_224": 86_567_656, "vit_base_patch32_224": 88_224_232, "vit_large_patch16_224": 304_326_632,
    "vit_large_patch32_224": 306_535_400, "vit_huge_patch14_224": 632_045_800, "vit_base_patch16_384": 86_859_496,
    "vit_large_patch16_512": 305_174_504, "vit_huge_patch14_518": 633_470_440, "resnet18": 11_689_512,
    "deit_tiny_patch16_224": 5_717_416, "deit_base_patch16_384": 86_859_496, "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432, "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
    "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
    "resnetv2_50x1_bit": 25_549_352, "resnetv2_50x3_bit": 217_319_080, "resnetv2_101x1_bit": 44_541_480,
    "vit_tiny_r_s16_p8_224": 6_337_704, "vit_small_r26_s32_224": 36_431_912, "vit_base_r26_s32_224": 101_383_976,
    "vit_base_r50_s16_224": 98_659_112, "vit_base_r50_s32_224": 110_945_832, "vit_large_r50_s32_224": 328_994_856,
    "vit_large_r50_s16_224": 316_483_624,
    "resnetv2_101x3_bit": 387_934_888, "resnetv2_152x2_bit": 236_335_208, "resnetv2_152x4_bit": 936_533_224,
    "cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_13_384": 19_997_480, "cvt_w24_384": 277_196_392,
    "swin_tiny_patch4_window7_224": 28_288_354, "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224, "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476, "swin_large_patch4_window12_384": 196_735_516,
    "swinv2_tiny_window8_256": 28_347_154, "swinv2_tiny_window16_256": 28_347_154,
}  # fmt: skip

# The class token skips the convolution of the queries: the logits do not depend on that of the last block.
UNREAD = {"cvt_micro": "stages.2.blocks.1.attn.conv_q."}


def example(model: Model, batch: int = 2) -> torch.Tensor:
    """A batch of random inputs of the size the model is built for."""
    return torch.randn(batch, *model.input_shape)


def test_every_family_has_a_micro_variant() -> None:
    assert {family_of(MODELS[name]) for name in MICROS} == set(FAMILIES)
    for name in MICROS:
        assert sum(p.numel() for p in create_model(name).parameters()) < 100_000


def test_published_parameter_counts(run_python) -> None:
    found = measured(run_python, dict.fromkeys(PARAMETERS), flops=False)
    assert {name: parameters for name, (parameters, _) in found.items()} == PARAMETERS


@pytest.mark.parametrize("name", MICROS)
class TestEveryFamily:
    def test_contract(self, name: str) -> None:
        model = awake(create_model(name, num_classes=5)).eval()
        x = example(model)
        features = model.features(x)
        assert isinstance(features, Features)
        t, h, w = features.grid
        assert features.tokens.shape[:2] == (2, features.prefix + t * h * w)
        assert features.maps().shape == (2, features.tokens.shape[2], t, h, w)
        torch.testing.assert_close(model(x), model.head(model.pool(features)))

    def test_gradients_reach_every_parameter(self, name: str) -> None:
        model = awake(create_model(name, num_classes=5))
        model(example(model, 4)).square().sum().backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert [n for n in silent if not n.startswith(UNREAD.get(name, " "))] == []

    def test_rectangles_and_channels(self, name: str) -> None:
        model = create_model(name, num_classes=3, image_size=(8, 16), in_channels=5)
        assert model.input_shape[-2:] == (8, 16)
        assert model(example(model)).shape == (2, 3)
        lead = model.input_shape[:-2]
        assert model(torch.randn(2, *lead, 16, 24)).shape == (2, 3)
        with pytest.raises(ValueError, match="takes 5 channels, the input has 3"):
            model(torch.randn(2, 3, *model.input_shape[1:]))
        with pytest.raises(ValueError, match=r"takes (clips|images) \(b, c, .*the input has shape \(5, "):
            model.check_input(torch.randn(model.input_shape))

    def test_clips_of_other_lengths(self, name: str) -> None:
        model = create_model(name)
        if not model.takes_clips:
            assert model.frame_multiple == 1
            return
        channels, frames, *size = model.input_shape
        longer = torch.randn(2, channels, frames + model.frame_multiple, *size)
        assert model(longer).shape == (2, model.config.num_classes)
        shorter = create_model(name, frames=frames - model.frame_multiple)
        assert shorter(example(shorter)).shape == (2, model.config.num_classes)
        if model.frame_multiple > 1:
            with pytest.raises(ValueError, match=f"{frames + 1} frames .* nearest valid: {frames} or"):
                model(torch.randn(2, channels, frames + 1, *size))

    def test_new_heads_start_at_zero(self, name: str) -> None:
        model = create_model(name)
        model.reset_head(7)
        assert model.config.num_classes == 7
        assert not model(example(model)).any()

    def test_checkpointing_changes_nothing(self, name: str) -> None:
        model = awake(create_model(name))
        x, grads = example(model, 3), []
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for on in (False, True):
            model.load_state_dict(state)
            model.zero_grad()
            model.set_checkpointing(on)
            model(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    def test_layers_are_numbered_from_stem_to_head(self, name: str) -> None:
        model = create_model(name)
        ids = model.layer_ids()
        assert set(ids) == {n for n, _ in model.named_parameters()}
        assert ids["head.linear.weight"] == max(ids.values())
        assert sorted(set(ids.values())) == list(range(max(ids.values()) + 1))
        assert model.no_weight_decay() <= set(ids)

    def test_exports_to_a_full_graph(self, name: str) -> None:
        model = awake(create_model(name)).eval()
        x = example(model)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
        y = example(model, 5)
        torch.testing.assert_close(program.module()(y), model(y), atol=1e-5, rtol=1e-5)

    def test_half_precision_stays_close(self, name: str) -> None:
        model = awake(create_model(name)).eval()
        x = example(model, 4)
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x)
        assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(("kind", "place"), [*itertools.product(KINDS, PLACES)])
def test_position_kinds_and_places(kind: str, place: str) -> None:
    model = create_model("vit_micro_patch4_16", registers=2, **{"position.kind": kind, "position.place": place})
    torch.nn.init.normal_(model.head.linear.weight)
    assert model.config.position.kind == kind
    tables = {"none": 0, "relative": 1 if place == "shared" else 3}.get(kind, 3 if place == "layers" else 1)
    assert len(model.positions) == tables
    for table in model.positions.parameters():
        torch.nn.init.normal_(table)
    small, large = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 24)
    assert model(small).shape == model(large).shape == (2, 10)
    order = torch.randperm(4)
    bands = small.view(2, 3, 4, 4, 16)[:, :, order].reshape(2, 3, 16, 16)  # rows of patches in another order
    same = torch.allclose(model(small), model(bands), atol=1e-4)
    assert same == (kind == "none" or torch.equal(order, torch.arange(4)))


@pytest.mark.parametrize("pool", ["cls", "mean", "attention"])
def test_pooling(pool: str) -> None:
    model = create_model("vit_micro_patch4_16", pool=pool, class_token=pool == "cls")
    features = model.features(torch.randn(2, 3, 16, 16))
    assert features.prefix == (pool == "cls")
    assert model.pool(features).shape == (2, 32)
    if pool == "mean":
        torch.testing.assert_close(model.pool(features), features.patches.mean(1))


def test_representation_layer_goes_with_the_old_head() -> None:
    model = create_model("vit_micro_patch4_16", representation=20, head_bias=-7.0)
    assert model.head.represent(torch.randn(2, 32)).abs().max() <= 1
    torch.testing.assert_close(model(torch.randn(2, 3, 16, 16)), torch.full((2, 10), -7.0))
    model.reset_head(4)
    assert model.head.representation is None
    assert model.config.representation is None


def test_masked_patches_do_not_reach_the_tokens() -> None:
    model = create_model("vit_micro_patch4_16", mask_token=True).eval()
    x = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = x.clone()
    changed[:, :, 4:8, 4:8] = 9.0  # patch 5
    torch.testing.assert_close(model.features(x, mask).tokens, model.features(changed, mask).tokens)
    with pytest.raises(ValueError, match="mask_token=True"):
        create_model("vit_micro_patch4_16").features(x, mask)


def test_cvt_without_class_token_pools_the_mean() -> None:
    model = create_model("cvt_micro", class_token=False, kv_stride=1).eval()
    stages = model.pyramid(torch.randn(2, 3, 24, 16))
    assert [f.grid for f in stages] == [(1, 12, 8), (1, 6, 4), (1, 3, 2)]
    torch.testing.assert_close(model.pool(stages[-1]), stages[-1].tokens.mean(1))
    assert model.no_weight_decay() == set()


def test_stochastic_depth_and_dropout_are_seeded_and_training_only() -> None:
    model = create_model(
        "vit_micro_patch4_16", drop_path=0.5, dropout=0.2, attention_dropout=0.2, layer_scale=0.1, qk_norm=True
    )
    x = torch.randn(8, 3, 16, 16)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.train().features(x).tokens)
    torch.testing.assert_close(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])
    torch.testing.assert_close(model.eval().features(x).tokens, model.features(x).tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("vit_tiny_patch16"), "did you mean 'vit_tiny_patch16_224'"),
        (lambda: create_model("vit_micro_patch4_16", dept=2), "did you mean 'depth'"),
        (lambda: create_model("vit_micro_patch4_16", **{"position.knd": "1d"}), "did you mean 'kind'"),
        (lambda: create_model("vit_micro_patch4_16", image_size=(18, 16)), "nearest valid: 16x16 or 20x16"),
        (lambda: create_model("vit_micro_patch4_16", heads=5), "nearest valid: 4 or 2"),
        (lambda: create_model("vit_micro_patch4_16", pool="max"), "allowed: cls, mean, cls_mean, attention"),
        (lambda: create_model("vit_micro_patch4_16", class_token=False), "allowed without a class token"),
        (lambda: create_model("vit_micro_patch4_16")(torch.randn(1, 3, 15, 16)), "nearest valid: 12x16 or 16x16"),
        (lambda: create_model("resnet_micro", depths=()), "at least one block"),
        (lambda: create_model("deit_micro", prediction="both"), "allowed: joint, class, distillation"),
        (lambda: create_model("deit_micro", heads=5), "nearest valid: 4 or 2"),
        (lambda: create_model("cvt_micro", depths=(1, 2)), "depths 2, heads 3"),
        (lambda: create_model("cvt_micro", heads=(1, 3, 4)), "width 16 is not divisible by heads 3; nearest valid: 2 or 4"),
        (lambda: create_model("cvt_micro", attention_scale="heads"), "allowed: width, head"),
        (lambda: create_model("cvt_13")(torch.randn(1, 3, 2, 40)), "at least 3 pixels"),
    ],
)
def test_wrong_choices_name_the_right_ones(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", MICROS)
def test_numbers_that_no_model_can_have(name: str) -> None:
    config = MODELS[name]
    wrong = {"num_classes": (-1, True, 2.5), "in_channels": (0,), "image_size": ((0, 16), (16.5, 16)), "depth": (0, math.inf),
             "depths": ((2, 0), (2, True)), "drop_path": (1.0, -0.1, math.nan), "norm_eps": (0.0,), "frames": (True, 0),
             "heads": (0, (0, 2)), "patch": ((0, 4),), "tubelet": ((0, 4, 4),)}  # fmt: skip
    for field in {f.name for f in dataclasses.fields(config)} & set(wrong):
        for value in wrong[field]:
            with pytest.raises(ValueError, match=rf"^{field} is .*; it must be "):
                create_model(name, **{field: value})
    with pytest.raises(ValueError, match="num_classes is -1; it must be at least 0"):
        build(dataclasses.replace(config, num_classes=-1))


def test_listing() -> None:
    assert "resnet50" in list_models()
    assert list_models("vit_*_patch32_224") == ["vit_small_patch32_224", "vit_base_patch32_224", "vit_large_patch32_224"]
