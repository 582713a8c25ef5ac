from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.checkpoints import save_model
from vitrail.config import AugmentConfig, ConfigError, DataConfig, ModelCard, Preprocess, RunConfig, ScheduleConfig, dump
from vitrail.data import open_data
from vitrail.evaluation import evaluate
from vitrail.inspection.report import write_report
from vitrail.inspection.run import read_run, source_commit
from vitrail.inspection.training_data import augmented
from vitrail.models import Model, create_model

CLASSES = ("blue", "green", "red")


class Page(HTMLParser):
    """What is on a page: text by section, headings, pictures, links, and whether all tags are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section, self.text, self.pictures, self.ids, self.links = "", {}, {}, [], []  # type: ignore[var-annotated]
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "section":
            self.section = values["id"]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img":
            self.pictures.setdefault(self.section, []).append(values["src"])
        if tag == "a":
            self.links.append(values["href"])
        assert tag not in ("script", "link", "iframe")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = " ".join((self.text.get(self.section, "") + " " + data).split())


def model_for(name: str = "vit_micro_patch4_16", classes: tuple[str, ...] = CLASSES, **settings: object) -> Model:
    torch.manual_seed(0)
    model = create_model(name, num_classes=len(classes), **settings)
    torch.nn.init.normal_(model.head.linear.weight)
    preprocess = Preprocess(image_size=(16, 16), fit="stretch")
    model.card = ModelCard(classes=classes, preprocess=preprocess, multi_label=False)
    return model.eval()


def run_in(path: Path, data: str, model: Model, **settings: object) -> Path:
    """A run directory as training leaves it, with made-up records."""
    path.mkdir()
    schedule = ScheduleConfig(steps=20)
    config = RunConfig(data=data, model=model.name, out=str(path), batch_size=8, schedule=schedule, device="cpu")
    config = replace(config, data_config=DataConfig(val_fraction=0.4, workers=0), **settings)
    (path / "config.yaml").write_text(dump(config))
    records = []
    for step in range(2, 21, 2):
        values = {"epoch": step / 4, "loss": 2.0 / step, "accuracy": 1 - 1 / step, "lr": 1e-3, "seconds": step * 6.0}
        records.append({"kind": "train", "step": step, **values})
        if step % 4 == 0:
            records.append({"kind": "eval", "step": step, "epoch": step / 4, "top1": 1 - 1 / step, "nll": 3.0 / step, "n": 12})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tra')
    save_model(model, path / "model")
    return path


@pytest.fixture(scope="module")
def run(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder with a torn file, with its page."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(picture_folder, root / "data")
    (root / "data" / "red" / "torn <1>.png").write_bytes((picture_folder / "red" / "red-00.png").read_bytes()[:90])
    path = run_in(root / "run", str(root / "data"), model_for())
    assert write_report(path) == path / "report.html"
    return path


def test_the_page_of_a_run_holds_everything(run: Path) -> None:
    page = Page(run / "report.html")
    sections = ["result", "training", "confusion", "classes", "mistakes", "attention", "calibration", "data", "reproduce"]
    assert [i for i in page.ids if i in sections] == sections
    assert page.links == [f"#{name}" for name in sections]

    report = evaluate(model_for(), run.parent / "data", device="cpu", val_fraction=0.4, progress=False)
    n = int(report.metrics["n"])
    for name in ("top1", "top1_low", "top1_high"):
        assert f"{100 * report.metrics[name]:.1f}" in page.text["result"]
    assert f"n = {n}" in page.text["result"]
    assert "validation pictures" in page.text["result"]
    assert "2 min" in page.text["result"]  # 120 s of training
    wrong = n - int(np.trace(report.confusion))
    assert f"{wrong} of {n} pictures were answered wrongly" in page.text["mistakes"]
    assert len(page.pictures["mistakes"]) == min(wrong, 24)
    assert "class token" in page.text["attention"]
    assert len(page.pictures["attention"]) % 3 == 0
    assert "torn <1>.png" in page.text["data"]
    assert len(page.pictures["data"]) == 8  # a batch, as the model sees it
    assert f"vitrail train --config {run / 'config.yaml'}" in page.text["reproduce"]
    assert "5 epochs (20 steps)" in page.text[""]


def test_the_page_stands_alone(run: Path) -> None:
    page = Page(run / "report.html")
    assert all(picture.startswith("data:image/") for pictures in page.pictures.values() for picture in pictures)
    for attribute in re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', page.source):
        assert attribute.startswith(("data:", "#")), attribute
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]+"|http-equiv', "", page.source)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in page.source
    assert '<meta name="viewport"' in page.source
    assert not re.search(r"\{\{|\{%|\bnan\b|None", page.source.split("</style>")[1].split('id="reproduce"')[0])


def test_odd_names_mixed_pictures_and_mean_pooling(picture_folder: Path, tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", 'b" onload="x', "red & $x$")
    table = ["file,label"]
    for old, new in zip(CLASSES, names, strict=True):
        quoted = new.replace('"', '""')
        table += [f'{path},"{quoted}"' for path in sorted((picture_folder / old).iterdir())]
    (tmp_path / "all.csv").write_text("\n".join(table))
    model = model_for(classes=tuple(sorted(names)), pool="mean", class_token=False)
    page = Page(write_report(run_in(tmp_path / "run", str(tmp_path / "all.csv"), model, augment=AugmentConfig(mixup=0.8))))
    assert names[0] in page.text["classes"]
    assert "<script" not in page.source
    assert "no single token is asked" in page.text["attention"]
    assert "and mixing" in page.text["data"]


def test_mixed_pictures_are_shown_mixed(picture_folder: Path) -> None:
    data, pixels = open_data(picture_folder), Preprocess(image_size=(16, 16))
    plain, mixed = (augmented(data, RunConfig(batch_size=8, augment=AugmentConfig(mixup=m)), pixels) for m in (0.0, 0.8))
    assert "mixing" not in plain["augmented_about"]
    assert len(plain["augmented"]) == 8
    assert [shown["label"] for shown in plain["augmented"]] == [shown["label"] for shown in mixed["augmented"]]
    changed = [a["uri"] != b["uri"] for a, b in zip(plain["augmented"], mixed["augmented"], strict=True)]
    assert sum(changed) >= 5  # a share may be as good as 1


def test_a_network_without_attention_and_data_from_python(picture_folder: Path, tmp_path: Path) -> None:
    model = model_for("resnet_micro")
    data = open_data([(str(path), path.parent.name) for path in sorted(picture_folder.rglob("*.png"))])
    run = run_in(tmp_path / "run", "", model)
    report = evaluate(model, data, split="train", device="cpu", progress=False)
    page = Page(write_report(run, model=model, data=data, report=report))
    assert "has no attention" in page.text["attention"]
    assert "attention" not in page.pictures
    assert "These pictures were trained on" in page.text["result"]
    assert f"{100 * report.metrics['top1']:.1f}" in page.text["result"]
    assert "handed over from Python" in page.text["reproduce"]


def test_attention_through_strides_and_convolutions(picture_folder: Path, tmp_path: Path) -> None:
    model = model_for("cvt_micro")
    page = Page(write_report(run_in(tmp_path / "run", str(picture_folder), model), model=model))
    assert page.pictures["attention"]
    assert "Mean distance in pixels" in page.text["attention"]


def test_an_evaluation_of_other_pictures_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    model = model_for()
    run = run_in(tmp_path / "run", str(picture_folder), model)
    report = evaluate(model, picture_folder, split="train", val_fraction=0.2, device="cpu", progress=False)
    with pytest.raises(ConfigError, match="of other pictures than the train split of pictures"):
        write_report(run, report=report)


def test_what_the_evaluation_could_not_read_is_named(run: Path) -> None:
    """Also where somebody else evaluated, so that nobody has read the data set opened for the page."""
    config = DataConfig(val_fraction=0.4)
    report = evaluate(model_for(), open_data(run.parent / "data", config), split="train", device="cpu", progress=False)
    unread = open_data(run.parent / "data", config)
    page = Page(write_report(run, data=unread, report=replace(report, notes=())))
    assert "torn <1>.png" in page.text["result"]
    assert page.text["data"].count("torn <1>.png") == 1


def test_without_its_data_the_stored_evaluation_is_shown(picture_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(picture_folder, data)
    model = model_for()
    run = run_in(tmp_path / "run", str(data), model)
    report = evaluate(model, data, device="cpu", val_fraction=0.4, progress=False)
    report.save(run / "evaluation.json")
    shutil.rmtree(data)
    page = Page(write_report(run))
    assert f"{100 * report.metrics['top1']:.1f}" in page.text["result"]
    assert "could not be opened, so no pictures are shown" in page.text["result"]
    assert page.pictures == {}
    assert "mistakes" not in page.ids

    (run / "evaluation.json").unlink()
    with pytest.raises(ConfigError, match="no evaluation is stored there"):
        write_report(run)


def test_many_classes_get_a_chart_and_a_list(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"c{i:02}" for i in range(30)]
    pictures = [(rng.integers(0, 255, (16, 16, 3), np.uint8), name) for name in names for _ in range(4)]
    model = model_for(classes=tuple(names))
    run = run_in(tmp_path / "run", "", model)
    data = open_data(pictures)
    report = evaluate(model, data, split="train", device="cpu", progress=False)
    page = Page(write_report(run, data=data, report=report))
    assert 'aria-label="confusion matrix"' in page.source
    assert "Most frequent confusions" in page.text["confusion"]
    assert all(name in page.text["classes"] for name in names)


def test_several_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [("blue",), ("green", "red"), ("red",), ("blue", "green", "red")] * 6
    pictures = [(rng.integers(0, 255, (16, 16, 3), np.uint8), label) for label in labels]
    model = model_for()
    model.card = replace(model.card, multi_label=True)
    run = run_in(tmp_path / "run", "", model)
    data = open_data(pictures)
    report = evaluate(model, data, split="train", device="cpu", progress=False)
    page = Page(write_report(run, model=model, data=data, report=report))
    assert "mean average precision" in page.text["result"]
    assert "wrongly given" in page.text["confusion"]
    assert "average precision" in page.text["classes"]
    assert "at least one label wrong" in page.text["mistakes"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_reading_a_run_leaves_out_a_torn_record(picture_folder: Path, tmp_path: Path) -> None:
    run = read_run(run_in(tmp_path / "run", str(picture_folder), model_for()))
    assert [record["step"] for record in run.of_kind("train")] == list(range(2, 21, 2))
    assert run.minutes == pytest.approx(2.0)
    assert "--time-budget" not in run.command
    timed = replace(run, config=replace(run.config, schedule=ScheduleConfig(steps=20, time_budget=5.0)))
    assert timed.command.endswith("--time-budget 0")


def test_a_file_that_belongs_to_no_checkout_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    assert source_commit(tmp_path / "x.py") == ""
