"""DINOv2 in three namings: transformers (with registers and without, classifiers, bare encoders), timm, the original files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.peers.pairs import READS, WRITES, compare

from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.mapping import CheckpointError, write
from vitrail.checkpoints.store import SOURCES
from vitrail.layers.position import resize_grid
from vitrail.models import create_model

pytestmark = pytest.mark.peers


def lively(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


def pictures(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_transformers(registers: int, gated: bool, tmp_path, record_property) -> None:
    import transformers

    name = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=4, image_size=28, patch_size=7, num_labels=3,
        use_swiglu_ffn=gated, **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    kind = getattr(transformers, f"{name}ForImageClassification")
    peer = lively(kind(settings))
    peer.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", quiet=True)
    assert (model.config.mlp, model.config.registers) == ("swiglu" if gated else "plain", registers)
    with torch.no_grad():
        for size in ((28, 28), (35, 21)):
            logits = peer(pictures(*size)).logits
            assert logits.std() > 0.1
            compare(record_property, "dinov2", "transformers", READS, model(pictures(*size)), logits)
        save_model(model, tmp_path / "ours", format="transformers")
        other, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        x = pictures(28, 28)
        compare(record_property, "dinov2", "transformers", WRITES, model(x), other.eval()(x).logits)


@pytest.mark.parametrize("registers", [0, 3])
def test_bare_encoders_of_transformers(registers: int, tmp_path, record_property) -> None:
    import transformers

    name = "Dinov2WithRegisters" if registers else "Dinov2"
    settings = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7,
        **({"num_register_tokens": registers} if registers else {}),
    )  # fmt: skip
    peer = lively(getattr(transformers, f"{name}Model")(settings))
    peer.save_pretrained(tmp_path / "theirs")
    model, x = load_model(tmp_path / "theirs", quiet=True), pictures(28, 28)
    with torch.no_grad():
        compare(record_property, "dinov2", "transformers", READS, model.features(x).tokens, peer(x).last_hidden_state)
        save_model(model, tmp_path / "ours", format="transformers")
        other = type(peer).from_pretrained(tmp_path / "ours").eval()
        compare(record_property, "dinov2", "transformers", WRITES, model(x), other(x).pooler_output)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"])
def test_timm(name: str, tmp_path, record_property) -> None:
    import timm

    peer = lively(timm.create_model(name, img_size=28, patch_size=7, embed_dim=48, depth=2, num_heads=4, num_classes=3))
    model, x = load_model(peer.state_dict(), quiet=True, heads=4), pictures(28, 28)
    assert model.config.mlp == ("swiglu" if "giant" in name else "plain")
    with torch.no_grad():
        compare(record_property, "dinov2", "timm", READS, model(x), peer(x))
        save_model(model, tmp_path / "out", format="timm")
        other = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        compare(record_property, "dinov2", "timm", WRITES, model(x), other(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_original_files(registers: int, gated: bool, tmp_path, record_property) -> None:
    """timm reads the original names, so it stands in for the authors' code, whose positions are resized by our formula test."""
    import timm

    settings = {"width": 48, "depth": 2, "heads": 4, "mlp_dim": 64, "mlp": "swiglu" if gated else "plain", "layer_scale": 0.1}
    position = {"position.registers": not registers, "position.resize": "bicubic" if registers else "bicubic_offset"}
    model = lively(
        create_model("vit_base_patch14_224", num_classes=0, image_size=28, patch=(7, 7), registers=registers, mask_token=True,
                     **settings, **position)
    )  # fmt: skip
    source = next(s for s in SOURCES if s.name == "dinov2")
    state = write(source.rules(model.config), model.state_dict())
    assert ("register_tokens" in state, "blocks.0.mlp.w12.weight" in state) == (bool(registers), gated)
    again, x = load_model(state, quiet=True, heads=4), pictures(28, 28)
    assert again.config.position == model.config.position
    back = write(source.rules(again.config), again.state_dict())
    assert all(torch.equal(back[key], state[key]) for key in state)
    name = f"vit_{'giant' if gated else 'small'}_patch14_{'reg4_' if registers else ''}dinov2"
    peer = timm.create_model(
        name,
        img_size=28,
        patch_size=7,
        embed_dim=48,
        depth=2,
        num_heads=4,
        mlp_ratio=(128 if gated else 64) / 48,
        num_classes=0,
    )
    file = save_model(again, tmp_path / "out", format="dinov2")
    peer.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(load_file(file), peer))
    with torch.no_grad():
        compare(record_property, "dinov2", "original names", WRITES, again(x), peer.eval()(x))


def test_what_the_formats_cannot_hold(tmp_path) -> None:
    model = create_model("vit_micro_patch4_16", registers=2, layer_scale=0.1, **{"position.registers": False})
    with pytest.raises(CheckpointError, match="timm cannot hold position"):
        save_model(model, tmp_path / "out", format="timm")
    with pytest.raises(CheckpointError, match="cannot hold"):
        save_model(create_model("vit_micro_patch4_16", pool="cls_mean"), tmp_path / "out", format="transformers")
    with pytest.raises(CheckpointError, match="layer scale"):
        save_model(create_model("vit_micro_patch4_16", num_classes=0), tmp_path / "out", format="dinov2")


@pytest.mark.parametrize(("size", "patch"), [((9, 5), 7), ((3, 3), 14), ((6, 4), 16)])
def test_dino_resizes_by_a_factor_with_an_offset(size: tuple[int, int], patch: int) -> None:
    """The formula of DINO's interpolate_pos_encoding: scale = (cells + 0.1) / sqrt(number of positions), bicubic."""
    table = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    height, width = size[0] * patch, size[1] * patch
    h0, w0 = height // patch + 0.1, width // patch + 0.1
    want = torch.nn.functional.interpolate(
        table.reshape(1, 4, 4, 8).permute(0, 3, 1, 2), scale_factor=(h0 / 16**0.5, w0 / 16**0.5), mode="bicubic"
    )
    got = resize_grid(table, (4, 4), size, "bicubic_offset")
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1).reshape(-1, 8))
    assert not torch.allclose(got, resize_grid(table, (4, 4), size, "bicubic_plain"), atol=1e-3)
