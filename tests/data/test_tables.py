from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.layouts import pictures, write_csv, write_jsonl, write_parquet
from tests.data.pictures import encode, photo

from vitrail.config import DataConfig
from vitrail.data import DataError, check_data, open_data
from vitrail.data.parquet import ParquetStore

ALL = DataConfig(val_fraction=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for at in range(4):
        (tmp_path / f"{at}.png").write_bytes(encode(photo(8, 8, seed=at), "PNG"))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image,label\n0.png,ant\n1.png,bee\n"),
        ("t.csv", "\ufefffile_name;class\n0.png;ant\n1.png;bee\n"),
        ("t.tsv", "Filename\tother\tTarget\n0.png\t7\tant\n1.png\t8\tbee\n"),
        ("t.csv", 'label,whatever\n"ant",0.png\n\nbee , 1.png \n'),
        ("t.jsonl", '{"img": "0.png", "category": "ant"}\n\n{"img": "1.png", "category": "bee"}\n'),
    ],
)
def test_columns_are_recognised(folder: Path, name: str, text: str) -> None:
    data = open_data(write(folder / name, text), ALL)
    assert data.classes == ("ant", "bee")
    assert [data.train.names(at) for at in (0, 1)] == ["0.png", "1.png"]
    assert Path(data.train.read(0)) == folder / "0.png"
    assert any("pictures from column" in note for note in data.notes)


def test_columns_are_taken_as_named(folder: Path) -> None:
    table = write(folder / "t.csv", "image,label,fold,species,photo\nx,1,a,ant,0.png\nx,1,b,bee,1.png\nx,2,b,ant,2.png\n")
    config = DataConfig(image_column="photo", label_column="species", split_column="fold", train_split="b", val_split="a")
    data = open_data(table, config)
    assert (len(data.train), len(data.val)) == (2, 1)
    assert data.classes == ("ant", "bee")


def test_a_missing_column_names_the_nearest(folder: Path) -> None:
    table = write(folder / "t.csv", "image,species\n0.png,ant\n")
    with pytest.raises(DataError, match=r"no label column recognised among 'image', 'species'; name it with label_column"):
        open_data(table)
    with pytest.raises(DataError, match="unknown label column 'specie': did you mean 'species'"):
        open_data(table, DataConfig(label_column="specie"))
    with pytest.raises(DataError, match="no image column recognised among 'a', 'b'"):
        open_data(write(folder / "u.csv", "a,b\n1,2\n"))


def test_missing_files_are_named_and_left_out_or_refused(folder: Path) -> None:
    table = write(folder / "t.csv", "image,label\n0.png,ant\nlost.png,ant\n,bee\n1.png,bee\n")
    data = open_data(table, ALL)
    assert len(data.train) == 2
    assert dict(data.train.bad) == {"lost.png": "file not found", "": "the table's cell is empty"}
    assert any("2 unreadable pictures skipped" in note and "lost.png: file not found" in note for note in data.notes)
    with pytest.raises(DataError, match=r"lost.png: file not found \(set bad_files to skip"):
        open_data(table, DataConfig(bad_files="refuse", val_fraction=0))
    with pytest.raises(DataError, match=r"none of its 2 files exists; the first is 'a.png', looked for in"):
        open_data(write(folder / "u.csv", "image,label\na.png,ant\nb.png,bee\n"))


def test_paths_outside_the_folder_are_allowed_and_noted(folder: Path) -> None:
    inner = folder / "tables"
    inner.mkdir()
    table = write(inner / "t.csv", f"image,label\n../0.png,ant\n{folder}/1.png,bee\n")
    data = open_data(table, ALL)
    assert len(data.train) == 2
    assert "t.csv: 2 pictures outside the table's folder" in data.notes
    assert {Path(data.train.read(at)).resolve() for at in (0, 1)} == {folder / "0.png", folder / "1.png"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "image,label\n", "the table has no rows"),
        ("t.csv", "", "the table has no rows"),
        ("t.csv", "image,image\n0.png,1\n", "two columns have the same name"),
        ("t.csv", "image,label\n0.png,ant,bee\n", "line 2: 3 fields but 2 columns"),
        ("t.jsonl", '{"image": "0.png"\n', "line 1: not JSON"),
        ("t.jsonl", "[1]\n", "line 1: expected an object with named fields, got list"),
        ("t.parquet", "hello", "not a readable Parquet file"),
        ("t.jsonl", '{"image": "0.png", "label": 1.5}\n', "got a fraction"),
        ("t.jsonl", '{"image": "0.png", "label": {"a": 1}}\n', "expected text, a whole number"),
        ("t.csv", "image,label\n0.png,\n1.png,\n", "no sample has a label"),
    ],
)
def test_unreadable_tables(folder: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(write(folder / name, text))


def test_a_table_that_is_not_text(folder: Path) -> None:
    (folder / "t.csv").write_bytes(b"image,label\n0.png,\xff\xfe\n")
    with pytest.raises(DataError, match="not a readable table in UTF-8"):
        open_data(folder / "t.csv")


def test_samples_without_a_label_are_noted(folder: Path) -> None:
    data = open_data(write(folder / "t.csv", "image,label\n0.png,ant\n1.png,bee\n2.png,\n"), ALL)
    assert len(data.train) == 2
    assert "1 sample without a label left out, such as 2.png" in data.notes


def test_several_labels(folder: Path) -> None:
    text = open_data(write(folder / "t.csv", "image,tags\n0.png,sky|sea\n1.png,\n2.png, sea \n"), ALL)
    listed = open_data(
        write_jsonl(
            folder / "t.jsonl", [{"image": f"{at}.png", "tags": tags} for at, tags in enumerate([["sky", "sea"], [], ["sea"]])]
        ),
        ALL,
    )
    for data in (text, listed):
        assert data.multi_label
        assert data.classes == ("sea", "sky")
        assert data.train.targets.tolist() == [[1, 1], [0, 0], [1, 0]]
        assert data.train.targets.dtype == np.float32
    single = open_data(
        write(folder / "s.csv", "image,tags\n0.png,sky\n1.png,\n2.png,sea\n"), DataConfig(val_fraction=0, multi_label=True)
    )
    assert single.train.targets.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_parquet_of_paths_and_of_bytes(folder: Path) -> None:
    label = pa.array([1.0, 2.0, None, 1.0])  # how data frames store whole numbers with a gap
    pq.write_table(pa.table({"path": [f"{at}.png" for at in range(4)], "label": label}), folder / "paths.parquet")
    paths = open_data(folder / "paths.parquet", ALL)
    assert paths.classes == ("1", "2")
    assert len(paths.train) == 3
    raw = [(folder / f"{at}.png").read_bytes() for at in range(4)]
    pq.write_table(pa.table({"jpg": raw, "class": ["a", "b", "a", "b"]}), folder / "bytes.parquet")
    held = open_data(folder / "bytes.parquet", ALL)
    assert [held.train.read(at) for at in range(4)] == [raw[0], raw[2], raw[1], raw[3]]
    assert held.train.names(1) == "00000002"


def test_parquet_with_class_names_of_its_own(folder: Path) -> None:
    kinds = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["zebra", "ant"])})
    raw = [(folder / f"{at}.png").read_bytes() for at in range(3)]
    schema = kinds.arrow_schema
    pq.write_table(pa.Table.from_pydict({"image": raw, "label": [0, 1, -1]}, schema=schema), folder / "t.parquet")
    data = open_data(folder / "t.parquet", ALL)
    assert data.classes == ("zebra", "ant")
    assert data.train.targets.tolist() == [0, 1]
    pq.write_table(pa.Table.from_pydict({"image": raw, "label": [0, 1, 2]}, schema=schema), folder / "t.parquet")
    with pytest.raises(DataError, match="label 2: there are 2 classes, numbered from 0"):
        open_data(folder / "t.parquet")


def test_parquet_too_large_for_memory_is_read_by_row_groups(tmp_path: Path) -> None:
    made = pictures()
    path = write_parquet(tmp_path / "t.parquet", made)
    whole, grouped = ParquetStore(path, "image"), ParquetStore(path, "image", memory_limit=1000)
    assert whole.in_memory
    assert not grouped.in_memory
    assert not whole.notes
    assert "in row groups of up to 17; reading them in random order is slow" in grouped.notes[0]
    order = np.random.default_rng(0).permutation(len(made)).tolist()
    assert [grouped.read(row) for row in order] == [whole.read(row) for row in order]
    again = pickle.loads(pickle.dumps(grouped))
    assert again.read(3) == whole.read(3)
    assert len(pickle.dumps(whole)) < 2000  # names of files travel to loader processes, pictures do not


def test_class_folders_win_over_a_table_beside_them(tmp_path: Path) -> None:
    table = write_csv(tmp_path, pictures())
    (tmp_path / "files" / "x").mkdir()
    data = open_data(tmp_path / "files", ALL)
    assert data.classes[0] == "test-ant"
    assert len(open_data(table).classes) == 3


def test_row_groups_are_read_in_the_order_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pictures({"": 40})
    path = tmp_path / "t.parquet"
    rows = [{"image": data, "label": label} for (_, label, _), data in made.items()]  # classes lie mixed in every group
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    monkeypatch.setattr("vitrail.data.parquet.MEMORY_LIMIT", 0)
    monkeypatch.setattr("vitrail.data.parquet.GROUP_LIMIT", 0)
    data = open_data(path, ALL)
    loaded: list[list[int]] = []
    column = ParquetStore._column
    monkeypatch.setattr(ParquetStore, "_column", lambda store, groups: loaded.append(groups) or column(store, groups))
    assert check_data(data, progress=False).ok
    assert {group for groups in loaded for group in groups} == set(range(12))
    assert len(loaded) <= 40  # once each, and again where threads cross; in the order of classes it would be 120
