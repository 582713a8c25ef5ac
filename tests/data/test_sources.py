from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data import layouts
from tests.data.layouts import CLASSES, Pictures, pictures
from tests.data.pictures import encode, photo

from vitrail.config import ConfigError, DataConfig
from vitrail.data import Data, DataError, ImageDataset, open_data, pack_data

Writer = Callable[[Path, Pictures], object]


def packed(root: Path, made: Pictures) -> Path:
    data = open_data(layouts.write_folder(root.with_name("to-pack"), made), DataConfig())
    return pack_data(data, root, progress=False).path


LAYOUTS: dict[str, Writer] = {
    "csv": layouts.write_csv,
    "parquet": lambda root, made: layouts.write_parquet(root / "table.parquet", made),
    "shards": layouts.write_shards,
    "dataset": layouts.write_dataset,
    "packed": packed,
}


def contents(dataset: ImageDataset | None) -> list[tuple[bytes, int, str]]:
    """What a training run sees of a split, in order: bytes, target, file name."""
    found = []
    for index in range(len(dataset) if dataset else 0):
        raw = dataset.read(index)
        raw = Path(raw).read_bytes() if isinstance(raw, str) else raw
        found.append((raw, int(dataset.targets[index]), os.path.basename(dataset.names(index))))
    return found


def assert_same(one: Data, other: Data) -> None:
    assert one.classes == other.classes == CLASSES
    for split in ("train", "val", "test"):
        assert contents(getattr(one, split)) == contents(getattr(other, split))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples_in_the_same_order(tmp_path: Path, layout: str) -> None:
    made = pictures()
    folder = open_data(layouts.write_folder(tmp_path / "folder", made), DataConfig())
    assert {split: len(part) for split, part in folder.splits().items()} == {"train": 18, "val": 6, "test": 9}
    assert_same(folder, open_data(LAYOUTS[layout](tmp_path / "other", made), DataConfig()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_automatic_split_and_subsets_do_not_depend_on_the_layout(tmp_path: Path, layout: str) -> None:
    made = pictures({"train": 12})
    config = DataConfig(val_fraction=0.3, max_samples=4)
    folder = open_data(layouts.write_folder(tmp_path / "folder", made), config)
    assert folder.val is not None
    assert folder.train.class_counts().tolist() == [4, 4, 4]
    if layout == "packed":  # a packed set holds the split it was made with
        whole = open_data(tmp_path / "folder", DataConfig(val_fraction=0.3))
        other = open_data(pack_data(whole, tmp_path / "other", progress=False).path, config)
    else:
        other = open_data(LAYOUTS[layout](tmp_path / "other", made), config)
    assert_same(folder, other)


def test_folder_without_splits_and_its_canonical_order(tmp_path: Path) -> None:
    made = {("", label, name): data for (_, label, name), data in pictures({"": 10}).items()}
    data = open_data(layouts.write_folder(tmp_path, made), DataConfig())
    assert data.test is None
    assert len(data.train) + len(data.val) == 30
    names = [data.train.names(at) for at in range(len(data.train))]
    assert names == sorted(names)
    assert any("held out for validation" in note for note in data.notes)
    assert data.name == tmp_path.name


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    made = {("", label, name): data for (_, label, name), data in pictures({"": 4}, ("bus", "train")).items()}
    assert open_data(layouts.write_folder(tmp_path, made)).classes == ("bus", "train")


def test_nothing_is_written_by_opening(tmp_path: Path) -> None:
    folder = layouts.write_folder(tmp_path / "folder", pictures())
    layouts.write_parquet(tmp_path / "table.parquet", pictures())
    layouts.write_dataset(tmp_path / "saved", pictures())
    before = sorted(tmp_path.rglob("*"))
    for source in (folder, tmp_path / "table.parquet", tmp_path / "saved"):
        contents(open_data(source, DataConfig()).train)
    assert sorted(tmp_path.rglob("*")) == before


def test_whole_numbers_sort_as_numbers(tmp_path: Path) -> None:
    made = {("", label, name): data for (_, label, name), data in pictures({"": 2}, ("10", "9", "1")).items()}
    assert open_data(layouts.write_folder(tmp_path, made)).classes == ("1", "9", "10")


def test_folder_notes_name_what_is_left_out(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path, pictures())
    (root / "train" / "ant" / "notes.txt").write_text("hello")
    (root / "train" / "ant" / ".hidden.jpg").write_text("")
    (root / "train" / "dog").mkdir()
    (root / "docs").mkdir()
    data = open_data(root, DataConfig())
    notes = "\n".join(data.notes)
    assert data.classes == CLASSES
    assert "1 file ignored, in no class folder or no picture by name: train/ant/notes.txt" in notes
    assert "1 class folder without pictures ignored: train/dog" in notes
    assert "1 folder beside them ignored: docs" in notes
    assert len(data.train) == 18


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path / "root", pictures({"": 3}))
    (root / "ant" / "loop").symlink_to(root / "ant", target_is_directory=True)
    layouts.write_folder(tmp_path / "elsewhere", pictures({"": 2}, ("x",)))
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "x", target_is_directory=True)
    data = open_data(root, DataConfig(val_fraction=0))
    assert data.classes == ("ant", "bee", "cat", "dog")
    assert data.train.class_counts().tolist() == [3, 3, 3, 2]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder; nearest in .*: photos"):
        open_data(tmp_path / "photo")
    with pytest.raises(DataError, match="does not exist either"):
        open_data(tmp_path / "nowhere" / "photo")
    with pytest.raises(DataError, match=r"the folder is empty; expected photos/<class>/picture.jpg"):
        open_data(tmp_path / "photos")
    (tmp_path / "photos" / "a.jpg").write_bytes(encode(photo(8, 8)))
    with pytest.raises(DataError, match="1 picture but no class folders"):
        open_data(tmp_path / "photos")
    (tmp_path / "words.txt").write_text("hello")
    with pytest.raises(DataError, match=r"\.txt is not a data source"):
        open_data(tmp_path / "words.txt")


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, pictures({"": 3}, ("ant",)))
    with pytest.raises(DataError, match=r"one class only \('ant'\); a classifier needs at least two"):
        open_data(tmp_path)
    assert len(open_data(tmp_path, classes=["ant", "bee"]).train)  # pictures to judge a model with


def test_a_class_with_one_picture_is_noted_and_stays_in_training(tmp_path: Path) -> None:
    root = layouts.write_folder(tmp_path, pictures({"": 5}))
    (root / "dog").mkdir()
    (root / "dog" / "only.jpg").write_bytes(encode(photo(8, 8, seed=99)))
    data = open_data(root)
    assert data.train.class_counts()[3] == 1
    assert "1 class with a single training picture: 'dog'" in data.notes
    assert "no validation sample of 1 class with one picture: 'dog'" in data.notes


def test_class_names_that_differ_in_case_or_spaces_are_noted(tmp_path: Path) -> None:
    rows = [{"image": f"{at}.jpg", "label": label} for at, label in enumerate(["Cat", " cat", "dog ", "dog"])]
    for row in rows:
        (tmp_path / row["image"]).write_bytes(encode(photo(8, 8)))
    data = open_data(layouts.write_jsonl(tmp_path / "table.jsonl", rows), DataConfig(val_fraction=0))
    assert data.classes == ("Cat", "cat", "dog")
    assert data.train.class_counts().tolist() == [1, 1, 2]
    assert "classes 'Cat' and 'cat' differ only in letter case or spaces; they are kept apart" in data.notes


def test_class_names_stated_twice_are_refused() -> None:
    class Twice(list):
        classes = ("ant", "bee", "ant")

    with pytest.raises(DataError, match="class names appear twice: ant"):
        open_data(Twice([("a.jpg", 0), ("b.jpg", 1)]))
    with pytest.raises(ConfigError, match="classes: ant given twice"):
        open_data([("a.jpg", "ant"), ("b.jpg", "bee")], classes=["ant", "bee", "ant"])


def test_the_classes_of_a_model_decide_the_numbers_and_others_are_refused(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, pictures())
    data = open_data(tmp_path, classes=["dog", "cat", "bee", "ant"])
    assert data.classes == ("dog", "cat", "bee", "ant")
    assert data.train.class_counts().tolist() == [0, 6, 6, 6]
    assert "1 class of the model without samples: 'dog'" in data.notes
    with pytest.raises(DataError, match=r"Unknown to the model: 'ant', 'cat'; in the model but not in the data: 'dog'"):
        open_data(tmp_path, classes=["bee", "dog"])


def test_split_choices(tmp_path: Path) -> None:
    layouts.write_folder(tmp_path, pictures({"train": 8, "test": 3}))
    data = open_data(tmp_path)
    assert len(data.train) + len(data.val) == 24
    assert len(data.test) == 9
    chosen = open_data(tmp_path, DataConfig(val_split="test"))
    assert chosen.val is chosen.test
    assert any(note.startswith("the test split is used for validation too") for note in chosen.notes)
    assert list(chosen.splits()) == ["train", "test"]
    cut = open_data(tmp_path, DataConfig(val_split="train", val_fraction=0.25))
    assert len(cut.train) + len(cut.val) == 24
    assert len(cut.test) == 9
    with pytest.raises(ConfigError, match="unknown split 'tset': did you mean 'test'"):
        open_data(tmp_path, DataConfig(val_split="tset"))


def test_tables_in_a_folder_named_after_splits(tmp_path: Path) -> None:
    made = pictures({"train": 4, "test": 2})
    for split in ("train", "test"):
        part = {key: data for key, data in made.items() if key[0] == split}
        rows = [{"image": name, "class": label} for _, label, name in part]
        for (_, _, name), data in part.items():
            (tmp_path / name).write_bytes(data)
        layouts.write_jsonl(tmp_path / f"{split}.jsonl", rows)
    data = open_data(tmp_path, DataConfig(val_fraction=0))
    assert (len(data.train), len(data.test)) == (12, 6)


def test_several_tables_of_unknown_meaning_must_be_named(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("image,label\n")
    with pytest.raises(DataError, match=r"several tables \(one.csv, two.csv\); name the one to open"):
        open_data(tmp_path)


def test_list_of_paths_keeps_its_order(tmp_path: Path) -> None:
    paths = []
    for at in (3, 1, 2, 0):
        path = tmp_path / f"{at}.png"
        path.write_bytes(encode(photo(8, 8, seed=at), "PNG"))
        paths.append((path, "odd" if at % 2 else "even"))
    data = open_data(paths, DataConfig(val_fraction=0))
    assert [os.path.basename(data.train.names(at)) for at in range(4)] == ["3.png", "1.png", "2.png", "0.png"]
    assert data.train.targets.tolist() == [1, 1, 0, 0]
    assert data.train.read(0) == str(tmp_path / "3.png")


class Squares(torch.utils.data.Dataset):
    """A torch data set as users write them, with class names and targets."""

    classes = ("dark", "bright")

    def __init__(self, number: int = 8) -> None:
        self.targets = [at % 2 for at in range(number)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (4, 4), 200 * self.targets[index] + index), self.targets[index]


def test_torch_datasets_and_their_subsets() -> None:
    parts = {"train": Squares(), "test": torch.utils.data.Subset(Squares(), [1, 3, 4])}
    data = open_data(parts, DataConfig(val_fraction=0))
    assert data.classes == ("dark", "bright")
    assert data.train.targets.tolist() == [0, 1] * 4
    assert data.test.targets.tolist() == [1, 1, 0]
    assert np.asarray(data.test.read(2))[0, 0] == 4


def test_objects_without_targets_are_loaded_once_and_noted() -> None:
    class Bare:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index >= 4:
                raise IndexError
            return torch.full((3, 4, 4), index / 4), torch.tensor(index % 2)

    data = open_data(Bare(), DataConfig(val_fraction=0))
    assert data.classes == ("0", "1")
    assert any("loaded once" in note for note in data.notes)
    assert data.train.read(2).unique().tolist() == [128]  # a float picture in 0..1
    with pytest.raises(DataError, match=r"expected \(picture, label\)"):
        open_data([("a.jpg", 0, 1), ("b.jpg", 1, 1)])
    with pytest.raises(DataError, match="int: expected a path, a list of"):
        open_data(3)
    with pytest.raises(DataError, match="no samples"):
        open_data([])


def test_several_labels_from_vectors_and_lists() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    vectors = [(picture, np.array(row, np.float32)) for row in ([1, 0, 1], [0, 0, 0], [0, 1, 0])]
    data = open_data(vectors, DataConfig(val_fraction=0))
    assert data.multi_label
    assert data.train.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    named = open_data([(picture, ["sea", "sky"]), (picture, ["sky"]), (picture, [])], DataConfig(val_fraction=0))
    assert named.classes == ("sea", "sky")
    assert named.train.targets.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert named.train.class_counts().tolist() == [1, 2]


def test_embedded_digits() -> None:
    assert len(open_data("digits").train) + len(open_data("digits").val) == 4000
    data = open_data("digits", DataConfig(val_fraction=0))
    assert (len(data.train), len(data.test)) == (4000, 1000)
    assert data.val is None
    assert data.classes == tuple("0123456789")
    assert data.train.class_counts().tolist() == [400] * 10
    assert data.test.names(0) == "0/400"
    assert data.train.read(0).shape == (1, 20, 20)
    with pytest.raises(ConfigError, match="digits has no such choice"):
        open_data("digits", DataConfig(hold_out="noto"))
    with pytest.raises(ConfigError, match="choices of the embedded emoji"):
        open_data("photos", DataConfig(labels="glyph"))


def test_embedded_emoji() -> None:
    data = open_data("emoji")
    assert len(data.classes) == 8
    assert len(data.train) + len(data.val) == 7150
    assert data.train.read(0).shape == (3, 32, 32)
    glyphs = open_data("emoji", DataConfig(labels="glyph", hold_out="twemoji"))
    assert all(glyphs.test.names(at).startswith("twemoji/") for at in range(len(glyphs.test)))
    assert not any(glyphs.train.names(at).startswith("twemoji/") for at in range(len(glyphs.train)))
    assert ((glyphs.train.class_counts() + glyphs.test.class_counts()) > 1).all()
    with pytest.raises(ConfigError, match="unknown emoji designer 'twemojis': did you mean 'twemoji'"):
        open_data("emoji", DataConfig(hold_out="twemojis"))
    with pytest.raises(ConfigError, match="unknown kind of emoji labels 'glyphs'"):
        open_data("emoji", DataConfig(labels="glyphs"))


def test_embedded_sets_ship_with_their_licences() -> None:
    import vitrail.data.embedded as embedded

    root = Path(embedded.__file__).parent
    wanted = {"digits": ("Apache", "BSD-3-Clause"), "emoji": ("Apache", "Creative Commons", "MIT"), "bikes": ("BSD-3-Clause",)}
    for name, texts in wanted.items():
        licences = "".join(path.read_text() for path in (root / name).iterdir() if path.suffix in (".md", ".txt"))
        assert all(re.search(text, licences) for text in texts)
