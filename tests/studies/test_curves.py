"""Fits and crossings on curves that are known."""

from __future__ import annotations

import numpy as np
import pytest

from vitrail.studies.curves import crossing, fit, power

SIZES = (125, 250, 500, 1000, 2000)


def measured(
    a: float, b: float, c: float, noise: float, seed: int = 0, sizes: tuple[int, ...] = SIZES
) -> dict[float, list[float]]:
    """Errors of three seeds per size around a n^-b + c, with relative noise."""
    random = np.random.default_rng(seed)
    return {n: list((a * n**-b + c) * (1 + noise * random.standard_normal(3))) for n in sizes}


def test_a_curve_without_noise_is_found_again() -> None:
    curve = fit(measured(3.0, 0.5, 0.1, 0))
    np.testing.assert_allclose(curve.at(np.array([100.0, 1e5])), 3.0 * np.array([100.0, 1e5]) ** -0.5 + 0.1, rtol=1e-3)
    assert curve.offset[0] == pytest.approx(0.1, abs=2e-3)
    flat = fit({n: [0.3, 0.3, 0.3] for n in SIZES})
    np.testing.assert_allclose(flat.at(1e6), 0.3, rtol=1e-2)


def test_bands_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = power(np.array([[2.0, 0.4, 0.05]]), np.array([1000.0, 4000.0]))[0]
    held = np.zeros(2)
    for seed in range(40):
        low, high = fit(measured(2.0, 0.4, 0.05, 0.04, seed), seed).band(np.array([1000.0, 4000.0]))
        held += (low <= truth) & (truth <= high)
    assert held.min() >= 33  # 95 % of 40 is 38; with c >= 0 the intervals are a little narrow


def test_a_form_that_does_not_fit_is_seen() -> None:
    bump = {n: [e, e * 1.01, e * 0.99] for n, e in zip(SIZES, (0.5, 0.4, 0.45, 0.2, 0.3), strict=True)}
    assert fit(bump).misfit < 0.01
    assert fit(measured(2.0, 0.4, 0.05, 0.03)).misfit > 0.05


def test_a_known_crossing_is_found() -> None:
    """A steep curve passes a flat one where 8 n^-0.5 = 0.9 n^-0.25: at (8 / 0.9)^4 = 6243, three times what was measured."""
    steep, flat = fit(measured(8.0, 0.5, 0.0, 0.01, 1)), fit(measured(0.9, 0.25, 0.0, 0.01, 2))
    found = crossing(steep, flat, largest=2000, horizon=2e5)
    assert found.kind == "known"
    assert found.low < 6243 < found.high
    assert found.high < 5 * found.low
    assert crossing(flat, steep, largest=2000, horizon=2e5).kind == "never"
    assert crossing(fit(measured(1.0, 0.5, 0, 0.01)), flat, largest=2000, horizon=2e5).kind == "ahead"


def test_noise_gives_no_answer() -> None:
    steep, flat = fit(measured(8.0, 0.5, 0.0, 0.25, 3)), fit(measured(0.9, 0.25, 0.0, 0.25, 4))
    assert crossing(steep, flat, largest=2000, horizon=2e5).kind == "unknown"


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="3 sizes"):
        fit({n: [0.5, 0.4] for n in (1, 2, 3)})
    with pytest.raises(ValueError, match="at least two"):
        fit({n: [0.5] for n in SIZES})
