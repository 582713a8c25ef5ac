"""The break-even study on learning curves whose crossing is known, and what it plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vitrail.config import ConfigError
from vitrail.studies import breakeven
from vitrail.studies.breakeven import Config, conclude, plan
from vitrail.studies.small import FAMILIES, family
from vitrail.studies.subsets import subset_variants

SIZES = (125, 250, 500, 1000, 2000)
CURVES = {"resnet": (0.9, 0.25, 0.0), "vit": (8.0, 0.5, 0.0)}  # meet at (8 / 0.9) ** 4 = 6243 pictures


def rows(
    curves: dict[str, tuple[float, float, float]], noise: float, sizes: tuple[int, ...] = SIZES, random: int = 5
) -> list[dict[str, Any]]:
    """Runs of three seeds whose errors lie around a n^-b + c."""
    generator = np.random.default_rng(random)
    return [
        {
            "data": "d", "model": name, "variant": f"{n} pictures", "seed": seed, "pictures": n, "parameters": 500_000,
            "top1": 1 - min((a * n**-b + c) * (1 + noise * generator.standard_normal()), 1),
        }
        for name, (a, b, c) in curves.items() for n in sizes for seed in range(3)
    ]  # fmt: skip


def test_a_known_crossing_is_answered_with_an_interval() -> None:
    found = conclude(Config(data="d"), rows(CURVES, 0.01))
    met = found.numbers["overtakes"]["resnet"]
    assert met["kind"] == "known"
    assert met["low"] < 6243 < met["high"]
    assert found.answer.startswith("With 2,000 pictures use a resnet (")
    assert "A plain ViT would overtake resnet at about 6," in found.answer
    assert found.charts[0].logx
    assert [row[0] for row in found.tables[0].rows] == ["resnet", "vit"]


@pytest.mark.parametrize(
    ("curves", "noise", "sizes", "told"),
    [
        (CURVES, 0.25, SIZES, "cannot be told"),
        (CURVES, 0.01, SIZES[:3], "cannot be told: there is no curve"),
        ({"resnet": (0.9, 0.4, 0.0), "vit": (1.2, 0.35, 0.02)}, 0.01, SIZES, "would not overtake resnet up to 200,000"),
        ({"resnet": (0.9, 0.3, 0.05), "vit": (0.9, 0.45, 0.0)}, 0.01, SIZES, "The plain ViT is already ahead."),
        ({"resnet": (0.9, 0.3, 0.0)}, 0.01, SIZES, "use a resnet"),
    ],
)
def test_what_the_curves_cannot_tell_is_not_told(
    curves: dict[str, tuple[float, float, float]], noise: float, sizes: tuple[int, ...], told: str
) -> None:
    assert told in conclude(Config(data="d"), rows(curves, noise, sizes)).answer


def test_a_curve_that_is_no_power_law_is_not_extrapolated() -> None:
    found = rows(CURVES, 0.01)
    for row in found:
        if row["model"] == "vit" and row["pictures"] == 500:
            row["top1"] -= 0.3
    told = conclude(Config(data="d"), found)
    assert "does not follow a power law" in told.answer
    assert any("does not fit (p = 0.0" in sentence for sentence in told.sentences)


def test_families_that_cannot_be_told_apart_are_all_named() -> None:
    told = conclude(Config(data="d"), rows({**CURVES, "cvt": (0.9, 0.25, 0.0)}, 0.05, random=6)).answer
    assert "cannot be told apart" in told
    assert "resnet" in told.split("(")[0]
    assert "cvt" in told.split("(")[0]


def test_every_seed_nests_its_own_subsets() -> None:
    (runs,) = plan(Config(data="d", families=("resnet", "vit"), fractions=(1.0, 0.25)), [100, 100, 60])
    assert runs.subsets
    assert runs.variants == {"66 pictures": {"max_samples": 22}, "260 pictures": {"max_samples": 0}}
    assert set(runs.models) == {"resnet", "vit"}


def test_sizes_that_cannot_be() -> None:
    assert subset_variants([10, 10], [0.5, 1.0]) == {"10 pictures": {"max_samples": 5}, "20 pictures": {"max_samples": 0}}
    with pytest.raises(ConfigError, match=r"give the size 4 twice .*at least 2 pictures of each class"):
        subset_variants([10, 10], [0.05, 0.1, 1.0])
    with pytest.raises(ConfigError, match="0 < fraction <= 1"):
        subset_variants([10, 10], [1.5])
    with pytest.raises(ConfigError, match="did you mean 'resnet'"):
        family("resnett", (64, 64))
    with pytest.raises(ConfigError, match="multiples of 16; nearest: 48,48"):
        family("vit", (50, 50))


def test_every_small_model_is_one_of_its_family() -> None:
    from vitrail.config import replace_dotted
    from vitrail.cost import count_parameters
    from vitrail.models import MODELS, build

    for side in (32, 48, 64):
        for name in FAMILIES:
            counts = []
            for scale in (0.5, 1.0):
                kind = family(name, (side, side), scale)
                changes = {**kind["overrides"], "image_size": (side, side), "num_classes": 10}
                counts.append(count_parameters(build(replace_dotted(MODELS[kind["model"]], changes))))
            assert 0.4e6 < counts[1] < 0.9e6, (name, side)
            assert 0.2 < counts[0] / counts[1] < 0.4, (name, side)
    assert breakeven.CHALLENGER in FAMILIES
