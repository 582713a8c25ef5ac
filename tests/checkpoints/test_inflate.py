"""Video transformers that start from image models: as the published loaders do it, and so that a still clip changes nothing."""

from __future__ import annotations

import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, inflate, load_model, save_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.models import build, create_model
from vitrail.models.timesformer import TimeSformerConfig
from vitrail.models.vivit import ViViTConfig

CASES = {c["key"]: c for c in golden.original("vivit_init_from_image")["cases"] if "source_params" in c}
NAMES = {"spacetime": "joint", "factorized_encoder": "factorised_encoder",
         "factorized_self_attention_block": "factorised_self_attention",
         "factorized_dot_product_attention": "factorised_dot_product"}  # fmt: skip
KERNELS = {"central": "central_frame", "average": "average", "average_arp": "rank_pooling"}


@pytest.mark.parametrize("key", CASES)
def test_vivit_from_an_image_model_as_published(key: str, record_property) -> None:
    case, stored = CASES[key], golden.original_outputs("vivit_init_from_image")
    source = golden.original_state({"params": case["source_params"]})
    t = case["target_config"]
    h, w, frames = t["patches"]["size"]
    spatial = "spatial_" if t["attention_config"]["type"] == "factorized_encoder" else ""
    config = ViViTConfig(
        image_size=(case["img"], case["img"]), frames=case["frames"], tubelet=(frames, h, w), num_classes=t["num_classes"],
        width=t["hidden_size"], depth=t[spatial + "num_layers"], heads=t[spatial + "num_heads"], mlp_dim=t[spatial + "mlp_dim"],
        model=NAMES[t["attention_config"]["type"]], temporal_depth=1, pool="cls" if t["classifier"] == "token" else "mean",
    )  # fmt: skip
    video = build(config)
    (scenic,) = (s for s in SOURCES if s.name == "scenic")
    fresh = write(scenic.rules(config), video.state_dict())
    kernel = t["temporal_encoding_config"]["kernel_init_method"].removesuffix("_frame_initializer")
    image = load_model({k: v for k, v in source.items() if not k.startswith("output_projection")}, quiet=True)
    inflate(
        image, video, kernel=KERNELS[kernel], time_from_space=case["extra_init_from"].get("init_temporal_transformer", True)
    )
    got = write(scenic.rules(config), video.state_dict())
    assert set(got) == set(case["result_origin"])
    computed = [name for name, origin in case["result_origin"].items() if origin == "computed" and "posembed" not in name]
    error = max((golden.worst(got[name], stored[f"{key}/{name}"]) for name in computed), default=0.0)
    proofs.record(record_property, "vivit_init_from_image", error)
    for name, origin in case["result_origin"].items():
        if origin == "computed":
            want = stored[f"{key}/{name}"].clone()
            if key == "tile_token_from_gap" and name.endswith("pos_embedding"):
                want[:, 0] = fresh[name][:, 0]  # the class token's place keeps the new model's value
            torch.testing.assert_close(got[name], want, atol=2e-6, rtol=1e-5, msg=name)
        else:
            want = source[origin.removeprefix("copied from ")] if origin.startswith("copied") else fresh[name]
            assert torch.equal(got[name], want), name


@pytest.mark.parametrize("key", ["image_to_divided", "image_to_joint"])
def test_timesformer_from_an_image_model_as_published(key: str) -> None:
    case = next(c for c in golden.original("timesformer_load_pretrained")["cases"] if c["key"] == key)
    source = golden.original_state({"params": case["source_params"]})
    image = load_model(source, quiet=True, heads=2)
    assert image.family == "vit"
    kind = {"divided_space_time": "divided", "joint_space_time": "joint"}[case["target_attention"]]
    side = case["img"][1]
    config = TimeSformerConfig(
        image_size=(side, side), frames=case["frames"][1], patch=(8, 8), num_classes=7, width=16, depth=image.config.depth,
        heads=2, mlp_dim=64, attention=kind,
    )  # fmt: skip
    video = build(config)
    inflate(image, video, resize="nearest_sequence")
    (authors,) = (s for s in SOURCES if s.name == "timesformer")
    got = {k.removeprefix("model."): v for k, v in write(authors.rules(config), video.state_dict()).items()}
    assert set(got) == set(case["result_origin"])
    for name, origin in case["result_origin"].items():
        if name.startswith("head."):  # a new head here, whatever its size
            assert not got[name].any()
        elif origin == "computed":
            want = golden.original_outputs("timesformer_load_pretrained")[f"{key}/{name}"]
            torch.testing.assert_close(got[name], want)
        elif origin == "not loaded":
            assert not got[name].any(), name  # tables of times and temporal_fc start at zero
        else:
            assert torch.equal(got[name], source[name if origin == "same key" else origin.removeprefix("copied from ")]), name


@pytest.fixture
def image_model(tmp_path):
    image = create_model("vit_micro_patch4_16", activation="gelu_tanh").eval()
    for parameter in image.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_model(image, tmp_path / "image.safetensors")
    return image, tmp_path / "image.safetensors"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vivit_micro", {}),
        ("timesformer_micro", {"attention": "space"}),
        ("timesformer_micro", {}),
        ("timesformer_micro", {"attention": "joint"}),
    ],
)
def test_a_still_clip_looks_like_its_picture(name: str, settings: dict, image_model) -> None:
    """Repeating a picture over time changes no softmax average, so that the patches' features are the image model's.

    The class token of joint attention sees itself less often among more tokens; it is left out there.
    """
    image, path = image_model
    video = load_model(path, as_video=name, quiet=True, **settings)
    picture = torch.randn(2, 3, 16, 16)
    clip = picture[:, :, None].expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        frames = video.features(clip)
        wanted = image.features(picture)
    joint = name == "vivit_micro" or settings.get("attention") == "joint"
    if not joint:
        torch.testing.assert_close(frames.tokens[:, 0], wanted.tokens[:, 0], atol=1e-5, rtol=1e-4)
        for t in range(4):
            torch.testing.assert_close(frames.maps()[:, :, t], wanted.maps()[:, :, 0], atol=1e-5, rtol=1e-4)
    else:
        first = frames.maps()[:, :, 0]
        assert (frames.maps() - first[:, :, None]).abs().max() < 1e-5
        assert torch.nn.functional.cosine_similarity(first, wanted.maps()[:, :, 0]).min() > 0.95
    assert video.config.activation == "gelu_tanh"
    assert video.card.preprocess.frames == 4
    assert not video(clip).any()


def test_wrong_pairs_are_refused(image_model, tmp_path) -> None:
    _, path = image_model
    with pytest.raises(CheckpointError, match="depth 3, the video model 2"):
        load_model(path, as_video="vivit_micro", depth=2, quiet=True)
    with pytest.raises(ValueError, match="did you mean 'vivit_"):
        load_model(path, as_video="vivit_mikro", quiet=True)
    with pytest.raises(CheckpointError, match="no image model can become a vit"):
        load_model(path, as_video="vit_micro_patch4_16", quiet=True)
    save_model(create_model("resnet_micro"), tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match="those of a resnet"):
        load_model(tmp_path / "resnet.safetensors", as_video="vivit_micro", quiet=True)
    with pytest.raises(CheckpointError, match="no registers"):
        inflate(create_model("vit_micro_patch4_16", registers=2), create_model("vivit_micro"))
    with pytest.raises(ValueError, match="central_frame"):
        inflate(create_model("vit_micro_patch4_16"), create_model("vivit_micro"), kernel="central")
