"""The examples run, on less data and for fewer steps than their defaults."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawn_shapes_then_look_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = example("drawn_shapes")
    shapes.main(out=tmp_path / "run", samples=80, epochs=2.0)
    assert capsys.readouterr().out.rstrip().endswith("%)")
    picture, _ = shapes.Shapes(1)[0]
    picture.save(tmp_path / "one.png")
    example("look_inside").main(tmp_path / "run", (tmp_path / "one.png",), out=tmp_path / "attention")
    with Image.open(tmp_path / "attention" / "one.png") as drawn:
        assert drawn.width == 2 * drawn.height
    assert "attention distance per layer" in capsys.readouterr().out


def test_vit_or_cnn_compares_both(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = example("vit_or_cnn")
    assert compared.CONTENDERS["resnet"] == {"model": "resnet18"}
    compared.CONTENDERS["resnet"] = {"model": "resnet_micro"}
    compared.main(str(picture_folder), minutes=0.01, image_size=16, out=tmp_path / "runs")
    said = capsys.readouterr().out
    assert "vit      seed 0" in said
    assert "resnet   seed 0" in said


def test_what_longer_clips_cost_by_count_and_by_formula(tmp_path: Path) -> None:
    cost = example("vivit_cost")
    points = [cost.measure(model, frames, image_size=(32, 32), depth=1) for model in cost.FORMULAS for frames in (4, 8)]
    for point in points:
        exact = point.model in ("factorised_self_attention", "factorised_dot_product")
        assert point.attention == point.formula if exact else point.formula < point.attention < 4 * point.formula
    cost.draw(points, tmp_path / "cost.png")
    with Image.open(tmp_path / "cost.png") as drawn:
        assert drawn.width > drawn.height


def test_attention_costs_what_the_laws_say(tmp_path: Path) -> None:
    points = example("attention_cost").main(tmp_path / "cost.png", sides=(224, 448))
    assert [point.attention for point in points] == [point.law for point in points]
    assert points[3].attention == 4 * points[2].attention  # Swin
    assert 15 < points[1].attention / points[0].attention < 16  # a ViT, whose class token does not grow
    assert (tmp_path / "cost.png").is_file()


def test_segmentation_compares_families_at_equal_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "segments.png"
    example("segment_emoji").main(("vit", "swin"), flops=5e8, seeds=(0, 1), scale=0.25, pictures=8, out=out)
    _, vit, swin = capsys.readouterr().out.splitlines()
    assert vit.startswith("vit, fpn head: mean IoU ")
    assert swin.startswith("swin, fpn head: mean IoU ")
    assert "over 2 seeds" in swin
    with Image.open(out) as drawn:
        assert drawn.size == (2 * 64 * 8, 2 * 64 * 3)
