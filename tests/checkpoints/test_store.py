from __future__ import annotations

import argparse
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.checkpoints import CheckpointError, load_checkpoint_card, load_model, save_model
from vitrail.checkpoints.fill import build_for
from vitrail.checkpoints.mapping import Report, drop, fuse, read, rename, transpose, write
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

MICROS = ("vit_micro_patch4_16", "resnet_micro", "cvt_micro")
CARD = ModelCard(
    "mine", ("cat", "dög"), False, Preprocess((16, 16), 3, "pad", 0.9, "bilinear", (0.1,), (0.2,)), "CC0", ("made",)
)


def random_model(name: str, **settings):
    model = create_model(name, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", MICROS)
def test_ours_round_trip(name: str, tmp_path) -> None:
    model = random_model(name, num_classes=2)
    model.card = CARD
    path = save_model(model, tmp_path / "out")
    assert path == tmp_path / "out" / "model.safetensors"
    for source in (tmp_path / "out", path):
        again = load_model(source)
        assert again.config == model.config
        assert again.card == CARD
        assert again.name == name
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(again(x), model(x))
    assert load_checkpoint_card(path) == (name, CARD)


@pytest.mark.parametrize(
    ("name", "format", "settings"),
    [
        ("vit_micro_patch4_16", "timm", {}),
        ("vit_micro_patch4_16", "timm", {"pool": "mean", "registers": 3, "position.prefix": False, "class_token": False}),
        ("vit_micro_patch4_16", "transformers", {"norm_eps": 1e-12}),
        ("vit_micro_patch4_16", "torchvision", {}),
        ("vit_micro_patch4_16", "google", {"activation": "gelu_tanh"}),
        (
            "vit_micro_patch4_16",
            "google",
            {"activation": "gelu_tanh", "pool": "attention", "class_token": False, "position.prefix": False},
        ),
        ("vit_micro_patch4_16", "google", {"activation": "gelu_tanh", "representation": 24}),
    ],
)
def test_foreign_round_trip(name: str, format: str, settings: dict, tmp_path) -> None:
    model = random_model(name, num_classes=2, **settings)
    model.card = CARD
    save_model(model, tmp_path / "out", format=format)
    again = load_model(tmp_path / "out", quiet=True, heads=4)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)
    if format in ("timm", "transformers"):
        assert again.card.classes == CARD.classes
        assert again.card.preprocess.mean == (0.1,) * 3


def test_a_published_resnet_round_trip(tmp_path) -> None:
    model = random_model("resnet18", num_classes=3)
    save_model(model, tmp_path / "out", format="torchvision")
    assert "layer4.1.bn2.running_var" in load_file(tmp_path / "out" / "model.safetensors")
    again = load_model(tmp_path / "out", quiet=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("settings", "format", "reason"),
    [
        ({"position.kind": "2d"}, "timm", "position.kind='2d'"),
        ({"registers": 2}, "transformers", "registers=2"),
        ({"activation": "quick_gelu"}, "torchvision", "activation='quick_gelu'"),
        ({}, "google", "activation='gelu'"),
        ({}, "onnx", "did you mean"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(settings: dict, format: str, reason: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        save_model(create_model("vit_micro_patch4_16", **settings), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_another_size_and_head(tmp_path, capsys) -> None:
    model = random_model("vit_micro_patch4_16")
    model.card = ModelCard(classes=tuple("0123456789"))
    save_model(model, tmp_path)
    again = load_model(tmp_path, image_size=(24, 32), num_classes=4)
    told = capsys.readouterr().err
    assert "resized: positions.0.table (1, 17, 32) -> (1, 49, 32)" in told
    assert "head.linear.weight (10, 32) -> (4, 32), zero-initialised" in told
    assert again.card.preprocess.image_size == (24, 32)
    assert again.card.classes == ()
    x = torch.randn(2, 3, 24, 32)
    assert not again(x).any()
    torch.testing.assert_close(again.features(x).tokens, model.features(x).tokens)  # resized at load = resized on the fly


def test_other_channel_counts_answer_alike() -> None:
    model = random_model("vit_micro_patch4_16")
    grey = load_model(_as_file(model), quiet=True, in_channels=1)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def _as_file(model) -> str:
    import tempfile

    return str(save_model(model, os.path.join(tempfile.mkdtemp(), "m.safetensors")))


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/vitrail-was-executed",))


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pyth"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, suffix: str) -> None:
    marker = "/tmp/vitrail-was-executed"
    if os.path.exists(marker):
        os.unlink(marker)
    path = tmp_path / f"evil{suffix}"
    torch.save({"model": {"weight": torch.zeros(2)}, "extra": Bomb()}, path)
    with pytest.raises(CheckpointError, match="would run code"):
        load_model(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_model(path)
    assert not os.path.exists(marker)


def test_inert_training_leftovers_are_accepted(tmp_path) -> None:
    model = random_model("vit_micro_patch4_16")
    save_model(model, tmp_path / "timm", format="timm")
    state = load_file(tmp_path / "timm" / "model.safetensors")
    wrapped = {"model": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(wrapped, tmp_path / "deit.pth")
    again = load_model(tmp_path / "deit.pth", quiet=True, heads=4)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("keep", [0, 5, 0.5])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_files_cut_short(tmp_path, suffix: str, keep: float) -> None:
    path = tmp_path / f"model{suffix}"
    state = {"a": torch.randn(100, 100)}
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    else:
        torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"empty|not a complete"):
        load_model(path)


def test_what_is_no_checkpoint_is_not_called_dangerous(tmp_path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(200))
    with pytest.raises(CheckpointError, match=r"film\.mp4: not a checkpoint"):
        load_model(tmp_path / "film.mp4")
    for nothing in (None, 5, ""):
        with pytest.raises(CheckpointError, match="weights are a path"):
            load_model(nothing)


def test_objects_in_npz_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "evil.npz", a=np.array([Bomb()], dtype=object))
    with pytest.raises(CheckpointError, match="plain arrays"):
        load_model(tmp_path / "evil.npz")


def test_wrong_shapes_and_missing_tensors_are_named(tmp_path) -> None:
    path = save_model(random_model("vit_micro_patch4_16"), tmp_path)
    metadata, state = _metadata(path), load_file(path)
    save_file(state | {"blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc1.weight is \(3, 3\), the model needs \(128, 32\)"):
        load_model(path)
    state.pop("norm.bias")
    save_file(state, path, metadata)
    with pytest.raises(CheckpointError, match=r"missing: norm.bias"):
        load_model(path)


def _metadata(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_unknown_weights_and_paths(tmp_path) -> None:
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="belong to no known layout"):
        load_model(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="create_model"):
        load_model("vit_tiny_patch16_224")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights found"):
        load_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model({"epoch": 3})


def test_a_newer_format_and_a_broken_description(tmp_path) -> None:
    path = save_model(random_model("vit_micro_patch4_16"), tmp_path)
    state, content = load_file(path), json.loads(_metadata(path)["vitrail"])
    save_file(state, path, {"vitrail": json.dumps(content | {"version": 99})})
    with pytest.raises(CheckpointError, match="newer version"):
        load_model(path)
    save_file(state, path, {"vitrail": "{"})
    with pytest.raises(CheckpointError, match="not readable"):
        load_model(path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    model = random_model("vit_micro_patch4_16")
    path = save_model(model, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("vitrail.checkpoints.io.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_table_operations_invert() -> None:
    rules = [
        *rename("a.{i}.{weight,bias}", "x/{i}/{kernel,offset}"),
        *transpose("b.{i}.weight", "y/{i}/kernel"),
        *fuse("qkv.{i}", "q/{i}", "k/{i}", "v/{i}"),
        *drop("junk.{i}.{left,right}"),
    ]
    theirs = {"x/0/kernel": torch.randn(3), "x/12/offset": torch.randn(2), "y/1/kernel": torch.randn(2, 5)}
    theirs |= {f"{name}/4": torch.randn(2, 2) for name in "qkv"}
    report = Report()
    ours = read(rules, theirs | {"junk.3.left": torch.zeros(1), "other": torch.zeros(1), "q/9": torch.zeros(1)}, report)
    assert set(ours) == {"a.0.weight", "a.12.bias", "b.1.weight", "qkv.4"}
    assert report.dropped == ["junk.3.left"]
    assert report.unexpected == ["other"]
    assert "k/{i}, v/{i} not in the file" in report.notes[0]
    back = write(rules, ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)
    with pytest.raises(CheckpointError, match="no place in this format"):
        write(rules, {"c.weight": torch.zeros(1)})


GOOGLE = {"activation": "gelu_tanh", "pool": "attention", "class_token": False, "position.prefix": False}


@pytest.mark.parametrize("root", ["params/", "params/img/", "opt/target/", "img/"])
def test_the_roots_that_google_wraps_weights_in(root: str, tmp_path) -> None:
    """Train states of big_vision and the image tower of SigLIP, whose text tower lies beside."""
    model = random_model("vit_micro_patch4_16", num_classes=0, **GOOGLE)
    path = save_model(model, tmp_path / "out", format="google")
    arrays = {f"{root}{name}": value for name, value in np.load(path).items()}
    np.savez(
        tmp_path / "wrapped.npz", **arrays, **{f"{root.replace('img/', 'txt/')}other/kernel": np.zeros((2, 2), np.float32)}
    )
    again = load_model(tmp_path / "wrapped.npz", quiet=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.pool(again.features(x)), model.pool(model.features(x)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("token", [True, False])
def test_the_oldest_tables_of_big_vision(token: bool, tmp_path) -> None:
    """A table at the top level with one row more than the grid: that row is added to the class token, or nobody's."""
    settings = {"activation": "gelu_tanh", "position.prefix": False} if token else GOOGLE
    model = random_model("vit_micro_patch4_16", num_classes=2, **settings)
    arrays = dict(np.load(save_model(model, tmp_path / "out", format="google")))
    row = np.full((1, 1, 32), 0.25, np.float32)
    table = arrays.pop("pos_embedding")
    arrays["Transformer/pos_embedding"] = np.concatenate([row, table], 1)
    if token:
        arrays["cls"] = arrays["cls"] - row
    np.savez(tmp_path / "old.npz", **arrays)
    again = load_model(tmp_path / "old.npz", quiet=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit_micro_patch4_16", "swin_micro", "swinv2_micro", "resnet_micro"])
def test_weights_that_replace_everything_are_loaded_without_drawing_others(name: str, tmp_path) -> None:
    model = random_model(name)
    save_model(model, tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    pairs = [*zip(loaded.parameters(), model.parameters(), strict=True), *zip(loaded.buffers(), model.buffers(), strict=True)]
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)  # buffers also of what no file holds
    loaded(torch.randn(2, *loaded.input_shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_head_that_the_weights_lack_starts_as_ever() -> None:
    torch.manual_seed(0)
    fresh = create_model("vit_micro_patch4_16", pool="attention", class_token=False)
    known = {key: value for key, value in fresh.state_dict().items() if not key.startswith("head.")}
    torch.manual_seed(0)
    built = build_for(known, fresh.config, "")
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("fraction", [1.0, 0.8])
def test_transformers_crop_as_we_do(tmp_path, fraction: float) -> None:
    """Also where the input is wider than high: the picture that is cut is larger by the crop fraction on both sides."""
    model = random_model("vit_micro_patch4_16", image_size=(16, 32))
    model.card = ModelCard(preprocess=Preprocess((16, 32), crop_fraction=fraction))
    save_model(model, tmp_path / "out", format="transformers")
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert written["crop_size"] == {"height": 16, "width": 32}
    assert written["size"] == {"height": round(16 / fraction), "width": round(32 / fraction)}
    read = load_model(tmp_path / "out", quiet=True, heads=4, image_size=(16, 32)).card.preprocess
    assert (read.fit, read.crop_fraction) == ("crop", fraction)
