"""Every golden case of ViT and ResNet, through the checkpoint tables: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests import golden, proofs

from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES, load_model
from vitrail.layers.attention import record_attention
from vitrail.layers.embed import resize_patches
from vitrail.layers.position import resize_grid

# What shapes cannot tell: heads of the tiny configurations, and the size behind a table that is no square.
HINTS = {"timm_vit_tinycfg_nonsquare_build": {"heads": 3, "built_size": (24, 48)}, "timm_vit_tinycfg_patch4_deep": {"heads": 2},
         "timm_vit_base_patch16_gap_224": {"heads": 16}}  # fmt: skip
MODELS = [i for i, c in golden.manifest().items() if c["family"] in ("vit", "resnet") and "shapes_only" not in c["tags"]]
RESAMPLES = {
    "resample_pos_14x14_to_24x24_cls": ((14, 14), (24, 24), 1, "bicubic"),
    "resample_pos_14x14_to_16x12_cls": ((14, 14), (16, 12), 1, "bicubic"),
    "resample_pos_14x14_to_7x7_cls": ((14, 14), (7, 7), 1, "bicubic"),
    "resample_pos_16x16_to_14x14_noprefix": ((16, 16), (14, 14), 0, "bicubic"),
    "resample_pos_14x14_to_16x12_cls_no_antialias": ((14, 14), (16, 12), 1, "bicubic_plain"),
    "resample_pos_24x24_to_14x14_cls": ((24, 24), (14, 14), 1, "bicubic"),
}


def hints(case_id: str) -> dict:
    return HINTS.get(case_id, {"heads": 4} if "tinycfg" in case_id else {})


@pytest.mark.parametrize("case_id", MODELS)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **hints(case_id))
    want, x = golden.outputs(case), golden.inputs(case)
    with torch.inference_mode():
        features = model.features(x)
        errors = {}
        if "logits" in want:
            errors["logits"] = golden.worst(model(x), want["logits"])
        if "pooler" in want:
            errors["pooler"] = golden.worst(model.head.represent(model.pool(features)), want["pooler"])
        if "features" in want:
            tokens = features.maps()[:, :, 0] if model.family == "resnet" else features.tokens
            errors["features"] = golden.worst(golden.strided(case, "features", tokens), want["features"])
        maps = sorted(key for key in want if key.startswith("attn."))
        if maps:
            with record_attention(model) as recorded:
                model(x)
            for key in maps:
                errors[key] = golden.worst(golden.strided(case, key, recorded[f"blocks.{key[5:]}.attn.site"]), want[key])
    proofs.record(record_property, case_id, max(errors.values()))
    assert errors, "the case has no output that was compared"
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", [i for i in MODELS if "tinycfg" in i or i in ("tv_resnet50", "timm_vit_tiny_patch16_224")])
def test_tables_write_what_they_read(case_id: str) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **hints(case_id))
    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    original = source.clean(dict(state))
    assert set(back) == set(original)
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_published_shapes_of_huge(record_property) -> None:
    case = golden.manifest()["timm_vit_huge_patch14_224_shapes"]
    state = {name: torch.empty(shape, device="meta") for name, shape, _ in case["state_dict"]}
    source = next(s for s in SOURCES if s.recognise(state))
    config, notes = source.infer(state, {}, {})
    assert (config.width, config.depth, config.heads, config.patch) == (1280, 32, 16, (14, 14))
    assert notes == []
    proofs.record(record_property, "timm_vit_huge_patch14_224_shapes", 0.0)


@pytest.mark.parametrize("case_id", ["hf_vit_tinycfg_mim", "hf_vit_base_mim_224"])
def test_masked_patches(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **hints(case_id))
    x, mask, want = golden.inputs(case), golden.inputs(case, "mask"), golden.outputs(case)
    with torch.inference_mode():
        maps = model.features(x, mask=mask).maps()[:, :, 0]
        pixels = F.conv2d(maps, state["decoder.0.weight"], state["decoder.0.bias"])
        pixels = F.pixel_shuffle(pixels, model.config.patch[0])
    error = golden.worst(golden.strided(case, "reconstruction", pixels), want["reconstruction"])
    proofs.record(record_property, case_id, error)
    assert error <= 1e-5


@pytest.mark.parametrize("case_id", RESAMPLES)
def test_position_resampling(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    old, new, prefix, rule = RESAMPLES[case_id]
    table = golden.inputs(case)
    got = torch.cat([table[:, :prefix], resize_grid(table[0, prefix:], old, new, rule)[None]], 1)
    error = golden.worst(golden.strided(case, "resampled", got), golden.outputs(case)["resampled"])
    proofs.record(record_property, case_id, error)
    assert error <= 1e-5


def test_patches_of_another_size(record_property) -> None:
    case = golden.manifest()["resample_patch_embed_16_to_12"]
    error = golden.worst(resize_patches(golden.inputs(case), (12, 12), "bicubic"), golden.outputs(case)["resampled"])
    proofs.record(record_property, "resample_patch_embed_16_to_12", error)
    assert error <= 1e-5


@pytest.mark.parametrize("case_id", ["vitjax_tiny_token", "vitjax_tiny_token_epssens", "bigvision_vit_tiny_gap"])
def test_matches_the_authors(case_id: str, record_property) -> None:
    case = golden.original(case_id)
    state = golden.original_state(case)
    model = load_model(state, quiet=True)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"])).permute(0, 3, 1, 2)
    x = x * case["input"].get("scale", 1.0)
    want = golden.original_outputs(case_id)
    with torch.inference_mode():
        features = model.features(x)
        embedding = model.head.represent(model.pool(features))
        got = {"logits": model(x), "pre_logits": embedding}
        if "i.encoded" in want:
            got["i.encoded"] = features.tokens
    proofs.record(record_property, case_id, max(golden.worst(value, want[key]) for key, value in got.items()))
    for key, value in got.items():
        assert (value - want[key]).abs().max() <= 2e-5, key
    source = next(s for s in SOURCES if s.recognise(state))
    back, cleaned = write(source.rules(model.config), model.state_dict()), source.clean(dict(state))
    assert set(back) == set(cleaned)
    assert all(torch.equal(back[key], cleaned[key]) for key in cleaned)


@pytest.mark.parametrize("key", ["14to24_cls", "14to24_nocls", "7to12_cls", "24to14_cls", "16to16_cls", "4to7_cls", "1to3_cls"])
def test_authors_position_resizing(key: str, record_property) -> None:
    entry = next(c for c in golden.original("vitjax_interpolate_posembed")["cases"] if c["key"] == key)
    table = torch.from_numpy(0.1 * golden.normals(entry["input_name"], entry["input_shape"]))
    prefix = int(entry["class_token"])
    old, new = entry["old_grid"], entry["new_grid"]
    got = torch.cat([table[:, :prefix], resize_grid(table[0, prefix:], (old, old), (new, new), "bilinear_corners")[None]], 1)
    want = golden.original_outputs("vitjax_interpolate_posembed")[key]
    proofs.record(record_property, "vitjax_interpolate_posembed", golden.worst(got, want))
    assert (got - want).abs().max() <= 1e-6
