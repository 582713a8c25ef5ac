from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.data.pictures import encode, photo

from vitrail.config import DataConfig
from vitrail.data import data_stats, open_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, shape, number in (("ant", (20, 30), 3), ("bee", (64, 48), 2)):
        (tmp_path / label).mkdir()
        for at in range(number):
            (tmp_path / label / f"{at}.png").write_bytes(encode(photo(*shape, seed=at), "PNG"))
    grey = photo(64, 48)[:, :, 0]
    (tmp_path / "bee" / "grey.BMP").write_bytes(encode(grey, "BMP"))
    (tmp_path / "bee" / "broken.jpg").write_bytes(b"")
    return tmp_path


def test_figures_by_hand(folder: Path) -> None:
    stats = data_stats(open_data(folder, DataConfig(val_fraction=0)), progress=False)
    images = [photo(20, 30, seed=at) for at in range(3)] + [photo(64, 48, seed=at) for at in range(2)]
    images.append(np.repeat(photo(64, 48)[:, :, :1], 3, axis=2))
    values = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([value.mean(0) for value in values], 0)
    std = np.sqrt(np.mean([(value**2).mean(0) for value in values], 0) - mean**2)
    assert stats.mean == pytest.approx(mean.tolist(), abs=1e-5)
    assert stats.std == pytest.approx(std.tolist(), abs=1e-5)
    assert stats.class_counts == {"train": {"ant": 3, "bee": 4}}
    assert (stats.readable, stats.unreadable, stats.grey) == (6, 1, 1)
    assert (stats.smallest, stats.median, stats.largest) == ((20, 30), (42, 39), (64, 48))
    assert stats.sizes == {"30 x 20": 3, "48 x 64": 3}
    assert stats.endings == {".png": 5, ".bmp": 1}
    assert {side: number for side, number in stats.shorter_sides.items() if number} == {"< 32": 3, "32 - 63": 3}
    json.dumps(stats.to_dict())
    tables = stats.tables()
    assert tables[1].columns == ("class", "train")
    assert tables[1].rows == [("ant", "3"), ("bee", "4")]


def test_mean_and_deviation_are_of_training_samples_only() -> None:
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    data = open_data({"train": [(dark, "a"), (dark, "b")], "test": [(bright, "a")]})
    stats = data_stats(data, progress=False)
    assert (stats.mean, stats.std) == ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    assert stats.class_counts == {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 0}}
    assert len(data_stats(data, channels=1, progress=False).mean) == 1


def test_nothing_readable(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"")
    stats = data_stats(open_data(tmp_path, DataConfig(val_fraction=0)), progress=False)
    assert (stats.readable, stats.unreadable, stats.mean) == (0, 2, (0.0, 0.0, 0.0))
    assert stats.tables()
