from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.layouts import pictures, write_folder
from tests.data.pictures import encode, photo

from vitrail.config import DataConfig
from vitrail.data import check_data, open_data
from vitrail.data.check import near_pairs, perceptual_hash

ALL = DataConfig(val_fraction=0)


def saved_again(data: bytes, quality: int = 60, scale: float = 1.0) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        size = (round(image.width * scale), round(image.height * scale))
        return encode(image.resize(size, Image.Resampling.BICUBIC), quality=quality)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = {key: encode(photo(96, 120, seed=at)) for at, key in enumerate(pictures())}
    return write_folder(tmp_path / "set", made)


def test_a_sound_set_has_no_findings(folder: Path) -> None:
    check = check_data(open_data(folder), progress=False)
    assert check.ok
    assert (check.copies, check.broken, check.odd_sizes) == ((), (), ())
    assert check.imbalance == 1.0
    assert check.counts == {"train": 18, "val": 6, "test": 9}
    assert [table.title for table in check.tables()] == ["Check of set"]


def test_exact_and_near_copies_leaks_and_contradictions(folder: Path) -> None:
    train, test = folder / "train", folder / "test"
    (train / "ant" / "same.jpg").write_bytes((train / "ant" / "img000.jpg").read_bytes())
    (test / "bee" / "leak.jpg").write_bytes(saved_again((train / "bee" / "img001.jpg").read_bytes(), 50, 0.7))
    (train / "ant" / "wrong.jpg").write_bytes(saved_again((train / "cat" / "img002.jpg").read_bytes()))
    check = check_data(open_data(folder), progress=False)
    assert not check.ok
    assert {(group.kind, group.leaks, group.contradicts) for group in check.copies} == {
        ("exact", False, False),
        ("near", True, False),
        ("near", False, True),
    }
    (leak,) = check.leaks
    assert {(sample.split, Path(sample.name).name, sample.label) for sample in leak.samples} == {
        ("train", "img001.jpg", "bee"),
        ("test", "leak.jpg", "bee"),
    }
    assert {sample.label for sample in check.contradictions[0].samples} == {"ant", "cat"}
    titles = [table.title for table in check.tables()]
    assert titles[1:] == ["Copies across splits", "Copies with different labels", "Other copies"]
    written = json.loads(json.dumps(check.to_dict()))
    assert written["ok"] is False
    assert {group["kind"] for group in written["copies"]} == {"exact", "near"}


def test_broken_pictures_are_listed_with_reasons(folder: Path) -> None:
    (folder / "train" / "ant" / "zero.jpg").write_bytes(b"")
    (folder / "val" / "bee" / "text.jpg").write_bytes(b"hello, this is text")
    cut = (folder / "test" / "cat" / "img002.jpg").read_bytes()
    (folder / "test" / "cat" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    check = check_data(open_data(folder, DataConfig(bad_files="refuse")), progress=False)
    assert {(sample.split, Path(sample.name).name) for sample, _ in check.broken} == {
        ("train", "zero.jpg"),
        ("val", "text.jpg"),
        ("test", "cut.jpg"),
    }
    reasons = " ".join(reason for _, reason in check.broken)
    assert "0 bytes" in reasons
    assert "begins with the text" in reasons
    assert "cut short" in reasons
    assert check.tables()[1].title == "Unreadable pictures"
    assert len(check.tables(limit=2)[1].rows) == 2
    assert check.tables(limit=2)[1].rows[1][0] == "... and 2 more"


def test_files_missing_from_a_table_are_broken(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encode(photo(32, 32), "PNG"))
    (tmp_path / "t.csv").write_text("image,label\n0.png,a\nlost.png,b\n")
    (broken,) = check_data(open_data(tmp_path / "t.csv", ALL), progress=False).broken
    assert (broken[0].name, broken[1]) == ("lost.png", "file not found")


def test_imbalance_and_odd_sizes(folder: Path) -> None:
    for path in sorted((folder / "train" / "ant").iterdir())[1:]:
        path.unlink()
    (folder / "train" / "bee" / "tiny.png").write_bytes(encode(photo(10, 40, seed=50), "PNG"))
    (folder / "train" / "bee" / "wide.png").write_bytes(encode(photo(100, 900, seed=51), "PNG"))
    check = check_data(open_data(folder), progress=False)
    assert check.imbalance == 8.0
    assert {(Path(sample.name).name, size) for sample, size in check.odd_sizes} == {
        ("tiny.png", (10, 40)),
        ("wide.png", (100, 900)),
    }
    assert check.ok  # noted, not wrong


def test_pictures_in_other_colours_are_no_copies(tmp_path: Path) -> None:
    pixels = photo(64, 64)
    for label, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        (tmp_path / label).mkdir()
        block = np.full((64, 64, 3), 255, np.uint8)
        block[16:48, 16:48] = np.array([230, 40, 40], np.uint8)[list(order)]
        block[24:40, 24:40] = pixels[24:40, 24:40].mean(2, keepdims=True)
        (tmp_path / label / "x.png").write_bytes(encode(block, "PNG"))
    assert check_data(open_data(tmp_path, ALL), progress=False).copies == ()


def test_the_hash_survives_saving_and_resizing_but_tells_pictures_apart() -> None:
    originals = [encode(photo(128, 128, seed=at), quality=95) for at in range(60)]

    def hashes(files: list[bytes]) -> np.ndarray:
        grey = [
            np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((32, 32), Image.Resampling.BOX), float)
            for data in files
        ]
        return perceptual_hash(np.stack(grey))

    first = hashes(originals)
    for changed in ([saved_again(data, 50) for data in originals], [saved_again(data, 90, 0.5) for data in originals]):
        distances = np.bitwise_count(first ^ hashes(changed))
        assert np.percentile(distances, 90) <= 6
    apart = np.bitwise_count(first[:, None] ^ first[None])[np.triu_indices(60, 1)]
    assert apart.min() > 6


def test_near_pairs_are_those_of_comparing_everything() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 200, dtype=np.uint64)
    changed = base.copy()
    for at in range(200):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            changed[at] ^= np.uint64(1) << np.uint64(bit)
    hashes = np.concatenate([base, changed])
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    one, other = np.nonzero(np.triu(np.ones_like(distance), 1) & (distance <= 3))
    found = {tuple(pair) for pair in near_pairs(hashes).tolist()}
    assert {*zip(one.tolist(), other.tolist(), strict=True)} <= found
    assert all(distance[pair] <= 6 for pair in found)
    assert len(near_pairs(hashes)) == len(found)  # each pair once
    assert near_pairs(np.zeros(0, np.uint64)).shape == (0, 2)


def test_near_pairs_stay_quick_for_many_alike() -> None:
    rng = np.random.default_rng(0)
    hashes = np.concatenate([np.zeros(20_000, np.uint64), rng.integers(0, 2**63, 20_000, dtype=np.uint64)])
    start = time.perf_counter()
    near_pairs(hashes)
    assert time.perf_counter() - start < 10


def test_flat_pictures_of_different_colours_are_no_copies(tmp_path: Path) -> None:
    for label, value in (("a", 10), ("b", 240), ("c", 11)):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(encode(np.full((40, 40, 3), value, np.uint8), "PNG"))
    check = check_data(open_data(tmp_path, ALL), progress=False)
    assert [{sample.label for sample in group.samples} for group in check.copies] == [{"a", "c"}]


def test_labels_of_several_and_of_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", photo(32, 32, channels=5))
    np.save(tmp_path / "1.npy", photo(32, 32, channels=5, seed=1))
    data = open_data([(tmp_path / "0.npy", ["x", "y"]), (tmp_path / "1.npy", [])], ALL)
    assert check_data(data, channels=5, progress=False).ok
    assert len(check_data(data, progress=False).broken) == 2  # 5 channels do not become 3
