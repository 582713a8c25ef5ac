"""Every golden case of TimeSformer: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.layers.attention import record_attention
from vitrail.models import create_model

PEER = [i for i, c in golden.manifest().items() if c["family"] == "timesformer"]
AUTHORS = ("timesformer_tiny_divided", "timesformer_tiny_joint")


def hints(case_id: str) -> dict:
    return {"heads": 4} if "tiny" in case_id else {}


def time_fastest(tokens: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Our (T, H, W) order as the published code's (H, W, T)."""
    patches = tokens[:, 1:].unflatten(1, grid).permute(0, 2, 3, 1, 4).flatten(1, 3)
    return torch.cat([tokens[:, :1], patches], 1)


def rewritten(state: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    (source,) = (s for s in SOURCES if s.recognise(state))
    back, clean = write(source.rules(model.config), model.state_dict()), source.clean(dict(state))
    return set(back) == set(clean) and all(torch.equal(back[key], clean[key]) for key in clean)


@pytest.mark.parametrize("case_id", PEER)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = load_model(state, quiet=True, **hints(case_id))
    want, x = golden.outputs(case), golden.inputs(case).transpose(1, 2)
    if model.config.attention == "space":  # the peer answers every frame apart
        x = x.transpose(1, 2).flatten(0, 1)[:, :, None]
    got: dict[str, torch.Tensor] = {}
    grid = (x.shape[2], x.shape[3] // model.config.patch[0], x.shape[4] // model.config.patch[1])
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _a, out, i=i: got.update({f"block.{i}": time_fastest(out, grid)}))
    with torch.inference_mode():
        if "tinycfg" in case_id:
            with record_attention(model, r"blocks\.\d+\.attn\.") as maps:
                features = model.features(x)
            for i, weights in enumerate(maps.values()):
                if model.config.attention == "joint":
                    order = time_fastest(torch.arange(weights.shape[-1])[None, :, None], grid)[0, :, 0]
                    weights = weights[:, :, order][..., order]
                got[f"attn.{i}"] = weights
        else:
            features = model.features(x)
        got |= {"features": time_fastest(features.tokens, grid), "logits": model.head(model.pool(features))}
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items()}
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= 1e-5, errors
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]
    assert rewritten(state, model)


@pytest.mark.parametrize("case_id", AUTHORS)
def test_matches_the_authors(case_id: str, tmp_path, record_property) -> None:
    case, want = golden.original(case_id), golden.original_outputs(case_id)
    state = golden.original_state(case)
    torch.save({"model_state": state, "epoch": 14, "cfg": "TRAIN: ..."}, tmp_path / "TimeSformer.pyth")
    model = load_model(tmp_path / "TimeSformer.pyth", quiet=True, **hints(case_id))
    assert model.card.preprocess.mean == (0.45,)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"]))
    got: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _m, _a, out, i=i: got.update({f"i.blocks.{i}": time_fastest(out, model.config.grid)})
        )
    with torch.inference_mode():
        got |= {"logits": model(x), "pre_logits": model.pool(model.features(x))}
    errors = {key: float((got[key] - value).abs().max()) for key, value in want.items()}
    proofs.record(record_property, case_id, max(golden.worst(got[key], want[key]) for key in want))
    assert max(errors.values()) <= 2e-5, errors
    assert rewritten(state, model)
    path = save_model(model, tmp_path / "out", format="timesformer")
    written = torch.load(path, weights_only=True)["model_state"]
    assert set(written) == set(state)
    bare = {key.removeprefix("model."): tensor for key, tensor in written.items()}  # as some pass it on
    with torch.inference_mode():  # as above: with gradients another kernel may attend
        assert torch.equal(load_model(bare, quiet=True, **hints(case_id))(x), got["logits"])


def test_more_frames_than_published(record_property) -> None:
    """The published loader resizes the table of times to the nearest entries."""
    entry = next(c for c in golden.original("timesformer_load_pretrained")["cases"] if c["key"] == "divided_to_divided_frames")
    state = golden.original_state({"params": entry["source_params"]})
    model = load_model(state, quiet=True, heads=2, frames=entry["frames"][1])
    want = golden.original_outputs("timesformer_load_pretrained")["divided_to_divided_frames/time_embed"]
    got = model.position.time.detach()
    proofs.record(record_property, "timesformer_load_pretrained", golden.worst(got, want))
    torch.testing.assert_close(got, want)


def test_what_a_project_cannot_hold_is_said(tmp_path) -> None:
    for format in ("transformers", "timesformer"):
        with pytest.raises(CheckpointError, match="divided, joint, space, not axial"):
            save_model(create_model("timesformer_micro", attention="axial"), tmp_path / format, format=format)
