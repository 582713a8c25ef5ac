"""Every golden case of CvT, through the checkpoint tables: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.models import create_model

PEERS = [i for i, c in golden.manifest().items() if c["family"] == "cvt"]
AUTHORS = ["cvt_tiny", "cvt_tiny_epssens"]
HEADS = {"cvt_tiny": (1, 2, 4), "cvt_tiny_epssens": (1, 2, 4), "hf_cvt_13_224": None}


def loaded(state: dict[str, torch.Tensor], case_id: str):
    heads = HEADS.get(case_id, (1, 2, 3))
    return load_model(state, quiet=True, **({"heads": heads} if heads else {}))


def watch(model) -> dict[str, torch.Tensor]:
    """Outputs of stage embeddings (as maps) and blocks of the next forward passes, under the peers' names."""
    seen: dict[str, torch.Tensor] = {}
    for s, stage in enumerate(model.stages):

        def embedded(module, args, out, s=s):
            seen[f"embed.{s}"] = out[0].transpose(1, 2).unflatten(2, out[1])

        stage.embed.register_forward_hook(embedded)
        for i, block in enumerate(stage.blocks):

            def passed(module, args, out, s=s, i=i):
                seen[f"layer.{s}.{i}"] = out
                seen[f"stage.{s}"] = out[:, -args[1][0] * args[1][1] :].transpose(1, 2).unflatten(2, args[1])

            block.register_forward_hook(passed)
    return seen


@pytest.mark.parametrize("case_id", PEERS)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    model = loaded(golden.state(case), case_id)
    want, x = golden.outputs(case), golden.inputs(case)
    seen = watch(model)
    with torch.inference_mode():
        got = {"logits": model(x), "features": model.pool(model.features(x))[:, None], **seen}
    errors = {key: golden.worst(golden.strided(case, key, got[key]), want[key]) for key in want}
    proofs.record(record_property, case_id, max(errors.values()))
    assert "logits" in errors
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", AUTHORS)
def test_matches_the_authors(case_id: str, record_property) -> None:
    case = golden.original(case_id)
    model = loaded(golden.original_state(case), case_id)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"])) * case["input"].get("scale", 1.0)
    want = golden.original_outputs(case_id)
    seen = watch(model)
    with torch.inference_mode():
        got = {"logits": model(x), "pre_logits": model.pool(model.features(x))}
    got |= {f"i.stage{s}": seen[f"stage.{s}"] for s in range(3)}
    got |= {f"i.stage{s}.patch_embed": seen[f"embed.{s}"] for s in range(3)}
    assert set(want) == set(got)
    proofs.record(record_property, case_id, max(golden.worst(got[key], want[key]) for key in want))
    for key, value in want.items():
        assert (got[key] - value).abs().max() <= 2e-5, key


@pytest.mark.parametrize("case_id", [*PEERS, *AUTHORS])
def test_tables_write_what_they_read(case_id: str) -> None:
    state = golden.original_state(golden.original(case_id)) if case_id in AUTHORS else golden.state(golden.manifest()[case_id])
    model = loaded(state, case_id)
    source = next(s for s in SOURCES if s.recognise(state))
    assert source.name == ("microsoft" if case_id in AUTHORS else "transformers")
    back = write(source.rules(model.config), model.state_dict())
    counted = {key for key in back if key.endswith("num_batches_tracked")}
    assert set(back) == set(state) | counted
    assert all(torch.equal(back[key], state[key]) for key in set(state) - counted)


def test_what_shapes_do_not_tell() -> None:
    model = load_model(golden.state(golden.manifest()["hf_cvt_13_224"]), quiet=True)
    assert model.config == create_model("cvt_13", activation="gelu").config
    case = golden.original("cvt_tiny")
    assert load_model(golden.original_state(case), quiet=True, heads=(1, 2, 4)).config.activation == "quick_gelu"


def test_pictures_of_384_are_stretched() -> None:
    state = golden.original_state(golden.original("cvt_tiny"))
    small, large = (load_model(state, quiet=True, heads=(1, 2, 4), image_size=side).card.preprocess for side in (224, 384))
    assert (small.fit, small.crop_fraction, small.interpolation) == ("crop", 0.875, "bicubic")
    assert (large.fit, large.image_size) == ("stretch", (384, 384))


def test_guessed_heads_are_said(capsys) -> None:
    model = load_model(golden.original_state(golden.original("cvt_tiny")))
    assert model.config.heads == (1, 1, 1)
    assert "guess: (1, 1, 1) heads" in capsys.readouterr().err


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}])
def test_the_authors_files(wrap, tmp_path) -> None:
    state = golden.original_state(golden.original("cvt_tiny"))
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    model = load_model(tmp_path / "checkpoint.pth", quiet=True, heads=(1, 2, 4))
    path = save_model(model, tmp_path / "out", format="microsoft")
    again = torch.load(path, weights_only=True)
    assert path.name == "model.pth"
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_pictures_of_other_channels() -> None:
    state = golden.original_state(golden.original("cvt_tiny"))
    grey = load_model(state, quiet=True, heads=(1, 2, 4), in_channels=1)
    colour = load_model(state, quiet=True, heads=(1, 2, 4))
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "format", "reason"),
    [
        ({"activation": "quick_gelu"}, "transformers", "activation='quick_gelu'"),
        ({"activation": "gelu"}, "microsoft", "activation='gelu'"),
        ({"activation": "gelu", "attention_scale": "head"}, "transformers", "attention_scale='head'"),
        ({"activation": "gelu"}, "transformers", r"depths=\(1, 1, 2\)"),
        ({"activation": "gelu", "class_token": False}, "transformers", "class_token=False"),
        ({"norm_eps": 1e-6}, "microsoft", "norm_eps=1e-06"),
        ({}, "timm", "can be written as: vitrail, microsoft, transformers"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(settings: dict, format: str, reason: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        save_model(create_model("cvt_micro", **settings), tmp_path / "out", format=format)
