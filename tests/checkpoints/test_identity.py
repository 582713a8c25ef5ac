"""What keys and shapes cannot tell: found where it is written, guessed aloud where it is not, refused where it contradicts."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.checkpoints.weights import COMMERCIAL, WEIGHTS, identify
from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.models import create_model

HALF, IMAGENET = (0.5,), (0.485, 0.456, 0.406)


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """A ViT-Ti/16 under timm's names, which are DeiT's too."""
    from vitrail.checkpoints.mapping import write
    from vitrail.checkpoints.store import SOURCES

    model = create_model("vit_tiny_patch16_224")
    source = next(s for s in SOURCES if (s.name, s.family) == ("timm", "vit"))
    return write(source.rules(model.config), model.state_dict())


@pytest.mark.parametrize(
    ("file", "mean", "why"),
    [
        ("vit_tiny_patch16_224.safetensors", HALF, "'vit_tiny_patch16_224.safetensors' stands for vit_tiny_patch16_224.augreg"),
        ("deit_tiny_patch16_224-a1311bcf.safetensors", IMAGENET, "stands for deit_tiny_patch16_224.original_in1k"),
        ("vit_tiny_patch16_224.augreg_in21k/model.safetensors", HALF, "'vit_tiny_patch16_224.augreg_in21k' stands for"),
        ("weights.safetensors", HALF, "guess: preprocessing"),
    ],
)
def test_the_name_decides_and_a_guess_is_called_one(file, mean, why, tiny, tmp_path, capsys) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    save_file(tiny, path)
    model = load_model(path)
    told = capsys.readouterr().err
    assert why in told
    assert ("guess: preprocessing" in told) == ("guess" in why)
    assert model.card.preprocess.mean == mean
    assert model.config.heads == 3
    assert model.card.classes[:2] == ("tench", "goldfish")
    assert "guess: 1000 classes" in told


def test_the_order_of_evidence(tiny, tmp_path, capsys) -> None:
    folder = tmp_path / "vit_tiny_patch16_224"
    folder.mkdir()
    # the name of the folder
    torch.save({"model": tiny}, folder / "weights.pth")
    assert load_model(folder).card.preprocess.mean == HALF
    assert "the name 'vit_tiny_patch16_224'" in capsys.readouterr().err
    # over it: what the training checkpoint says of itself
    torch.save({"model": tiny, "args": argparse.Namespace(model="deit_tiny_patch16_224")}, folder / "weights.pth")
    assert load_model(folder).card.preprocess.mean == IMAGENET
    assert "the file's own 'deit_tiny_patch16_224'" in capsys.readouterr().err
    # a configuration beside the weights says it in numbers
    settings = {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2], "crop_pct": 0.8}
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": settings}))
    assert load_model(folder).card.preprocess.crop_fraction == 0.8
    assert "from the configuration beside" in capsys.readouterr().err
    # over everything: the caller
    for asked, mean in [
        ("imagenet", IMAGENET),
        ("half", HALF),
        ("deit_tiny_patch16_224", IMAGENET),
        ({"like": "half", "crop_fraction": 1.0}, HALF),
        (Preprocess((224, 224), 3, "pad", mean=(0.3,), std=(0.4,)), (0.3,)),
    ]:
        assert load_model(folder, preprocess=asked).card.preprocess.mean == mean
        told = capsys.readouterr().err
        assert "(as asked)" in told
        assert told.count("preprocessing:") == 1
    with pytest.raises(ConfigError, match="'imagenet'"):
        load_model(folder, preprocess="imagnet")


def test_a_wrong_name_is_not_believed(tmp_path, capsys) -> None:
    model = create_model("vit_micro_patch4_16", num_classes=2)
    written = save_model(model, tmp_path / "out", format="timm")
    path = tmp_path / "vit_base_patch16_224.safetensors"
    save_file(load_file(written), path)
    again = load_model(path, heads=4)
    assert again.name == "vit_micro_patch4_16"
    assert "stands for vit_base_patch16_224" in (told := capsys.readouterr().err)
    assert "of another size: ignored" in told
    assert again.config.depth == 3
    load_model(path)
    assert "guess: " in capsys.readouterr().err  # heads, without the caller's word


def test_names_of_published_weights() -> None:
    for name, wanted, exact in [
        ("timm/vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k", True),
        ("/some/where/vit_b_16-c867db91.pth", "vit_base_patch16_224.tv_in1k", True),
        ("resnet50-11ad3fa6.pth", "resnet50.tv2_in1k", True),
        ("deit_small_patch16_224-cd65a155.pth", "deit_small_patch16_224.original_in1k", True),
        ("vit_small_patch16_224", "vit_small_patch16_224.augreg_in21k_ft_in1k", False),
    ]:
        row, is_exact = identify(name)
        assert (row.id, is_exact) == (wanted, exact)
    assert identify("weights.safetensors") is None
    assert identify("model.pth") is None


def test_rows_are_whole() -> None:
    assert len({row.id for row in WEIGHTS}) == len(WEIGHTS)
    for row in WEIGHTS:
        assert re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+|https://\S+\.(pth|npz)", row.source), row.id
        assert row.data, row.id
        assert row.commercial == (row.licence in COMMERCIAL)
    assert not next(row for row in WEIGHTS if row.id == "vit_base_patch16_224.mae").commercial


def test_a_layout_nobody_knows_names_the_nearest(tiny) -> None:
    strange = {key.replace("attn.qkv", "attn.in_proj"): value for key, value in tiny.items()}
    with pytest.raises(CheckpointError, match=r"nearest is timm vit, which \d+ of 152 fit.*blocks.0.attn.in_proj.weight"):
        load_model(strange)
    with pytest.raises(CheckpointError, match="belong to no known layout; known: "):
        load_model({"some.weight": torch.zeros(1)})


def test_two_models_in_one_file_are_refused(tiny) -> None:
    from vitrail.checkpoints.mapping import write
    from vitrail.checkpoints.store import SOURCES

    other = create_model("resnet18")
    source = next(s for s in SOURCES if s.family == "resnet")
    with pytest.raises(CheckpointError, match=r"mixes .* with .* that look like"):
        load_model(tiny | write(source.rules(other.config), other.state_dict()))


def test_a_block_that_is_missing_or_half_there(tiny) -> None:
    with pytest.raises(CheckpointError, match=r"tensors are missing: blocks\.5\."):
        load_model({key: value for key, value in tiny.items() if not key.startswith("blocks.5.")})
    with pytest.raises(CheckpointError, match=r"shapes do not fit: blocks\.2\.mlp\.fc2\.weight"):
        load_model(tiny | {"blocks.2.mlp.fc2.weight": torch.zeros(192, 700)})


def test_labels_that_do_not_fit_the_head(tmp_path, capsys) -> None:
    model = create_model("vit_micro_patch4_16", num_classes=3)
    save_model(model, tmp_path / "out", format="timm", card=ModelCard(classes=("a", "b")))
    assert load_model(tmp_path / "out", heads=4).card.classes == ()
    assert "2 class names for 3 outputs" in capsys.readouterr().err
    ours = save_model(model, tmp_path / "ours", card=ModelCard(classes=("a", "b")))
    assert load_model(ours).card.classes == ()
    assert "2 class names for 3 outputs" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["vitrail", "timm"])
def test_weights_that_are_no_numbers_are_reported(format: str, tmp_path, capsys) -> None:
    model = create_model("vit_micro_patch4_16")
    model.norm.weight.data[3] = float("nan")
    model.blocks[1].mlp.fc1.bias.data[0] = float("inf")
    save_model(model, tmp_path / "out", format=format)
    load_model(tmp_path / "out", heads=4)
    told = capsys.readouterr().err
    assert "nan or inf in 2 of" in told
    assert "norm.weight" in told


def test_the_wrong_size_is_named(tiny) -> None:
    with pytest.raises(ValueError, match=r"heads|width"):
        load_model(tiny, heads=5)
    with pytest.raises(CheckpointError, match=r"tensors|shapes"):
        load_model(tiny, depth=13)
    with pytest.raises(CheckpointError, match="shapes do not fit"):
        load_model(tiny, width=384, heads=6)
