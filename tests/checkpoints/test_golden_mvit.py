"""Every golden case of MViT v1 and v2, clips and pictures: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.parity import check_written
from vitrail.checkpoints.store import SOURCES
from vitrail.models import MODELS, create_model

CASES = [i for i, c in golden.manifest().items() if c["family"] in ("mvit_v1", "mvit_v2", "mvit_v2_image")]
AUTHORS = ["slowfast_mvit_tiny_v1", "slowfast_mvit_tiny_v2"]
STRIDES = ((1, 4, 4), (1, 2, 2), (1, 1, 1))


def hints(case_id: str) -> dict:
    """What shapes cannot tell of the tiny configurations: strides of keys, and where nothing is learned the heads."""
    if "max_nocls_jointpos" in case_id:
        return {"key_strides": STRIDES, "heads": (1, 2, 4), "pool_mode": "max", "frames": 4}
    if case_id.startswith("tv_") and "tinycfg" in case_id:
        return {"key_strides": STRIDES[:2]}
    clips = ("ptv_mvit_tinycfg", "ptv_mvit_tinycfg_eps", *AUTHORS)
    return {"key_strides": STRIDES} if case_id in clips else {}


def outputs(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    got: dict[str, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, tokens, i=i: got.__setitem__(f"block.{i}", tokens))
    with torch.inference_mode():
        return got | {"logits": model(x), "features": model.features(x).tokens}


@pytest.mark.parametrize("case_id", CASES)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **hints(case_id))
    assert model.input_shape == tuple(case["inputs"]["x"]["shape"][1:])
    want, got = golden.outputs(case), outputs(model, golden.inputs(case))
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items()}
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", [i for i in CASES if "tinycfg" in i or i in ("timm_mvitv2_tiny", "tv_mvit_v2_s")])
def test_tables_write_what_they_read(case_id: str) -> None:
    state = golden.state(golden.manifest()[case_id])
    model = load_model(state, quiet=True, **hints(case_id))
    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("case_id", "name", "differs"),
    [
        ("tv_mvit_v1_b", "mvit_base_16x4", {}),
        ("ptv_mvit_b_16x4", "mvit_base_16x4", {"pool_norm_eps": 1e-5}),
        ("tv_mvit_v2_s", "mvitv2_small_16x4", {}),
        ("timm_mvitv2_tiny", "mvitv2_tiny", {}),
    ],
)
def test_published_shapes_tell_the_whole_configuration(case_id: str, name: str, differs: dict) -> None:
    case = golden.manifest()[case_id]
    state = {key: torch.empty(shape, device="meta") for key, shape, _ in case["state_dict"]}
    source = next(s for s in SOURCES if s.recognise(state))
    config, notes = source.infer(state, {}, {})
    assert notes == []
    assert {f: v for f, v in vars(config).items() if v != getattr(MODELS[name], f)} == differs


@pytest.mark.parametrize("case_id", AUTHORS)
def test_matches_the_authors(case_id: str, tmp_path, record_property) -> None:
    case, want = golden.original(case_id), golden.original_outputs(case_id)
    state = golden.original_state(case)
    torch.save({"epoch": 3, "model_state": state}, tmp_path / "checkpoint.pyth")
    model = load_model(tmp_path / "checkpoint.pyth", quiet=True, **hints(case_id))
    assert model.card.preprocess.mean == (0.45,)
    (spec,) = case["input"]
    got = outputs(model, torch.from_numpy(golden.normals(spec["name"], spec["shape"])))
    got["probs_eval"] = got["logits"].softmax(-1)
    errors = {}
    for key, value in want.items():
        if not key.startswith("i.patch"):
            ours = got[key.removeprefix("i.").replace("blocks", "block").removesuffix("_tok64")]
            errors[key] = float((ours[:, :64] - value).abs().max()) if "_tok64" in key else float((ours - value).abs().max())
    proofs.record(record_property, case_id, max(errors[key] / float(want[key].abs().max()) for key in errors))
    assert len(errors) == len(want) - 1
    assert max(errors.values()) <= 2e-5, errors
    save_model(model, tmp_path / "out", format="pyslowfast")
    back = torch.load(tmp_path / "out" / "model.pyth", weights_only=True)["model_state"]
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_picture_file_of_the_authors_with_a_frame_too_many() -> None:
    model = create_model("mvitv2_micro", image_size=32)
    source = next(s for s in SOURCES if (s.name, s.family) == ("pyslowfast", "mvit"))
    state = write(source.rules(model.config), model.state_dict())
    thick = {key: value.unsqueeze(2) if value.ndim == 4 else value for key, value in state.items()}
    for given in (state, thick):
        again = load_model(given, quiet=True, key_strides=model.config.key_strides)
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_guesses_are_said(capsys) -> None:
    case = golden.manifest()["tv_mvit_v1_tinycfg"]
    load_model(golden.state(case))
    assert "guess: keys are pooled by strides of 1x8x8, 1x4x4" in capsys.readouterr().err
    load_model(golden.state(case), **hints("tv_mvit_v1_tinycfg"))
    assert "guess" not in capsys.readouterr().err


@pytest.mark.parametrize("case_id", ["tv_mvit_v1_tinycfg", "tv_mvit_v2_tinycfg", "ptv_mvit_tinycfg_max_nocls_jointpos"])
def test_another_size_resizes_the_tables(case_id: str, capsys) -> None:
    state = golden.state(golden.manifest()[case_id])
    kept, known = load_model(state, quiet=True, **hints(case_id)), hints(case_id)
    frames = {} if "max" in case_id else {"frames": 8}  # a joint table says nothing of its frames
    model = load_model(state, image_size=(48, 32), **known, **frames)
    assert "resized: " in capsys.readouterr().err
    x = torch.randn(1, *model.input_shape)
    if "v2" in case_id:  # relative tables are resized on the way just the same
        torch.testing.assert_close(model(x), kept(x), atol=1e-5, rtol=1e-4)
    assert model(x).shape == (1, 11)


@pytest.mark.parametrize(
    ("name", "format", "settings", "message"),
    [
        ("mvit_micro", "pytorchvideo", {}, "pool_norm_eps"),
        ("mvitv2_micro_clip", "pytorchvideo", {}, "relative=True"),
        ("mvitv2_micro", "timm", {}, "no picture MViT of depths"),
        ("mvitv2_micro", "torchvision", {}, "frames=None"),
        ("mvitv2_tiny", "timm", {"residual_pool": False}, "residual_pool=False"),
    ],
)
def test_what_a_project_cannot_hold(name: str, format: str, settings: dict, message: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_model(create_model(name, **settings), tmp_path / "out", format=format)


def test_what_a_format_does_not_say_is_named_when_answers_differ(tmp_path) -> None:
    model = create_model("mvit_micro")
    torch.nn.init.normal_(model.head.linear.weight)
    written = check_written(model, save_model(model, tmp_path / "out", format="pyslowfast"), "pyslowfast")
    assert not written.agrees
    assert "does not say key_strides=((1, 4, 4), (1, 2, 2)) (read as " in "\n".join(written.lines())
