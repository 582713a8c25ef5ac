"""Every golden case of the hybrids, through the checkpoint tables: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints.mapping import CheckpointError, write
from vitrail.checkpoints.store import SOURCES, load_model
from vitrail.layers.attention import record_attention
from vitrail.models import Model

CASES = [i for i, c in golden.manifest().items() if c["family"] == "vit_hybrid"]
LIMIT = 1e-4  # standardisation amplifies the rounding of small variances


def assert_written_back(model: Model, state: dict[str, torch.Tensor]) -> None:
    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("case_id", CASES)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **({"heads": 4} if "tinycfg" in case_id else {}))
    assert model.family == "hybrid"
    want, x = golden.outputs(case), golden.inputs(case)
    with torch.inference_mode(), record_attention(model) as recorded:
        features = model.features(x)
        errors = {
            "logits": golden.worst(model.head(model.pool(features)), want["logits"]),
            "features": golden.worst(golden.strided(case, "features", features.tokens), want["features"]),
        }
    for key in want:
        if key.startswith("attn."):
            maps = recorded[f"backbone.blocks.{key[5:]}.attn.site"]
            errors[key] = golden.worst(golden.strided(case, key, maps), want[key])
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= LIMIT, errors
    assert_written_back(model, state)


def test_matches_the_authors(record_property) -> None:
    case = golden.original("vitjax_tiny_hybrid_r50style")
    state = golden.original_state(case)
    model = load_model(state, quiet=True)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"])).permute(0, 3, 1, 2)
    want = golden.original_outputs("vitjax_tiny_hybrid_r50style")
    with torch.inference_mode():
        features = model.features(x)
        embedding = model.head.represent(model.pool(features))
        maps = [model.stem(x)]
        for stage in model.stages:
            maps.append(stage(maps[-1]))
        errors = {
            "logits": golden.worst(model(x), want["logits"]),
            "pre_logits": golden.worst(embedding, want["pre_logits"]),
            "encoded": golden.worst(features.tokens, want["i.encoded"]),
        }
    for s in range(1, 4):
        errors[f"block{s}"] = golden.worst(maps[s][:, :8].permute(0, 2, 3, 1), want[f"i.block{s}_ch8"])
    proofs.record(record_property, "vitjax_tiny_hybrid_r50style", max(errors.values()))
    assert max(errors.values()) <= LIMIT, errors
    assert_written_back(model, state)
    flat = {key: value.flatten() if "/gn" in key or key.startswith("gn_") else value for key, value in state.items()}
    torch.testing.assert_close(load_model(flat, quiet=True)(x), model(x))  # group norms of newer files


def test_the_authors_standardisation_is_not_timms() -> None:
    state = golden.original_state(golden.original("vitjax_tiny_hybrid_r50style"))
    small = {key: value * 1e-4 if "conv" in key else value for key, value in state.items()}
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs, timms = load_model(small, quiet=True), load_model(small, quiet=True, **{"trunk.std_rule": "variance"})
    with torch.inference_mode():
        assert golden.worst(theirs(x), timms(x)) > 1e-2


def test_positions_follow_the_image_size_by_the_rule_of_the_source() -> None:
    state = golden.original_state(golden.original("vitjax_tiny_hybrid_r50style"))
    model = load_model(state, quiet=True)
    assert (model.config.image_size, model.config.grid, model.config.position.resize) == ((64, 64), (4, 4), "bilinear_corners")
    wide = load_model(state, quiet=True, image_size=(64, 96))
    assert wide.config.grid == (4, 6)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(wide(x), model(x))


def test_other_backbones_are_refused() -> None:
    state = golden.state(golden.manifest()["timm_hybrid_tinycfg"])
    renamed = {key.replace("backbone.stem.conv", "backbone.conv1.0"): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="no known layout"):
        load_model(renamed, quiet=True)
