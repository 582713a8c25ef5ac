"""Every golden case of X3D and SlowFast: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.models import MODELS, create_model

X3D = [i for i, c in golden.manifest().items() if c["family"] == "x3d"]
SLOWFAST = [i for i, c in golden.manifest().items() if c["family"] == "slowfast"]


def hints(case_id: str) -> dict:
    """The clip that a network was made for, which weights do not tell."""
    made = {
        "ptv_x3d_tinycfg": (4, 64), "ptv_x3d_xs_4x160": (4, 160), "ptv_x3d_xs_4x182": (4, 160), "ptv_x3d_m_16x224": (16, 224),
        "slowfast_x3d_tiny": (4, 64), "ptv_slowfast_tinycfg": (8, 64), "slowfast_slowfast_tiny": (16, 64),
    }  # fmt: skip
    name = case_id.removesuffix("_eps").removesuffix("_positions")
    return {"frames": made[name][0], "image_size": made[name][1]} if name in made else {}


def watch(module: torch.nn.Module, found: dict, key: str) -> None:
    module.register_forward_hook(lambda _module, _args, out: found.__setitem__(key, out))


@pytest.mark.parametrize("case_id", X3D)
def test_x3d_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **hints(case_id))
    want, x, got = golden.outputs(case), golden.inputs(case), {}
    watch(model.stem_time, got, "stage.0")
    for i, stage in enumerate(model.stages):
        watch(stage[-1], got, f"stage.{i + 1}")
    watch(model.stages[-1][-1], got, "features")
    with torch.inference_mode():
        got |= {"probs": model.probabilities(x), "logits_per_position": model.position_logits(x)}
        if x.shape[1:] == model.input_shape:
            torch.testing.assert_close(model(x).softmax(-1), got["probs"], atol=1e-6, rtol=1e-5)
    want["logits_per_position"] = want["logits_per_position"].flatten(1, 3)
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items()}
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", SLOWFAST)
def test_slowfast_matches_the_peer(case_id: str, record_property) -> None:
    """The peer takes both pathways' inputs apart, and not the same frames: so does the part behind the splitting."""
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **hints(case_id))
    want, slow, fast = golden.outputs(case), golden.inputs(case, "x_slow"), golden.inputs(case, "x_fast")
    with torch.inference_mode():
        maps = model._maps(slow, fast)
        pooled = model.pool(model._join(*maps[-1]))
        got = {"logits": model.head(pooled), "features": pooled[:, :, None, None, None], "stage.4": maps[-1][0]}
        stem = (model.slow.stem_pool(model.slow.stem(slow)), model.fast.stem_pool(model.fast.stem(fast)))
        for s, (a, b) in enumerate([stem, *maps[:-1]]):
            got[f"stage.{s}"] = torch.cat([a, model.fusions[s](b)], 1)
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items()}
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", [i for i in (*X3D, *SLOWFAST) if "tinycfg" in i])
def test_tables_write_what_they_read(case_id: str) -> None:
    state = golden.state(golden.manifest()[case_id])
    model = load_model(state, quiet=True, **hints(case_id))
    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def cut(value: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """The stored corner of a map."""
    return value[tuple(slice(n) for n in want.shape)]


def reads_and_writes(case: dict, tmp_path, **known):
    state = golden.original_state(case)
    torch.save({"model_state": state}, tmp_path / "checkpoint.pyth")
    model = load_model(tmp_path / "checkpoint.pyth", quiet=True, **known)
    save_model(model, tmp_path / "out", format="pyslowfast")
    back = torch.load(tmp_path / "out" / "model.pyth", weights_only=True)["model_state"]
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert {key for key in back if not key.endswith("num_batches_tracked")} == set(state)
    return model


def test_x3d_matches_the_authors(tmp_path, record_property) -> None:
    case, want, got = golden.original("slowfast_x3d_tiny"), golden.original_outputs("slowfast_x3d_tiny"), {}
    model = reads_and_writes(case, tmp_path, **hints("slowfast_x3d_tiny"))
    x = torch.from_numpy(golden.normals(case["input"][0]["name"], case["input"][0]["shape"]))
    watch(model.stem_time, got, "i.s1")
    for i, stage in enumerate(model.stages):
        watch(stage[-1], got, f"i.s{i + 2}")
    with torch.inference_mode():
        got |= {"probs_eval": model.probabilities(x), "raw_logits": model.position_logits(x)}
    want["raw_logits"] = want["raw_logits"].flatten(1, 3)
    errors = {key: float((cut(got[key.split("_ch8")[0]], value) - value).abs().max()) for key, value in want.items()}
    relative = [golden.worst(cut(got[key.split("_ch8")[0]], value), value) for key, value in want.items()]
    proofs.record(record_property, "slowfast_x3d_tiny", max(relative))
    assert max(errors.values()) <= 2e-5, errors


def test_slowfast_matches_the_authors(tmp_path, record_property) -> None:
    case, want, got = golden.original("slowfast_slowfast_tiny"), golden.original_outputs("slowfast_slowfast_tiny"), {}
    model = reads_and_writes(case, tmp_path, **hints("slowfast_slowfast_tiny"))
    slow, fast = (torch.from_numpy(golden.normals(spec["name"], spec["shape"])) for spec in case["input"])
    with torch.inference_mode():
        stem = (model.slow.stem_pool(model.slow.stem(slow)), model.fast.stem_pool(model.fast.stem(fast)))
        maps = model._maps(slow, fast)
        logits = model.head(model.pool(model._join(*maps[-1])))
    for s, pair in enumerate([stem, *maps]):
        got |= {f"i.s{s + 1}.pathway{p}": value for p, value in enumerate(pair)}
    got |= {"probs_eval": logits.softmax(-1), "raw_logits": logits[:, None, None, None]}
    errors = {key: float((cut(got[key.split("_ch8")[0]], value) - value).abs().max()) for key, value in want.items()}
    relative = [golden.worst(cut(got[key.split("_ch8")[0]], value), value) for key, value in want.items()]
    proofs.record(record_property, "slowfast_slowfast_tiny", max(relative))
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize(
    ("case_id", "name", "differs"),
    [
        ("ptv_slowfast_r50_8x8", "slowfast_r50_8x8", {"slow_frames": "linspace"}),
        ("ptv_x3d_m_16x224", "x3d_m", {"plain_shortcut": True}),
    ],
)
def test_published_shapes_tell_the_configuration(case_id: str, name: str, differs: dict) -> None:
    case = golden.manifest()[case_id]
    state = {key: torch.empty(shape, device="meta") for key, shape, _ in case["state_dict"]}
    config, notes = next(s for s in SOURCES if s.recognise(state)).infer(state, {}, {})
    assert [note.split(":")[0] for note in notes] == ["guess"]
    assert {f: v for f, v in vars(config).items() if v != getattr(MODELS[name], f)} == differs


@pytest.mark.parametrize("format", ["pytorchvideo", "pyslowfast"])
@pytest.mark.parametrize("name", ["slow_r50_8x8", "slowfast_r101_8x8", "x3d_xs", "x3d_xl", "slowfast_r101_16x8_nonlocal"])
def test_every_kind_goes_out_and_comes_back(name: str, format: str) -> None:
    settings = {"slow_frames": "linspace"} if "slow" in name else {"plain_shortcut": format == "pytorchvideo"}
    if "nonlocal" in name and format == "pytorchvideo":
        return
    with torch.device("meta"):
        model = create_model(name, **settings)
    source = next(s for s in SOURCES if (s.name, s.family) == (format, model.family))
    state = write(source.rules(model.config), model.state_dict())
    assert next(s for s in SOURCES if s.recognise(state)) is source
    c, known = model.config, {"frames": model.config.frames, "image_size": model.config.image_size}
    if "slow" in name:
        known = {"frames": c.frames, "nonlocal_kind": c.nonlocal_kind} | ({"alpha": c.alpha} if c.alpha else {})
    config, notes = source.infer(state, {}, known)
    assert notes == []
    silent = {"fast_kernels"} if name.startswith("slow_") else set()  # of a pathway that is not there
    assert {f for f, v in vars(config).items() if v != getattr(c, f)} <= silent


@pytest.mark.parametrize(
    ("name", "format", "settings", "message"),
    [
        ("x3d_micro", "pytorchvideo", {}, "nearest: format='pyslowfast'"),
        ("x3d_micro", "pyslowfast", {"plain_shortcut": True}, "nearest: format='pytorchvideo'"),
        ("slowfast_micro", "pytorchvideo", {}, "no non-local blocks"),
        ("slowfast_micro", "pyslowfast", {}, "slow_frames='linspace' to write it"),
        ("slowfast_micro", "timm", {}, "written as: vitrail, pytorchvideo, pyslowfast"),
    ],
)
def test_what_a_project_cannot_hold(name: str, format: str, settings: dict, message: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_model(create_model(name, **settings), tmp_path / "out", format=format)
