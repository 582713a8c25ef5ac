"""The papers' ablations: what they plan can be built, and what they conclude from known results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vitrail.config import ConfigError, replace_dotted
from vitrail.models import MODELS, ShapesOnly, build
from vitrail.studies import distillation, positions, shapes


def rows(scores: Mapping[str, float], **columns: Mapping[str, float]) -> list[dict[str, Any]]:
    """Runs of three seeds by variant; every seed is half a point better than the one before."""
    return [
        {
            "model": "vit", "variant": name, "seed": seed, "top1": score + 0.005 * seed + (0.001 if (seed + at) % 2 else 0),
            "parameters": 1e6, **{column: values[name] for column, values in columns.items()},
        }
        for at, (name, score) in enumerate(scores.items()) for seed in range(3)
    ]  # fmt: skip


def built(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The models that variants ask for, on pictures of 32 pixels, without storage."""
    with ShapesOnly():
        base = MODELS["vit_tiny_patch16_224"]
        return {name: build(replace_dotted(base, {**changes, "image_size": (32, 32)})) for name, changes in variants.items()}


def test_positions_name_what_is_better_than_none() -> None:
    config = positions.Config(data="d", image_size=(32, 32))
    names = positions.variants(config)
    assert list(names) == [
        "none", "1d stem", "1d layers", "1d shared", "2d stem", "2d layers", "2d shared", "relative layers", "relative shared",
    ]  # fmt: skip
    models = built({name: settings["overrides"] for name, settings in names.items()})
    assert len(models["none"].positions) == 0
    assert [len(models[f"1d {place}"].positions) for place in ("stem", "layers", "shared")] == [1, 6, 1]
    assert models["relative shared"].config.position.kind == "relative"
    found = positions.conclude(config, rows({name: 0.614 if name == "none" else 0.64 for name in names}))
    assert "2.6 points better than none" in found.answer
    assert "all of the position embeddings are better than none" in found.answer
    assert found.tables[0].rows[0][0] == "none"
    assert [row[0] for row in found.tables[0].rows] == ["none", "1d", "2d", "relative"]
    stem = positions.Config(data="d", kinds=("relative", "sincos"), places=("stem",))
    assert list(positions.variants(stem)) == ["none", "sincos stem", "relative layers"]
    with pytest.raises(ConfigError, match="places is empty"):
        positions.variants(positions.Config(data="d", places=()))


def test_shapes_are_judged_by_what_a_doubling_of_the_cost_gains() -> None:
    config = shapes.Config(data="d", image_size=(32, 32))
    models = built(shapes.variants(config))
    assert models["depth x2"].config.depth == 2 * models["base"].config.depth
    assert models["width x0.5"].config.mlp_dim == 192
    assert models["patch x0.5"].config.patch == (2, 2)
    scores = {"base": 0.6, "depth x2": 0.66, "width x2": 0.63, "patch x0.5": 0.63}
    costs = {"base": 1.0, "depth x2": 2.0, "width x2": 4.0, "patch x0.5": 4.0}
    found = shapes.conclude(config, rows(scores, flops=costs))
    assert found.answer.startswith("For each doubling of the cost depth gains most (depth +")
    slopes = found.numbers["points_per_doubling"]
    assert slopes["depth"]["value"] == pytest.approx(0.06, abs=2e-3)
    assert slopes["width"]["value"] == pytest.approx(0.015, abs=2e-3)
    with pytest.raises(ConfigError, match=r"6 times 0\.3 is 1\.8, no whole number; nearest factor: 0\.33"):
        shapes.variants(shapes.Config(data="d", depths=(0.3,)))


def test_distillation_builds_its_students_and_reads_the_matrix() -> None:
    config = distillation.Config(data="d", image_size=(32, 32), teachers=("resnet", "vit"))
    methods = distillation.students(config)
    with ShapesOnly():
        models = {
            name: build(replace_dotted(MODELS[kind["model"]], {**kind["overrides"], "image_size": (32, 32)}))
            for name, kind in methods.items()
        }
    assert models["token"].config.depth == models["none"].config.depth
    scores = {"none": 0.72, "soft": 0.72, "hard": 0.74, "token": 0.75}
    found: list[dict[str, Any]] = [{**row, "variant": "", "model": "resnet", "teacher": ""} for row in rows({"r": 0.9})]
    found += [{**row, "variant": "", "model": "vit", "teacher": ""} for row in rows({"v": 0.7})]
    found += [{**row, "teacher": ""} for row in rows({"none": scores["none"]})]
    for teacher, less in (("resnet", 0.0), ("vit", 0.02)):
        taught = rows({name: score - less for name, score in scores.items() if name != "none"})
        found += [{**row, "teacher": teacher} for row in taught]
    names = ["ground truth", "none", *(f"teacher {t}" for t in ("resnet", "vit"))]
    names += [f"token, {t}, {head}" for t in ("resnet", "vit") for head in distillation.HEADS]
    for seed in range(3):
        for a in names:
            for b in names:
                near = {a, b} == {"teacher resnet", "token, resnet, distillation"}
                apart = 0.0 if a == b else 0.10 if near else 0.12
                found.append({"seed": seed, "first": a, "second": b, "disagreement": apart})
    told = distillation.conclude(config, found)
    assert "token, resnet is 3.0 points better than no teacher" in told.answer
    assert any("As a teacher through the token, a resnet is 2.0 points better than a vit" in line for line in told.sentences)
    assert any(
        "From the resnet that taught it the distillation head differs -2.0 (-2.0 to -2.0) points" in line
        for line in told.sentences
    )
    matrix = told.tables[1]
    assert matrix.columns == ["", "ground truth", "teacher resnet", "none", "class", "distillation", "joint"]
    assert matrix.rows[1][5] == "0.100"
