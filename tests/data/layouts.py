"""The same few pictures written as every kind of source."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tests.data.pictures import encode, photo

SPLITS = {"train": 6, "val": 2, "test": 3}
CLASSES = ("ant", "bee", "cat")
Pictures = dict[tuple[str, str, str], bytes]  # (split, class, file name) -> JPEG


def pictures(splits: dict[str, int] | None = None, classes: tuple[str, ...] = CLASSES) -> Pictures:
    """Distinct JPEGs of 32x40 pixels; file names run over all classes, so that order by name is not order by class."""
    made: Pictures = {}
    for split, number in (splits or SPLITS).items():
        for at in range(number * len(classes)):
            label = classes[at % len(classes)]
            made[split, label, f"img{at:03d}.jpg"] = encode(photo(32, 40, seed=len(made)))
    return made


def write_folder(root: Path, made: Pictures) -> Path:
    """root/[split/]class/file"""
    for (split, label, name), data in made.items():
        path = root / split / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_csv(root: Path, made: Pictures) -> Path:
    """A table of paths beside one flat folder of pictures, rows in reverse."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "files").mkdir()
    with open(root / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for (split, label, name), data in reversed(made.items()):
            (root / "files" / f"{split}-{label}").mkdir(exist_ok=True)
            (root / "files" / f"{split}-{label}" / name).write_bytes(data)
            table.writerow([f"files/{split}-{label}/{name}", label, split])
    return root / "table.csv"


def write_parquet(path: Path, made: Pictures) -> Path:
    """Structs {bytes, path} in two row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": data, "path": name}, "label": label, "split": split} for (split, label, name), data in made.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=len(rows) // 2 + 1)
    return path


def write_shards(root: Path, made: Pictures) -> Path:
    """Two shards for each split, labels as text members."""
    root.mkdir(parents=True, exist_ok=True)
    for (split, label, name), data in made.items():
        shard = root / f"{split}-{int(name[3:6]) % 2:03d}.tar"
        key = name.removesuffix(".jpg")
        add_members(shard, {f"{key}.jpg": data, f"{key}.cls": label.encode()})
    return root


def add_members(shard: Path, members: dict[str, bytes]) -> None:
    """Append files to a tar archive."""
    with tarfile.open(shard, "a") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_dataset(root: Path, made: Pictures) -> Path:
    """What the `datasets` library saves, with class labels."""
    parts = {}
    for wanted in dict.fromkeys(split for split, _, _ in made):
        rows = [(label, name, data) for (split, label, name), data in made.items() if split == wanted]
        columns = {
            "image": [{"bytes": data, "path": name} for _, name, data in rows],
            "label": [CLASSES.index(label) for label, _, _ in rows],
        }
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        parts[wanted] = datasets.Dataset.from_dict(columns, features=kinds)
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
