"""Every golden case of DeiT, plain and distilled: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import argparse

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.config import ModelCard, Preprocess
from vitrail.layers.attention import record_attention
from vitrail.models import create_model

CASES = [i for i, c in golden.manifest().items() if c["family"] == "deit"]
IMAGENET = (0.485, 0.456, 0.406)


def hints(case_id: str) -> dict:
    return {"heads": 4} if "tinycfg" in case_id else {}


@pytest.mark.parametrize("case_id", CASES)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **hints(case_id)).train(case.get("mode") == "train")
    want, x = golden.outputs(case), golden.inputs(case)
    assert model.family == ("deit" if "distilled" in case_id or "hf" in case_id else "vit")
    with torch.inference_mode(), record_attention(model) as maps:
        got = {"logits": model(x), "features": model.features(x).tokens}
        if model.family == "deit":
            first, second = model.both(x)
            got |= {"logits.0": first, "logits.1": second, "logits_cls": first, "logits_distillation": second}
    blocks = "backbone.blocks" if model.family == "deit" else "blocks"
    got |= {f"attn.{i}": maps[f"{blocks}.{i}.attn.site"] for i in range(model.config.depth)}
    errors = {key: golden.worst(golden.strided(case, key, got[key]), value) for key, value in want.items() if key in got}
    proofs.record(record_property, case_id, max(errors.values()))
    assert len(errors) == sum(not key.startswith("block.") for key in want)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", [i for i in CASES if "tinycfg" in i or i == "timm_deit_tiny_patch16_224"])
def test_tables_write_what_they_read(case_id: str) -> None:
    state = golden.state(golden.manifest()[case_id])
    model = load_model(state, quiet=True, **hints(case_id))
    (source,) = (s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_matches_the_authors(tmp_path, record_property) -> None:
    case, want = golden.original("deit_tinycfg_distilled"), golden.original_outputs("deit_tinycfg_distilled")
    state = golden.original_state(case)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(model="deit", lr=5e-4)}, path)
    model = load_model(path, quiet=True, heads=4)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"]))
    with torch.inference_mode():
        first, second = model.both(x)
        got = {"logits": model(x), "logits_cls": first, "logits_dist": second}
    proofs.record(record_property, "deit_tinycfg_distilled", max(golden.worst(got[key], want[key]) for key in got))
    for key, value in got.items():
        assert (value - want[key]).abs().max() <= 2e-5, key
    (source,) = (s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def random_deit(**settings):
    model = create_model("deit_micro", num_classes=2, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.card = ModelCard(classes=("a", "b"), preprocess=Preprocess((16, 16), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,)))
    return model


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("timm", {}),
        ("transformers", {"norm_eps": 1e-12}),
        ("transformers", {"prediction": "class", "qkv_bias": False, "activation": "gelu_tanh"}),
        ("vitrail", {"prediction": "distillation"}),
    ],
)
def test_round_trips(format: str, settings: dict, tmp_path) -> None:
    model, x = random_deit(**settings), torch.randn(2, 3, 16, 16)
    save_model(model, tmp_path / "out", format=format)
    again = load_model(tmp_path / "out", quiet=True)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)
    assert (again.family, again.config.prediction) == ("deit", model.config.prediction)
    assert again.card.classes == ("a", "b")
    assert again.card.preprocess.mean[0] == 0.4
    if settings.get("prediction") != "class":
        torch.testing.assert_close(again.both(x)[1], model.both(x)[1], atol=1e-6, rtol=1e-6)
    else:
        assert not again.head.distilled.weight.any()


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        ("timm", {"prediction": "class"}, "prediction='joint'"),
        ("timm", {"norm_eps": 1e-12}, "norm_eps"),
        ("transformers", {"prediction": "distillation"}, "distillation head alone"),
        ("transformers", {"position.kind": "2d"}, "cannot hold position"),
        ("torchvision", {}, "torchvision has no deit here; this family can be written as: vitrail, timm, transformers"),
    ],
)
def test_what_cannot_be_written(format: str, settings: dict, message: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_model(random_deit(**settings), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_another_size_channels_and_classes(capsys) -> None:
    state = golden.state(golden.manifest()["timm_deit_tinycfg_distilled"])
    model = load_model(state, heads=4, image_size=(24, 40), in_channels=1, num_classes=5)
    told = capsys.readouterr().err
    assert "backbone.embed.proj.weight (48, 3, 8, 8) -> (48, 1, 8, 8)" in told
    assert "backbone.positions.0.table (1, 18, 48) -> (1, 17, 48)" in told
    x = torch.randn(1, 1, 24, 40)
    assert not model(x).any()
    assert model.head.distilled.out_features == 5
    full = load_model(state, heads=4, quiet=True)
    torch.testing.assert_close(model.features(x).tokens, full.features(x.expand(-1, 3, -1, -1)).tokens, atol=1e-5, rtol=1e-5)


def test_preprocessing_comes_from_what_tells_it_best(tmp_path, capsys) -> None:
    """Plain DeiT-Ti and AugReg's ViT-Ti have the same names and shapes but other means."""
    model = create_model("vit_micro_patch4_16")
    model.card = ModelCard(preprocess=Preprocess((16, 16), mean=(0.1,), std=(0.2,)))
    save_model(model, tmp_path / "out", format="timm")
    file = tmp_path / "out" / "model.safetensors"
    assert load_model(tmp_path / "out", heads=4).card.preprocess.mean == (0.1,) * 3  # the configuration beside
    assert "guess" not in capsys.readouterr().err
    unnamed = file.rename(tmp_path / "weights.safetensors")  # published names: tests/checkpoints/test_identity.py
    assert load_model(unnamed, heads=4).card.preprocess.mean == (0.5,)
    assert "guess: preprocessing of AugReg" in capsys.readouterr().err
    wish = Preprocess((16, 16), mean=(0.3,), std=(0.3,))
    assert load_model(unnamed, heads=4, preprocess=wish).card.preprocess == wish
    assert "guess" not in capsys.readouterr().err


def test_distilled_weights_alone_get_the_preprocessing_of_deit() -> None:
    for case_id in ("timm_deit_tinycfg_distilled", "hf_deit_tinycfg_teacher"):
        card = load_model(golden.state(golden.manifest()[case_id]), quiet=True, heads=4).card
        assert (card.preprocess.mean, card.preprocess.crop_fraction) == (IMAGENET, 0.875)
        assert (card.preprocess.fit, card.preprocess.interpolation) == ("crop", "bicubic")
