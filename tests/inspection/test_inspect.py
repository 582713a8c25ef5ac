from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.config import ConfigError, DataConfig
from vitrail.data import open_data
from vitrail.data.pack import pack_data
from vitrail.inspection.inspect import inspect
from vitrail.inspection.views import VIEWS, missing
from vitrail.models import create_model


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Five pictures of different sizes and shapes, none of them the model's."""
    generator = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(40, 30), (20, 20), (17, 61), (33, 16), (64, 64)]):
        paths.append(str(tmp_path / f"p{number}.png"))
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def lively(name: str, **settings):
    torch.manual_seed(0)
    model = create_model(name, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_all_views_of_a_model_as_files_and_on_one_page_that_is_the_same_again(pictures: list[str], tmp_path: Path) -> None:
    contents = []
    for out in (tmp_path / "one", tmp_path / "two"):
        page, problems = inspect(lively("deit_micro"), [*pictures, str(tmp_path / "none.png")], out, name="d<b>", shown=2)
        assert len(problems) == 1
        assert "none.png" in problems[0]
        contents.append({path.name: path.read_bytes() for path in sorted(out.iterdir()) if path != page})
    assert contents[0] == contents[1]
    text = page.read_text()
    assert "d&lt;b&gt;" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "nothing is fetched"
    assert text.count('<div class="hover"') == 2
    assert "biases" not in re.findall(r'id="view-(\w+)"', text)
    assert set(re.findall(r'id="view-(\w+)"', text)) == set(VIEWS) - {"biases"}
    for name in ("distance-space", "tokens", "cka"):
        assert {f"{name}.png", f"{name}.svg"} <= set(contents[0])
    assert {"filters.png", "positions-0.png", "rollout-p1-rollout.png", "relevance-p0-grad-cam.png"} <= set(contents[0])
    shares = [row for row in rows(out / "rollout.csv") if (row["picture"], row["map"]) == ("p0.png", "rollout")]
    assert len(shares) == 16
    assert 0 < sum(float(row["share"]) for row in shares) <= 1 + 1e-4
    assert len(rows(out / "distance.csv")) == 3 * 4
    assert [row["block"] for row in rows(out / "lens.csv")][:4] == ["input", *(f"backbone.blocks.{i}" for i in range(3))]
    packed = json.loads((out / "attention.json").read_text())
    assert packed["p0.png"]["layers"][0]["tokens"] == ["class token", "distillation token"]


def test_two_models_side_by_side(pictures: list[str], tmp_path: Path) -> None:
    page, _ = inspect(
        lively("swin_micro"), pictures, tmp_path / "out", shown=1, views=("rollout", "cka"),
        other=lively("cvt_micro", class_token=False),
    )  # fmt: skip
    assert {row["CKA"] != "" for row in rows(tmp_path / "out" / "cka-between.csv")} == {True}
    assert (tmp_path / "out" / "a" / "rollout.csv").is_file()
    assert (tmp_path / "out" / "b" / "rollout.csv").is_file()
    assert "between the two" in page.read_text()


def test_the_files_of_an_earlier_call_give_way_and_those_of_others_stay(pictures: list[str], tmp_path: Path) -> None:
    out, model = tmp_path / "out", lively("vit_micro_patch4_16")
    inspect(model, pictures[:2], out, views=("rollout",), other=lively("vit_micro_patch4_16"))
    for name in ("mine.txt", "a/mine.txt"):
        (out / name).write_text("kept")
    listed = json.loads((out / "inspect.json").read_text())["files"]
    assert {"inspect.html", "b/rollout.csv", "b/rollout-p0-rollout.png"} <= set(listed)
    with pytest.raises(ConfigError, match="rollout"):
        inspect(model, pictures, out, views=("rolout",))
    assert all((out / name).is_file() for name in listed), "a call that fails leaves what was there"
    (out / "inspect.json").write_text(json.dumps({"files": [*listed, "../p4.png", str(tmp_path / "p3.png")]}))
    inspect(model, pictures[2:3], out, views=("filters",))
    left = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert left == {"a", "a/mine.txt", "mine.txt", "filters.csv", "filters.png", "inspect.html", "inspect.json"}
    assert Path(pictures[3]).is_file()
    assert Path(pictures[4]).is_file(), "a list that names files elsewhere removes none of them"


def test_a_clip_over_space_and_time(tmp_path: Path) -> None:
    page, _ = inspect(lively("timesformer_micro"), ["motion"], tmp_path / "out", shown=1, measured=2)
    assert {row["axis"] for row in rows(tmp_path / "out" / "distance.csv")} == {"space", "time"}
    assert len(json.loads((tmp_path / "out" / "attention.json").read_text())) == 1
    assert "it needs at least 4 clips, and 2 were given" in page.read_text()


def test_a_packed_set_is_looked_into_like_the_one_it_was_made_of(pictures: list[str], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "".join(f"{path},{number % 2}\n" for number, path in enumerate(pictures * 2)))
    pack_data(open_data(table, DataConfig(val_fraction=0.0)), tmp_path / "packed", progress=False)
    for source in (table, tmp_path / "packed"):
        inspect(lively("vit_micro_patch4_16"), [str(source)], tmp_path / source.stem / "out", views=("rollout",), measured=4)
    found = [rows(tmp_path / stem / "out" / "rollout.csv") for stem in ("table", "packed")]
    assert found[0] == found[1] != []


def test_a_view_without_meaning_is_refused_by_name(pictures: list[str], tmp_path: Path) -> None:
    model = lively("resnet_micro")
    told = r"r has no view 'rollout': the model has no attention; its views here: relevance, filters, lens, cka"
    with pytest.raises(ConfigError, match=told):
        inspect(model, pictures, tmp_path / "out", name="r", views=("rollout",))
    with pytest.raises(ConfigError, match="rollout"):
        inspect(model, pictures, tmp_path / "out", views=("rolout",))
    page, _ = inspect(model, pictures, tmp_path / "out", shown=1)
    assert set(re.findall(r'id="view-(\w+)"', page.read_text())) == {"relevance", "filters", "lens", "cka"}
    lonely = lively("slowfast_micro", nonlocals=((), (0,)))
    assert "convolutions lie between" in missing(lonely, 4)["rollout"]
    assert "distance" not in missing(lonely, 4)


def test_weights_alone_and_inputs_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit_micro_patch4_16", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert str(tmp_path / "out" / "inspect.html") in said.out
    assert "weights are random" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "filters.csv", "filters.png", "inspect.html", "inspect.json", "positions-0.png", "positions.csv",
    ]  # fmt: skip
    assert main(["inspect", "vit_micro_patch4_16", str(tmp_path / "no.png"), "--device", "cpu"]) == 2
    assert "no.png: no such file or folder" in capsys.readouterr().err
