from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.layouts import CLASSES, pictures, write_folder
from tests.data.pictures import encode, exif, photo

from vitrail.config import ConfigError, DataConfig, Preprocess
from vitrail.data import DataError, open_data, pack, pack_data
from vitrail.data.images import decode_image
from vitrail.data.transforms import resize_fit

ALL = DataConfig(val_fraction=0)


def test_pictures_that_are_small_enough_are_kept_byte_by_byte(tmp_path: Path) -> None:
    made = pictures()
    data = open_data(write_folder(tmp_path / "set", made))
    result = pack_data(data, tmp_path / "packed", size=32, progress=False)
    assert (result.samples, result.kept, result.left_out) == (33, 33, ())
    assert result.size_before == result.size_after == sum(map(len, made.values()))
    packed = open_data(result.path)
    assert packed.classes == data.classes
    for split, part in data.splits().items():
        other = packed.splits()[split]
        assert np.array_equal(other.targets, part.targets)
        for at in range(len(part)):
            assert other.names(at) == part.names(at)
            assert other.key(at) == part.key(at)
            assert other.read(at) == Path(str(part.read(at))).read_bytes()


def test_larger_pictures_are_resized_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "turned.jpg").write_bytes(encode(Image.fromarray(photo(200, 100)), exif=exif(6)))
    (tmp_path / "b" / "grey.png").write_bytes(encode(photo(90, 120)[:, :, 0], "PNG"))
    result = pack_data(open_data(tmp_path, ALL), tmp_path / "out" / "packed", size=50, quality=97, progress=False)
    assert (result.kept, result.samples) == (0, 2)
    train = open_data(result.path).train
    turned, grey = decode_image(train.read(0)), decode_image(train.read(1), channels=1)
    assert turned.shape == (3, 50, 100)
    assert grey.shape == (1, 50, 67)
    exact = resize_fit(decode_image(str(tmp_path / "a" / "turned.jpg")), Preprocess(image_size=(50, 100), fit="stretch"))
    assert (turned.float() - exact.float()).abs().mean() < 2
    with Image.open(io.BytesIO(train.read(1))) as image:  # type: ignore[arg-type]
        assert (image.format, image.mode) == ("JPEG", "L")


def test_the_datasets_library_opens_it(tmp_path: Path) -> None:
    data = open_data(write_folder(tmp_path / "set", pictures()))
    pack_data(data, tmp_path / "packed", progress=False)
    found = datasets.load_from_disk(str(tmp_path / "packed"))
    assert {name: len(part) for name, part in found.items()} == {"train": 18, "validation": 6, "test": 9}
    assert isinstance(found["train"].features["image"], datasets.Image)
    assert found["train"].features["label"].names == list(CLASSES)
    assert found["test"][0]["image"].size == (40, 32)
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {"dataset_dict.json", "train", "validation", "test"}


def test_pixels_from_memory_stay_exact(tmp_path: Path) -> None:
    pixels = photo(12, 14)
    data = open_data([(pixels, "a"), (torch.from_numpy(pixels[:, :, 0].copy()), "b")], ALL)
    train = open_data(pack_data(data, tmp_path / "packed", progress=False).path).train
    assert torch.equal(decode_image(train.read(0)), torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(decode_image(train.read(1), channels=1)[0], torch.from_numpy(pixels[:, :, 0].copy()))


def test_several_labels(tmp_path: Path) -> None:
    picture = photo(8, 8)
    data = open_data([(picture, ["x", "y"]), (picture, []), (picture, ["y"])], ALL)
    packed = open_data(pack_data(data, tmp_path / "packed", progress=False).path, ALL)
    assert packed.multi_label
    assert packed.classes == ("x", "y")
    assert packed.train.targets.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_unreadable_pictures_are_left_out_and_named_or_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", pictures())
    (root / "train" / "ant" / "zero.jpg").write_bytes(b"")
    whole = (root / "train" / "ant" / "img000.jpg").read_bytes()
    (root / "train" / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    result = pack_data(open_data(root), tmp_path / "packed", progress=False)
    assert {name for name, _ in result.left_out} == {"train/ant/cut.jpg", "train/ant/zero.jpg"}
    assert len(open_data(result.path).train) == 18
    with pytest.raises(DataError, match=r"train/ant/(zero|cut).jpg"):
        pack_data(open_data(root, DataConfig(bad_files="refuse")), tmp_path / "refused", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["packed", "set"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(write_folder(tmp_path / "set", pictures()))
    pack_data(data, tmp_path / "packed", progress=False)
    with pytest.raises(ConfigError, match="packed: exists already"):
        pack_data(data, tmp_path / "packed", progress=False)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack._Writer, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        pack_data(data, tmp_path / "other", progress=False)
    assert sorted(os.listdir(tmp_path)) == ["packed", "set"]


def test_nothing_readable(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no picture can be read; the first: a/x.png: an empty file"):
        pack_data(open_data(tmp_path, ALL), tmp_path / "packed", progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": 0}, "quality: 0"),
        ({"size": 0}, "size: 0"),
        ({"size": 8, "channels": 5}, "5 channels cannot be saved as JPEG"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_data(open_data("digits"), tmp_path / "packed", progress=False, **settings)


def test_large_records_are_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_BYTES", 3000)
    data = open_data(write_folder(tmp_path / "set", pictures()))
    packed = open_data(pack_data(data, tmp_path / "packed", progress=False).path)
    assert [len(part) for part in packed.splits().values()] == [18, 6, 9]
