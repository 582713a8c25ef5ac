"""Swin with timm, torchvision and transformers: each reads what we write strictly, we read theirs, the logits are equal."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import CheckpointError, load_model, save_model
from vitrail.config import ModelCard, Preprocess
from vitrail.models import create_model

pytestmark = pytest.mark.peers
CARD = ModelCard(classes=("a", "b", "c"), preprocess=Preprocess((32, 32), 3, "crop", 0.8, "bilinear", (0.4,), (0.3,)))
NAMES = ["swin_micro", "swinv2_micro"]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, tables and scales too."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=2.0 if name.endswith("logit_scale") else 0.0, std=0.2)
    return model.eval()


def random_swin(name: str, **settings):
    model = shaken(create_model(name, num_classes=3, image_size=32, patch=(4, 4), **settings))
    model.card = CARD
    return model


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"pad_first": False, "window": (3, 3)}, {"qkv_bias": False, "mlp_ratio": 2.0}])
def test_timm_reads_ours(name: str, settings: dict, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import timm

    model = random_swin(name, **settings)
    save_model(model, tmp_path / "out", format="timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    compare(record_property, "swin", "timm", WRITES, model(pictures), peer(pictures))
    data = timm.data.resolve_model_data_config(peer)
    assert (tuple(data["mean"]), data["crop_pct"]) == ((0.4, 0.4, 0.4), 0.8)
    again = load_model(tmp_path / "out", quiet=True)
    torch.testing.assert_close(again(pictures), model(pictures))
    assert (again.config.windows, again.config.image_size) == (model.config.windows, (32, 32))


@pytest.mark.parametrize("name", [
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_tiny_window16_256",
    "swinv2_base_window12to16_192to256",
])  # fmt: skip
def test_we_read_what_timm_makes(name: str, tmp_path, record_property) -> None:
    import timm

    peer = shaken(timm.create_model(name))
    save_file(peer.state_dict(), tmp_path / f"{name}.ms_in1k.safetensors")
    model = load_model(tmp_path / f"{name}.ms_in1k.safetensors", quiet=True)
    side = peer.default_cfg["input_size"][1]
    assert model.config.image_size == (side, side)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        compare(record_property, "swin", "timm", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")  # inside timm
def test_timm_at_another_size(record_property) -> None:
    """Both read the same weights for larger pictures and windows: timm's rule resizes the tables, roll and padding as timm."""
    import timm

    small = shaken(timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6)))
    peer = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6), img_size=160, window_size=12
    ).eval()
    peer.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(small.state_dict(), peer))
    model = load_model(small.state_dict(), quiet=True, built_size=224, image_size=160, window=(12, 12))
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        compare(record_property, "swin", "timm", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)


def test_v2_at_another_size(record_property) -> None:
    import timm

    small = shaken(timm.create_model("swinv2_tiny_window8_256", depths=(2, 2), num_heads=(3, 6)))
    peer = timm.create_model(
        "swinv2_tiny_window8_256", depths=(2, 2), num_heads=(3, 6), img_size=160, window_size=12, pretrained_window_sizes=(8, 8)
    ).eval()
    peer.load_state_dict(small.state_dict())
    loaded = load_model(small.state_dict(), quiet=True, built_size=256)
    assert loaded.config.window == (8, 8)
    state = small.state_dict()
    model = load_model(state, quiet=True, built_size=256, image_size=160, window=(12, 12), pretrained_windows=((8, 8), (8, 8)))
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        compare(record_property, "swin", "timm", READS, model(x), peer(x), atol=1e-4, rtol=1e-4)


def torchvision_swin(version: int, **settings):
    from torchvision.models import swin_transformer as tv

    parts = {} if version == 1 else {"block": tv.SwinTransformerBlockV2, "downsample_layer": tv.PatchMergingV2}
    return tv.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=settings.get("num_classes", 3), **parts, mlp_ratio=4.0
    )


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_reads_ours(version: int, tmp_path, pictures: torch.Tensor, record_property) -> None:
    model = random_swin(NAMES[version - 1])
    path = save_model(model, tmp_path / "out", format="torchvision")
    peer = torchvision_swin(version).eval()
    made = {k: v.clone() for k, v in peer.state_dict().items() if "relative_position_index" in k or "coords_table" in k}
    peer.load_state_dict(load_file(path))
    for key, value in made.items():
        torch.testing.assert_close(peer.state_dict()[key], value)
    compare(record_property, "swin", "torchvision", WRITES, model(pictures), peer(pictures))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (44, 36), (12, 64)])
def test_we_read_what_torchvision_makes(version: int, size, record_property) -> None:
    peer = shaken(torchvision_swin(version))
    model = load_model(peer.state_dict(), quiet=True)
    assert model.config.window == (4, 4)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    compare(record_property, "swin", "torchvision", READS, model(x), peer(x))


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_reads_ours(version: int, tmp_path, pictures: torch.Tensor, record_property) -> None:
    import transformers

    model = random_swin(NAMES[version - 1])
    save_model(model, tmp_path / "out", format="transformers")
    kind = ("Swin" if version == 1 else "Swinv2") + "ForImageClassification"
    peer, report = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    compare(record_property, "swin", "transformers", WRITES, model(pictures), peer.eval()(pictures).logits)
    assert list(peer.config.id2label.values()) == ["a", "b", "c"]
    again = load_model(tmp_path / "out", quiet=True)
    assert again.card.preprocess.crop_fraction == pytest.approx(0.8)
    torch.testing.assert_close(again(pictures), model(pictures))


@pytest.mark.parametrize("kind", ["SwinForImageClassification", "SwinModel", "Swinv2ForImageClassification", "Swinv2Model"])
@pytest.mark.parametrize("settings", [{}, {"image_size": 40}, {"use_absolute_embeddings": True}])
def test_we_read_what_transformers_writes(kind: str, settings: dict, tmp_path, record_property) -> None:
    import transformers

    if settings.get("use_absolute_embeddings") and kind.startswith("Swinv2"):
        pytest.skip("transformers cannot run it")
    family = kind.removesuffix("ForImageClassification").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(
        **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
           "id2label": {0: "x", 1: "y"}, **settings}
    )  # fmt: skip
    peer = shaken(getattr(transformers, kind)(config))
    peer.save_pretrained(tmp_path)
    model = load_model(tmp_path, quiet=True)
    x = torch.randn(2, 3, *model.config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if kind.endswith("Model"):
            compare(record_property, "swin", "transformers", READS, model.features(x).tokens, peer(x).last_hidden_state)
            return
        compare(record_property, "swin", "transformers", READS, model(x), peer(x).logits)
    assert model.card.classes == ("x", "y")


@pytest.mark.parametrize(("format", "settings", "message"), [
    ("timm", {"position_table": True}, "cannot hold position_table"), ("timm", {"window": (3, 3)}, "padding after rolling"),
    ("torchvision", {"window": (5, 5)}, "into other windows"), ("torchvision", {"in_channels": 4}, "cannot hold in_channels"),
    ("transformers", {"window": (2, 4)}, "square windows"), ("microsoft", {"fit": "always"}, "into other windows"),
])  # fmt: skip
def test_what_a_project_cannot_hold_is_refused(format: str, settings: dict, message: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_model(random_swin("swin_micro", **settings), tmp_path / "out", format=format)


def test_the_original_format_goes_both_ways(tmp_path, pictures: torch.Tensor) -> None:
    for name in NAMES:
        model = random_swin(name)
        path = save_model(model, tmp_path / name, format="microsoft")
        assert path.name == "model.pth"
        assert set(torch.load(path, weights_only=True)) == {"model"}
        again = load_model(path, quiet=True, window=(4, 4), image_size=32)
        torch.testing.assert_close(again(pictures), model(pictures))
