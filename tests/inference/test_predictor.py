from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.checkpoints import save_model
from vitrail.config import ConfigError, ModelCard, Preprocess
from vitrail.inference import Prediction, Predictor
from vitrail.models import Model, create_model

CLASSES = ("blue", "green", "red")
PIXELS = Preprocess(image_size=(16, 16), fit="stretch", mean=(0.5,), std=(0.5,))


def colour_model(multi_label: bool = False) -> Model:
    """A ResNet whose head is set so that it names the strongest colour channel (a fixed stem makes channel means)."""
    model = create_model("resnet_micro", num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.stem.conv.weight[:3, :, 1, 1] = torch.eye(3)
        model.stem.norm.weight.fill_(1)
        model.stem.norm.bias.fill_(1)  # keeps -1..1 above the rectifier
        stages = list(model.stages)
        stages[1][0].shortcut.conv.weight[:3, :3, 0, 0] = torch.eye(3)
        stages[1][0].shortcut.norm.weight.fill_(1)
        model.head.linear.weight[:, :3] = 8 * torch.eye(3).flip(0)  # blue, green, red
        if multi_label:
            model.head.linear.bias.fill_(-7.5)
    model.card = ModelCard(classes=CLASSES, multi_label=multi_label, preprocess=PIXELS)
    return model.eval()


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(colour_model(), device="cpu", precision="fp32", batch_size=4, top=2)


@pytest.fixture
def broken(tmp_path: Path, picture_folder: Path) -> Path:
    """Three files that are no pictures beside one that is."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    whole = next((picture_folder / "red").iterdir())
    buffer = io.BytesIO()
    Image.open(whole).resize((200, 200)).save(buffer, "JPEG")
    (tmp_path / "short.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "whole.png").write_bytes(whole.read_bytes())
    return tmp_path


def test_a_folder_is_answered_in_order(predictor: Predictor, picture_folder: Path) -> None:
    found = predictor(picture_folder)
    assert [p.path for p in found] == sorted(str(path) for path in picture_folder.rglob("*.png"))
    assert all(Path(p.path).parent.name == p.label for p in found)
    for p in found:
        assert (p.label, p.probability) == p.top[0]
        assert len(p.top) == 2
        assert p.top[0][1] >= p.top[1][1]
        assert p.labels == (p.label,)
        assert p.error == ""


def test_every_kind_of_input_gives_the_same_answer(predictor: Predictor, picture_folder: Path) -> None:
    path = picture_folder / "red" / "red-00.png"
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    inputs = [str(path), path, path.read_bytes(), image, array, tensor, tensor.float() / 255]
    scores = predictor.logits(inputs)
    assert scores.shape == (7, 3)
    assert torch.equal(scores, scores[:1].expand(7, 3))
    assert [p.path for p in predictor(inputs)] == [str(path), str(path), *(f"#{i}" for i in range(2, 7))]
    for single in (str(path), path, image, array, tensor):
        assert predictor(single)[0].label == "red"


def test_grey_arrays_are_pictures_too(predictor: Predictor) -> None:
    assert predictor(np.full((9, 7), 200, np.uint8))[0].error == ""


def test_patterns_and_stdin(predictor: Predictor, picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = str(picture_folder / "**" / "*-0[01].png")
    found = [Path(p.path).name for p in predictor(pattern)]
    assert found == [f"{c}-0{i}.png" for c in CLASSES for i in range(2)]
    lines = f"{picture_folder / 'red' / 'red-03.png'}\n\n{picture_folder / 'blue' / 'blue-01.png'}\r\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert [p.label for p in predictor("-")] == ["red", "blue"]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines.replace("\r", "").replace("\n", "\0")))
    assert [p.label for p in predictor("-")] == ["red", "blue"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"none.png\nnor this\n{lines}and none"))
    assert [p.label for p in predictor("-")] == ["", "", "red", "blue", ""]


def test_names_between_zero_bytes_may_hold_line_ends(
    predictor: Predictor, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "over\ntwo \nlines.png"
    odd.write_bytes((picture_folder / "green" / "green-00.png").read_bytes())
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{odd}\0{picture_folder / 'red' / 'red-03.png'}\0{odd}\0"))
    assert [(p.path, p.label) for p in predictor("-")] == [
        (str(odd), "green"), (str(picture_folder / "red" / "red-03.png"), "red"), (str(odd), "green"),
    ]  # fmt: skip


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(
    predictor: Predictor, picture_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a[1].png"
    path.write_bytes((picture_folder / "green" / "green-00.png").read_bytes())
    assert [(p.path, p.label) for p in predictor(str(path))] == [(str(path), "green")]


def test_what_cannot_be_read_is_named_in_its_place(predictor: Predictor, broken: Path) -> None:
    (broken / "none").mkdir()
    inputs = [broken, broken / "absent.png", broken / "none", str(broken / "*.gif"), np.zeros((2, 2, 3, 1), np.uint8)]
    found = predictor(inputs)
    names = ["empty.png", "short.jpg", "text.jpg", "whole.png", "absent.png", "none", "*.gif", "#4"]
    assert [Path(p.path).name for p in found] == names
    assert [bool(p.error) for p in found] == [True, True, True, False, True, True, True, True]
    assert found[3].label == "red"
    assert "no such file" in found[4].error
    assert "folder without pictures" in found[5].error
    assert "matches no picture" in found[6].error
    assert "shape" in found[7].error
    assert all(p.label == "" and p.top == () for p in found if p.error)


def test_broken_files_can_end_the_run(broken: Path) -> None:
    strict = Predictor(colour_model(), device="cpu", precision="fp32", errors="raise")
    with pytest.raises(ValueError, match=r"empty\.png: "):
        strict(broken)


def test_raw_scores_refuse_what_cannot_be_read(predictor: Predictor, broken: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.jpg: "):
        predictor.logits([broken / "whole.png", broken / "text.jpg"])


def test_no_input_no_answer(predictor: Predictor) -> None:
    assert predictor([]) == []
    assert predictor.logits([]).shape == (0, 3)


def test_batches_do_not_change_the_answers(picture_folder: Path) -> None:
    single, many = (Predictor(colour_model(), "cpu", "fp32", batch_size=size, workers=3) for size in (1, 50))
    assert torch.allclose(single.logits(picture_folder), many.logits(picture_folder), atol=1e-5)


def test_streaming_reads_no_further_than_it_must(predictor: Predictor) -> None:
    taken = 0

    def endless():  # type: ignore[no-untyped-def]
        nonlocal taken
        while True:
            taken += 1
            yield np.full((16, 16, 3), (200, 0, 0), np.uint8)

    stream = predictor.stream(endless())
    for _ in range(10):
        assert next(stream).label == "red"
    assert taken <= 10 + 3 * predictor.batch_size
    stream.close()


def test_memory_does_not_grow_with_the_number_of_pictures() -> None:
    model = colour_model()
    predictor = Predictor(model, "cpu", "fp32", batch_size=2, workers=2)

    def peak(count: int) -> int:
        tracemalloc.start()
        assert sum(1 for _ in predictor.stream(np.zeros((64, 64, 3), np.uint8) + (i % 7) for i in range(count))) == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)
    assert peak(150) < 2 * peak(15) + 200_000  # all 150 at once would be 1.8 MB


def test_a_checkpoint_carries_all_that_is_needed(picture_folder: Path, tmp_path: Path) -> None:
    save_model(colour_model(), tmp_path / "model")
    loaded = Predictor(tmp_path / "model", device="cpu", precision="fp32")
    assert loaded.classes == CLASSES
    assert loaded.preprocess == PIXELS
    expected = Predictor(colour_model(), device="cpu", precision="fp32").logits(picture_folder)
    assert torch.equal(loaded.logits(picture_folder), expected)


def test_several_labels(picture_folder: Path) -> None:
    predictor = Predictor(colour_model(multi_label=True), "cpu", "fp32")
    yellow, black = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)
    yellow[..., :2] = 255
    found = predictor([yellow, black])
    assert found[0].labels == ("green", "red")
    assert found[0].probability > 0.9
    assert found[1].labels == ()
    assert found[1].label in CLASSES  # the nearest one
    assert found[1].probability < 0.5


def test_a_model_without_a_card_numbers_its_classes() -> None:
    predictor = Predictor(create_model("vit_micro_patch4_16"), device="cpu", precision="fp32", top=20)
    found = predictor(np.zeros((20, 20, 3), np.uint8))[0]
    assert sorted(label for label, _ in found.top) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decode": "fast"}, "decode is 'fast'; allowed: exact, scaled"),
        ({"errors": "ignore"}, "errors is 'ignore'"),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"window": "long"}, "window is 'long'; it is a number of seconds"),
        ({"window": float("nan")}, "got nan"),
        ({"window": 2.0}, "this model takes pictures: windows"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_settings_that_do_not_exist(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(colour_model(), **{"device": "cpu", "precision": "fp32", **settings})


def test_a_card_that_does_not_fit_is_refused() -> None:
    model = create_model("resnet_micro", num_classes=3)
    model.card = ModelCard(classes=("a", "b"))
    with pytest.raises(ConfigError, match="answers 3 classes, but its card names 2"):
        Predictor(model, device="cpu", precision="fp32")


def test_prediction_without_answer() -> None:
    assert Prediction("x", error="gone").labels == ()
