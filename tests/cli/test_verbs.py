"""Each verb does its work on small real files, through the same entry point as the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from tests.data.videos import frames, write_video

from vitrail.checkpoints import FORMATS, load_model, save_model
from vitrail.cli import main
from vitrail.cli.convert import Arguments as Convert
from vitrail.config import ModelCard, Preprocess
from vitrail.data import eval_batches
from vitrail.data.embedded import BIKES
from vitrail.data.video import Video
from vitrail.evaluation import classify
from vitrail.models import MODELS, create_model

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights that knows its classes."""
    model = create_model("vit_micro_patch4_16", num_classes=3)
    card = ModelCard(classes=CLASSES, preprocess=Preprocess(image_size=(16, 16)))
    return save_model(model, tmp_path_factory.mktemp("model") / "m", card=card).parent


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    return capsys.readouterr().out


def test_predict_answers_folders_patterns_and_stdin(
    checkpoint: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = said(capsys, "predict", str(checkpoint), str(picture_folder))
    assert table.count(".png") == 36
    lines = said(capsys, "predict", str(checkpoint), f"{picture_folder}/red/*", "--format", "csv").splitlines()
    rows = list(csv.DictReader(lines))
    assert len(rows) == 12
    assert {row["label"] for row in rows} <= set(CLASSES)
    monkeypatch.setattr("sys.stdin", [f"{picture_folder}/red/red-00.png\n", f"{picture_folder}/nothing.png\n"])
    lines = said(capsys, "predict", str(checkpoint), "-", "--format", "jsonl", "--top", "2").splitlines()
    first, second = map(json.loads, lines)
    assert len(first["top"]) == 2
    assert not first["error"]
    assert "no such file" in second["error"]


def test_predict_without_any_answer_fails(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(checkpoint), str(tmp_path / "no.jpg")]) == 1
    assert "1 could not be read" in capsys.readouterr().err
    assert main(["predict", str(checkpoint)]) == 2
    assert "name at least one picture" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of clips with random weights that knows its classes."""
    model = create_model("vivit_micro", num_classes=3)
    card = ModelCard(classes=CLASSES, preprocess=Preprocess(image_size=(16, 16), frames=4, interpolation="bilinear"))
    return save_model(model, tmp_path_factory.mktemp("clips") / "m", card=card).parent


def test_predict_draws_what_it_answers(clip_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows as long as a clip unless asked otherwise; how much memory it took is said."""
    write_video(tmp_path / "a.mp4", frames(20, (24, 32)))
    words = ["predict", str(tmp_path / "a.mp4"), "--model", str(clip_checkpoint), "--draw", str(tmp_path / "drawn.mp4")]
    assert main([*words, "--format", "jsonl"]) == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["start"], line["end"]) for line in lines] == [pytest.approx((at * 0.16, (at + 1) * 0.16)) for at in range(5)]
    assert "5 windows in" in printed.err
    assert "peak memory" in printed.err
    with Video(str(tmp_path / "drawn.mp4")) as drawn:
        assert len(drawn.times) == 20
    write_video(tmp_path / "b.mp4", frames(5, (24, 32)))
    assert main(["predict", str(clip_checkpoint), str(tmp_path), "--draw", str(tmp_path / "drawn.mp4")]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_predict_knows_the_embedded_film(checkpoint: Path, clip_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seconds of ten for every answer; a model of pictures has no use for it."""
    lines = said(capsys, "predict", "bikes", "--model", str(clip_checkpoint), "--window", "2", "--format", "jsonl").splitlines()
    found = [(row["path"], row["start"], bool(row["label"])) for row in map(json.loads, lines)]
    assert found == [(str(BIKES), pytest.approx(2 * at), True) for at in range(5)]
    assert main(["predict", str(checkpoint), "bikes"]) == 1
    assert "no such file or folder" in capsys.readouterr().out


def test_eval_prints_intervals_and_json(
    checkpoint: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = said(capsys, "eval", str(checkpoint), str(picture_folder), "--split", "train", "--per-class", "--workers", "0")
    assert "top-1 accuracy" in page
    assert "95 % interval" in page
    assert all(name in page for name in CLASSES)
    out = tmp_path / "result.json"
    words = ("eval", str(checkpoint), str(picture_folder), "--json", "--out", str(out), "--workers", "0", "--split", "train")
    assert json.loads(said(capsys, *words)) == json.loads(out.read_text())


@pytest.mark.parametrize(("asked", "used"), [("scaled", "scaled"), ("auto", "exact"), ("exact", "exact")])
def test_eval_decodes_as_asked(
    asked: str, used: str, checkpoint: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def spy(*words: Any, mode: str, **settings: Any) -> Any:
        modes.append(mode)
        return eval_batches(*words, mode=mode, **settings)

    monkeypatch.setattr(classify, "eval_batches", spy)
    assert main(["eval", str(checkpoint), str(picture_folder), "--workers", "0", "--decode", asked]) == 0
    assert modes == [used]


def test_eval_refuses_other_classes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(checkpoint), "digits"]) == 2
    message = capsys.readouterr().err
    assert "'red'" in message
    assert "'0'" in message


def test_data_verbs(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to mend" in said(capsys, "data", "check", str(picture_folder))
    stats = json.loads(said(capsys, "data", "stats", str(picture_folder), "--json"))
    assert stats["readable"] == 36
    packed = said(capsys, "data", "pack", str(picture_folder), str(tmp_path / "packed"), "--size", "16")
    assert "36 pictures (0 as they were)" in packed
    again = json.loads(said(capsys, "data", "stats", str(tmp_path / "packed"), "--json"))
    assert again["sizes"] == {"19 x 16": 36}


def test_data_check_fails_on_what_is_to_be_mended(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i, source in enumerate(sorted((picture_folder / "red").iterdir())[:3]):
            (tmp_path / name / f"{i}.png").write_bytes(source.read_bytes())
    (tmp_path / "a" / "broken.png").write_bytes(b"")
    found = json.loads(said(capsys, "data", "check", str(tmp_path), "--json", code=1))
    assert len(found["broken"]) == 1
    assert sum(group["contradicts"] for group in found["copies"]) == 3


def test_missing_data_names_the_nearest(picture_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(picture_folder / "gren")]) == 2
    assert "nearest" in capsys.readouterr().err


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vitrail" / "models.json"


def test_models_lists_costs_and_settings(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["model"]: row for row in json.loads(said(capsys, "models", "vit_base_patch32", "--json"))}
    assert rows["vit_base_patch32_224"]["parameters (M)"] == 88.22
    assert rows["vit_base_patch32_224"]["GMACs"] == pytest.approx(4.41, abs=0.01)
    assert rows["vit_base_patch32_224"]["weights"].startswith("augreg_in21k_ft_in1k")
    one = json.loads(said(capsys, "models", "vit_micro_patch4_16", "--json"))
    assert one["settings"]["position.kind"] == MODELS["vit_micro_patch4_16"].position.kind
    assert "num_classes" not in one["settings"]


def test_models_lists_weights_by_licence(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = json.loads(said(capsys, "models", "vit_base_patch16_224", "--weights", "--json"))
    free = json.loads(said(capsys, "models", "vit_base_patch16_224", "--weights", "--commercial-ok", "--json"))
    assert {row["tag"] for row in every} - {row["tag"] for row in free} >= {"mae", "tv_swag_linear_in1k"}
    assert all(row["commercial"] == "yes" and row["licence"] == "apache-2.0" for row in free)
    assert "none with published weights" in said(capsys, "models", "resnet_micro*", "--commercial-ok")


def test_models_counts_once_and_then_needs_no_torch(cache: Path, run_python: Any) -> None:
    code = """
import sys
from vitrail.cli import main
main(["models", "vit_micro", "--json"])
print("torch" in sys.modules)
"""
    first, second = run_python(code), run_python(code, fresh=True)
    assert first.endswith("True\n")
    assert second.endswith("False\n")
    assert first.removesuffix("True\n") == second.removesuffix("False\n")
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({**kept, "digest": "of other code"}))
    assert run_python(code) == first


def test_models_show_prints_the_parts(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    page = json.loads(said(capsys, "models", "show", "vit_micro_patch4_16", "--image-size", "32", "--json"))
    parts = {row["part"]: row for row in page["parts"]}
    assert parts["blocks"]["kind"] == "3 x Block"
    assert sum(row["parameters (M)"] for row in parts.values()) <= page["parameters (M)"] + 0.01
    assert sum(row["GMACs"] for row in parts.values()) == pytest.approx(page["GMACs"], abs=0.002)
    assert "published weights" in said(capsys, "models", "show", "resnet18", "--image-size", "32")


def test_convert_writes_what_it_read_and_checks_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.checkpoints.parity.find_spec", lambda name: None)
    page = said(capsys, "convert", str(checkpoint), str(tmp_path / "timm"), "--to", "timm")
    assert "timm format" in page
    assert "read back    largest difference 0.0e+00" in page
    assert "timm is not installed, so it was not asked" in page
    back = load_model(tmp_path / "timm", heads=4, quiet=True)
    weights = load_model(checkpoint).state_dict()
    assert all((value == weights[name]).all() for name, value in back.state_dict().items())
    assert set(get_args(get_type_hints(Convert)["to"])) == set(FORMATS)
    words = ("convert", str(checkpoint), str(tmp_path / "again"), "--preprocess", "imagenet", "crop_fraction=0.5", "--no-check")
    assert "read back" not in said(capsys, *words)
    made = load_model(tmp_path / "again").card.preprocess
    assert (made.mean, made.crop_fraction) == ((0.485, 0.456, 0.406), 0.5)
    assert main(["convert", str(checkpoint), str(tmp_path / "no"), "--preprocess", "half", "imagenet"]) == 2


def test_convert_fails_when_the_answers_differ(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(path: Path, **settings: Any) -> Any:
        model = load_model(path, **settings)
        model.head.linear.bias.data += 1.0
        return model

    monkeypatch.setattr("vitrail.checkpoints.parity.load_model", forgetful)
    assert "difference 1.0e+00" in said(capsys, "convert", str(checkpoint), str(tmp_path / "out"), code=1)


def test_bench_measures_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--seconds", "0.01", "--precision", "fp32", "--batch-size", "2", "--json")
    result = json.loads(said(capsys, "bench", "vit_micro_patch4_16", "--train", *quick))
    assert result["Inference"]["pictures/s (batch 2)"] > 0
    assert result["Training"]["step (ms)"] > 0
    assert result["Inference"]["latency p50 (ms)"] <= result["Inference"]["latency p95 (ms)"]


def test_bench_takes_settings_and_checkpoints(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--seconds", "0.01", "--precision", "fp32", "--batch-size", "1", "--json")
    shallow = json.loads(said(capsys, "bench", "vit_micro_patch4_16", "--set", "depth=1", "--image-size", "8,16", *quick))
    assert shallow["Model"]["input"] == "3 x 8 x 16"
    trained = json.loads(said(capsys, "bench", str(checkpoint), *quick))
    assert int(trained["Model"]["parameters"].replace(",", "")) > int(shallow["Model"]["parameters"].replace(",", ""))
    assert main(["bench", "vit_micro_patch4_16", "--set", "deph=1"]) == 2
    assert "'depth'" in capsys.readouterr().err


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "doctor", "--no-measure", "--json"))
    assert found["decoders"]["simplejpeg"] == "works"
    assert found["devices"]["cpu"]
    assert "Decoders" in said(capsys, "doctor", "--no-measure")
