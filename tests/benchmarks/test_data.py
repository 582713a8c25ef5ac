from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data, pictures, results
from vitrail.config import Preprocess
from vitrail.data.images import image_size
from vitrail.data.transforms import Box

SIZES = ((1000, 1100), (1120, 900))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    pictures.make_photos(folder, SIZES)
    return pictures.jpegs(folder)


@pytest.fixture(autouse=True)
def _quiet_torchvision() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchvision")


def test_made_photos_weigh_what_camera_photos_weigh(photos: list[Path], tmp_path: Path) -> None:
    assert [image_size(path) for path in photos] == list(SIZES)
    for path in photos:
        assert 0.1 < path.stat().st_size / math.prod(image_size(path)) < 0.5
    pictures.make_photos(tmp_path, SIZES[1:])
    pixels = np.asarray(Image.open(tmp_path / "made-0.jpg"))
    assert 30 < pixels.std() < 70


def test_small_copies_and_cuts(photos: list[Path], tmp_path: Path) -> None:
    small = pictures.make_small(photos, tmp_path)
    assert len(small) == 2 * len(pictures.SMALL_QUALITIES)
    assert {max(image_size(path)) for path in small} == {500}
    cuts = pictures.make_cuts(photos, tmp_path, 9)
    assert len(set(cuts)) == 9
    assert len({image_size(path) for path in cuts}) > 5
    assert pictures.jpegs(tmp_path, at_least=1e6) == []


@pytest.mark.parametrize("size", [(1200, 1600), (1704, 2273), (375, 500), (333, 333)])
def test_the_centre_box_is_nearly_the_centre_crop(size: tuple[int, int]) -> None:
    top, left, height, width = data.centre_box(size)
    assert top % 8 == left % 8 == (size[0] - top - height) % 8 == (size[1] - left - width) % 8 == 0
    assert 0 <= height - 0.875 * min(size) < 16
    assert 0 <= width - 0.875 * min(size) < 16
    assert Box(top, left, height, width) == data.centre_box(size)


def test_a_training_crop_has_the_size_of_the_centre_crop(photos: list[Path]) -> None:
    for path in photos:
        augment = data.as_large_as_the_centre(path)
        assert augment.crop_ratio == (1.0, 1.0)
        assert augment.crop_scale[0] * math.prod(image_size(path)) == pytest.approx((0.875 * min(image_size(path))) ** 2)


@pytest.mark.parametrize("name", ["crop", "crop-bicubic", "random", "eval-exact", "eval-scaled"])
def test_every_path_gives_uint8_pictures_of_one_size(name: str, photos: list[Path]) -> None:
    task = data.tasks()[name]
    for load in (task.ours, task.peers["torchvision"]()):
        result = load(photos[0])
        assert result.shape == (3, 224, 224)
        assert result.dtype == torch.uint8


@pytest.mark.peers
@pytest.mark.parametrize("peer", ["timm", "transformers"])
def test_peers_see_the_same_picture(peer: str, photos: list[Path]) -> None:
    exact = data.tasks()["eval-exact"]
    theirs = torch.as_tensor(exact.peers[peer]()(photos[0]))
    assert theirs.dtype == torch.uint8
    assert data.grey_levels(exact.ours(photos[0]), theirs) < 1
    if peer == "timm":
        assert data.timm_train()(photos[0]).shape == (3, 224, 224)


def test_differences_are_measured_against_exact_pixels(photos: list[Path]) -> None:
    row = data.differences(photos[:1])
    assert row["eval-exact"] == {"mean": 0, "worst": 0}
    assert 0 < row["crop"]["mean"] < 2
    assert 0 < row["eval-scaled"]["mean"] < 2
    assert row["passes"] == (row["crop"]["mean"] <= 1.5)


def test_agreement_of_a_model(photos: list[Path], tmp_path: Path) -> None:
    from vitrail.checkpoints import save_model
    from vitrail.config import ModelCard
    from vitrail.models import create_model

    model = create_model("vit_micro_patch4_16", num_classes=4)
    model.card = ModelCard(classes=("a", "b", "c", "d"), preprocess=Preprocess(image_size=(16, 16), crop_fraction=0.9))
    save_model(model, tmp_path / "model")
    row = data.agreement(pictures.make_cuts(photos, tmp_path, 6), tmp_path / "model")
    assert row["pictures"] == row["decoded_smaller"] == 6
    assert set(row["same_top1"]) == {"crop", "eval-scaled"}
    assert all(0 <= share <= 1 for share in row["same_top1"].values())
    assert not row["passes"]  # too few pictures to claim anything


def test_cells_are_merged_and_name_no_place(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "data.json").write_text('{"older cell": {"ratio": 1.0}}')
    data.main(["--photos", str(photos[0].parent), "--pairs", "2", "--only", "500px crop torchvision"])
    data.main(["--photos", str(photos[0].parent), "--pairs", "2", "--only", "500px difference"])
    text = (tmp_path / "data.json").read_text()
    content = json.loads(text)
    assert set(content) == {"older cell", "500px crop torchvision", "500px difference"}
    cell = content["500px crop torchvision"]
    assert cell["pairs"] == 2
    assert cell["pictures"] == len(cell["files"]) == 6
    assert cell["low"] <= cell["ratio"] <= cell["high"]
    assert cell["passes"] == (cell["ratio"] >= 1.4)
    assert cell["measured"]["threads"] == 1
    assert {"commit", "date", "device", "cores", "versions"} <= set(cell["measured"])
    assert str(photos[0].parent) not in text
    assert "500px crop torchvision" in capsys.readouterr().out


def test_a_folder_without_large_jpegs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data.main(["--photos", str(tmp_path)])
    assert "no JPEG of at least a megapixel" in capsys.readouterr().err
