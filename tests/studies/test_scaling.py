"""The scaling study on results whose curves are known: who gains from data, and what is planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vitrail.config import ConfigError
from vitrail.studies.scaling import Config, budgets, conclude, models

CURVES = {"resnet x0.5": (3.0, 1.0, 0.2), "resnet x1": (3.0, 1.0, 0.18), "vit x0.5": (4.0, 0.4, 0.0), "vit x1": (5.0, 0.4, 0.0)}
SIZES, BUDGETS = (125, 250, 500, 1000), (1e11, 2e11, 4e11, 8e11)


def rows() -> list[dict[str, Any]]:
    """Three seeds of each size at the full budget, and of each budget on all pictures, with 0.4 per cent of noise."""
    random = np.random.default_rng(0)
    cells = [(n, 8e11) for n in SIZES] + [(1000, budget) for budget in BUDGETS[:-1]]
    return [
        {
            "model": name, "seed": seed, "pictures": n, "budget": budget, "parameters": 4e5 if name.endswith("x1") else 1e5,
            "top1": 1 - (a * n**-b + c) * (budget / 8e11) ** -0.3 * (1 + 0.004 * random.standard_normal()),
        }
        for name, (a, b, c) in CURVES.items() for n, budget in cells for seed in range(3)
    ]  # fmt: skip


def test_the_flat_family_is_saturated_and_the_steep_one_gains() -> None:
    found = conclude(Config(data="d"), rows())
    assert "At 8.0e+11 FLOPs and 1,000 pictures resnet x1 is best" in found.answer
    assert "Still gaining from data: vit x0.5, vit x1." in found.answer
    assert "Saturated: resnet x0.5, resnet x1." in found.answer
    gain, low, high = found.numbers["gain_of_doubling"]["vit x1"]
    assert low - 1e-9 < 1 - 2**-0.4 < high + 1e-9  # noise-free points may pin an end of the interval to the value
    assert gain == pytest.approx(1 - 2**-0.4, abs=0.03)
    a, b, c = (found.numbers["data"]["resnet x1"][name] for name in "abc")
    assert a * 1e4**-b + c == pytest.approx(0.18, abs=0.01)
    assert found.numbers["compute"]["vit x1"]["b"] == pytest.approx(0.3, abs=0.15)
    assert [chart.name for chart in found.charts] == ["data", "compute", "iso-compute"]
    assert len(found.charts[2].series) == 2 * len(BUDGETS)
    assert any("on 1,000 pictures vit x1 is" in sentence for sentence in found.sentences)


def test_too_few_sizes_are_shown_without_a_curve() -> None:
    few = [row for row in rows() if row["pictures"] in (500, 1000)]
    found = conclude(Config(data="d"), few)
    assert found.numbers["data"] == {}
    assert "None is sure to gain from more data." in found.answer


def test_what_is_planned() -> None:
    config = Config(data="d", budget=8e11)
    assert budgets(config) == [1e11, 2e11, 4e11]
    assert list(models(config)) == ["resnet x0.5", "resnet x1", "vit x0.5", "vit x1"]
    with pytest.raises(ConfigError, match="is not below --budget"):
        budgets(Config(data="d", budget=1e11, budgets=(5e10, 2e11)))
