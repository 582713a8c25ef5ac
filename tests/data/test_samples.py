from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.pictures import encode, photo

from vitrail.data import BadFiles, DataError, ImageDataset, open_data
from vitrail.data.samples import count
from vitrail.data.stores import ColumnStore, ConcatStore, PathStore, TensorStore, as_picture, content_key


def test_bad_files_are_counted_and_named_once() -> None:
    bad = BadFiles()
    assert bad.summary() == ""
    for name in ("b.jpg", "a.jpg", "b.jpg"):
        bad.add(name, "cut short")
    assert len(bad) == 2
    assert list(bad) == [("a.jpg", "cut short"), ("b.jpg", "cut short")]
    assert bad.summary() == "2 unreadable pictures skipped (a.jpg: cut short; b.jpg: cut short)"
    assert bad.summary(limit=1) == "2 unreadable pictures skipped (a.jpg: cut short; and 1 more)"
    with pytest.raises(DataError, match=r"a.jpg: cut short \(set bad_files to skip"):
        BadFiles("refuse").add("a.jpg", "cut short")


def test_content_keys_depend_on_content_only(tmp_path: Path) -> None:
    data = encode(photo(200, 300), "PNG")
    assert len(data) > 80_000  # longer than both ends together
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data)
    keys = {content_key(data), content_key(str(tmp_path / "a.png")), content_key(str(tmp_path / "b.png"))}
    assert len(keys) == 1
    for length in (0, 1, 40_000, 65_536, 70_000):
        (tmp_path / "part").write_bytes(data[:length])
        assert content_key(str(tmp_path / "part")) == content_key(data[:length])
    assert content_key(data[:-1]) != content_key(data)
    assert content_key(str(tmp_path / "lost.png")) == content_key(b"")
    pixels = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert content_key(pixels) == content_key(pixels.clone())
    assert content_key(Image.new("L", (2, 2), 3)) != content_key(Image.new("L", (2, 2), 4))


def test_pictures_from_python() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert torch.equal(as_picture(grey), torch.from_numpy(grey)[None])
    assert as_picture(np.zeros((2, 3, 4), np.uint8)).shape == (4, 2, 3)
    assert as_picture(torch.ones(3, 2, 2)).unique().tolist() == [255]
    assert as_picture(np.full((2, 2), 0x1234, np.uint16)).unique().tolist() == [0x12]
    assert as_picture({"bytes": b"abc", "path": "x"}) == b"abc"
    assert as_picture(Path("x/y.jpg")) == "x/y.jpg"
    assert as_picture(bytearray(b"abc")) == b"abc"
    for wrong in (3, None, np.zeros(3, np.uint8), torch.zeros(1, 2, 3, 4), torch.full((2, 2), 300), np.zeros((0, 3), np.uint8)):
        with pytest.raises(ValueError):
            as_picture(wrong)


def test_columns_hold_bytes_paths_or_both() -> None:
    import pyarrow as pa

    rows = [{"bytes": b"1", "path": "a"}, {"bytes": None, "path": "b"}, {"bytes": None, "path": None}]
    store = ColumnStore(pa.chunked_array([pa.array(rows[:1]), pa.array(rows[1:], pa.array(rows[:1]).type)]), "/root")
    assert [store.read(0), store.read(1)] == [b"1", "/root/b"]
    with pytest.raises(ValueError, match="the cell is empty"):
        store.read(2)
    with pytest.raises(ValueError, match="the cell holds int, not a picture"):
        ColumnStore(pa.chunked_array([[1]])).read(0)


def test_stores_one_after_the_other() -> None:
    pixels = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    store = ConcatStore([TensorStore(pixels[:1]), PathStore("/root", ["a.jpg", "/abs/b.jpg"]), TensorStore(pixels[1:])])
    assert len(store) == 4
    assert torch.equal(store.read(0), pixels[0])
    assert [store.read(1), store.read(2)] == ["/root/a.jpg", "/abs/b.jpg"]
    assert store.key(3) == content_key(pixels[1])


def test_dataset_reads_by_index_and_pickles_without_its_pixels() -> None:
    data = open_data("digits").test
    assert (len(data), data.names(150), data.targets.dtype) == (1000, "1/450", np.int64)
    data.keep("a", torch.zeros(10**6))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.pixels == {}
    assert torch.equal(copy.read(150), data.read(150))
    for key in ("b", "c"):
        data.keep(key, None)
    assert list(data.pixels) == ["b", "c"]
    with pytest.raises(ValueError, match="2 samples but 1 targets"):
        ImageDataset(data.store, [0, 1], ["a", "b"], np.zeros(1), ("x",))


def test_sizes_come_from_headers_and_pass_over_what_is_broken(tmp_path: Path) -> None:
    for at in range(5):
        (tmp_path / f"{at}.png").write_bytes(encode(photo(8, 8 + at), "PNG"))
    (tmp_path / "2.png").write_bytes(b"nothing")
    data = open_data([(tmp_path / f"{at}.png", at % 2) for at in range(5)]).train
    whole = ImageDataset(data.store, range(5), [str(at) for at in range(5)], np.zeros(5), ("x",))
    assert whole.sizes().tolist() == [[8, 8], [8, 9], [8, 11], [8, 12]]
    assert whole.sizes(limit=2).tolist() == [[8, 8], [8, 12]]
    assert len(whole.bad) == 0


def test_counts_read_well() -> None:
    assert [count(1, "class"), count(2, "class"), count(1, "picture"), count(3000, "picture")] == [
        "1 class",
        "2 classes",
        "1 picture",
        "3,000 pictures",
    ]
