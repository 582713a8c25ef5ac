from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from tests.data.layouts import add_members, pictures, write_shards
from tests.data.pictures import encode, photo

from vitrail.config import DataConfig
from vitrail.data import DataError, open_data
from vitrail.data.shards import expand_braces, expand_shards, shard_index

ALL = DataConfig(val_fraction=0)
A, B, C = (encode(photo(8, 8, seed=at)) for at in range(3))


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("{9..10}") == ["9", "10"]
    assert expand_braces("plain{}.tar") == ["plain{}.tar"]


def test_shards_by_folder_pattern_and_list(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards", pictures({"train": 4}))
    for source in (root, str(root / "*.tar"), str(root / "train-{000..001}.tar"), sorted(root.glob("*.tar"))):
        data = open_data(source, ALL)
        assert len(data.train) == 12
    one = open_data(root / "train-000.tar", ALL)
    assert len(one.train) == 6
    with pytest.raises(DataError, match=r"train-002.tar: no such shard"):
        open_data(str(root / "train-{000..002}.tar"))
    (root / "train-003.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"only plain .tar shards can be read at random"):
        expand_shards(str(root / "*"))


def test_where_labels_and_splits_come_from(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"a.jpg": A, "a.cls": b"ant\n", "a.json": b'{"label": "no"}'})
    add_members(shard, {"b.png": B, "b.json": b'{"category": "bee", "set": 1}', "b.txt": b"a caption"})
    add_members(shard, {"cat/c.v2.jpeg": C})
    add_members(shard, {"val/cat/d.jpg": A})
    data = open_data(shard, ALL)
    assert data.classes == ("ant", "bee", "cat")
    assert [data.train.names(at) for at in range(3)] == ["a.jpg", "b.png", "cat/c.v2.jpeg"]
    assert [data.train.read(at) for at in range(3)] == [A, B, C]
    assert data.val.names(0) == "val/cat/d.jpg"
    assert open_data(shard, DataConfig(val_fraction=0, label_column="category"), classes=["bee"]).train.names(0) == "b.png"


def test_several_pictures_in_a_sample(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    for key, label in (("x", b"1"), ("y", b"2")):
        add_members(shard, {f"{key}.left.jpg": A, f"{key}.right.jpg": B, f"{key}.cls": label})
    with pytest.raises(DataError, match=r"several pictures \(left.jpg, right.jpg\); choose one with image_column"):
        open_data(shard)
    assert open_data(shard, DataConfig(image_column="right.jpg", val_fraction=0)).train.read(0) == B
    with pytest.raises(DataError, match=r"unknown member 'rihgt.jpg': did you mean 'right.jpg'"):
        open_data(shard, DataConfig(image_column="rihgt.jpg"))


def test_the_index_is_written_once_and_made_again_when_the_shard_changes(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"ant/a.jpg": A, "bee/b.jpg": B})
    open_data(shard, ALL)
    index = tmp_path / "shard.tar.index.json"
    assert sorted(os.listdir(tmp_path)) == ["shard.tar", "shard.tar.index.json"]  # no draft is left behind
    written = index.stat().st_mtime_ns
    open_data(shard, ALL)
    assert index.stat().st_mtime_ns == written
    add_members(shard, {"bee/c.jpg": C})
    assert len(open_data(shard, ALL).train) == 3
    made = json.loads(index.read_text())
    assert made["size"] == shard.stat().st_size
    os.utime(shard, ns=(0, 0))
    assert shard_index(shard)["mtime_ns"] == 0


@pytest.mark.parametrize("place", [[-1, 5], [0, 10**12], ["0", 5], [0], [True, 1]])
def test_an_index_that_names_impossible_places_is_not_believed(tmp_path: Path, place: list[object]) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"ant/a.jpg": A, "bee/b.jpg": B})
    made = shard_index(shard)
    good = made["samples"]["ant/a"]["jpg"]
    made["samples"]["ant/a"]["jpg"] = place
    (tmp_path / "shard.tar.index.json").write_text(json.dumps(made))
    assert shard_index(shard)["samples"]["ant/a"]["jpg"] == good


def test_a_read_only_folder_has_its_index_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"ant/a.jpg": A, "bee/b.jpg": B})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shard.tar.index.json").mkdir()  # what keeps even the superuser from writing there
    assert len(open_data(shard, ALL).train) == 2
    (cached,) = (tmp_path / "cache" / "vitrail" / "shards").iterdir()
    written = cached.stat().st_mtime_ns
    assert len(open_data(shard, ALL).train) == 2
    assert cached.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "..\\a.jpg"])
def test_members_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    add_members(tmp_path / "shard.tar", {"ant/a.jpg": A, name: B})
    with pytest.raises(DataError, match="leads out of the archive; the shard is refused"):
        open_data(tmp_path / "shard.tar")


def test_links_are_never_followed(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"ant/a.jpg": A, "bee/b.jpg": B})
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("bee/c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    data = open_data(shard, ALL)
    assert len(data.train) == 2
    assert "1 link or special member of the shards ignored" in data.notes


def test_a_shard_cut_short(tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    add_members(shard, {"ant/a.jpg": A, "bee/b.jpg": B, "bee/c.jpg": C})
    whole = shard.read_bytes()
    start = shard_index(shard)["samples"]["bee/c"]["jpg"][0]
    (tmp_path / "shard.tar.index.json").unlink()
    shard.write_bytes(whole[: start + 10])
    data = open_data(shard, ALL)
    assert len(data.train) == 2
    assert dict(data.train.bad) == {"bee/c.jpg": "the shard ends inside this picture"}
    assert "1 shard cut short: shard.tar" in data.notes
    (tmp_path / "none.tar").write_bytes(b"")
    with pytest.raises(DataError, match="not a readable tar archive"):
        open_data(tmp_path / "none.tar")


def test_shards_without_pictures(tmp_path: Path) -> None:
    add_members(tmp_path / "shard.tar", {"a.cls": b"ant", "b.cls": b"bee"})
    with pytest.raises(DataError, match="no sample with a picture in 1 shard"):
        open_data(tmp_path / "shard.tar")
    add_members(tmp_path / "shard.tar", {"c.jpg": A, "c.cls": b"cat", "d.jpg": B, "d.cls": b"dog"})
    notes = open_data(tmp_path / "shard.tar", ALL).notes
    assert "2 samples without a picture ignored, such as a" in notes


def test_a_shard_store_travels_without_its_open_files(tmp_path: Path) -> None:
    data = open_data(write_shards(tmp_path / "s", pictures({"train": 4})), ALL)
    first = data.train.read(0)
    assert pickle.loads(pickle.dumps(data.train)).read(0) == first
    for shard in (tmp_path / "s").glob("*.tar"):
        os.truncate(shard, 600)
    short = pickle.loads(pickle.dumps(data.train))
    with pytest.raises(OSError, match="ends inside this picture"):
        short.read(5)


def test_pictures_of_a_gnu_archive_with_long_names(tmp_path: Path) -> None:
    name = "ant/" + "x" * 150 + ".jpg"
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for member, data in ((name, A), ("bee/b.jpg", B)):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = open_data(tmp_path / "s.tar", ALL)
    assert data.train.names(0) == name
    assert data.train.read(0) == A
