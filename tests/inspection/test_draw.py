from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.evaluation.metrics import CalibrationBin
from vitrail.inspection import draw


def opened(uri: str) -> Image.Image:
    kind, _, text = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert kind == f"data:image/{(image.format or '').lower()}"
    return image


def charts() -> dict[str, str]:
    rng = np.random.default_rng(0)
    bins = [CalibrationBin(0.0, 0.5, 0, float("nan"), float("nan")), CalibrationBin(0.5, 1.0, 9, 0.8, 0.7)]
    names = ["$x_1", "猫", "🙂", "<b>"] + [f"c{i}" for i in range(26)]
    return {
        "curves": draw.curves({"training": ([1.0, 2.0, 3.0], [3.0, float("nan"), 1.0]), "validation": ([3.0], [2.0])}, "Loss"),
        "calibration": draw.calibration(bins),
        "distances": draw.distances([torch.rand(3), torch.rand(3)], [28.3, 14.0]),
        "confusion": draw.confusion_chart(rng.integers(0, 9, (30, 30)), names),
    }


def test_charts_are_inline_svg_in_the_pages_colours() -> None:
    ids: list[str] = []
    for name, chart in charts().items():
        ElementTree.fromstring(chart)  # well-formed
        assert "var(--accent)" in chart or name == "confusion"
        assert "var(--ink)" in chart or "var(--muted)" in chart
        assert not any(placeholder in chart for placeholder in draw._COLOURS)
        assert not re.search(r'(href|src)="(?!#|data:)', chart)
        assert "<metadata" not in chart
        ids += re.findall(r' id="([^"]+)"', chart)
    assert len(ids) == len(set(ids))


def test_class_names_stay_text_whatever_they_are() -> None:
    chart = charts()["confusion"]
    for text in ("$x_1", "猫", "🙂", "&lt;b&gt;"):
        assert text in chart


def test_a_curve_leaves_a_gap_where_the_value_is_not_finite() -> None:
    strokes = []
    for y in ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, float("nan"), 4.0, 5.0]):
        chart = draw.curves({"a": ([1.0, 2.0, 3.0, 4.0, 5.0], y)}, "t")
        line = next(d for d, style in re.findall(r'<path d="([^"]+)"[^>]*style="([^"]+)"', chart) if "var(--accent)" in style)
        strokes.append(line.count("M"))
    assert strokes == [1, 2]


def test_similar_order_puts_confused_classes_side_by_side() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(30) % 3  # three groups of ten, shuffled
    confusion = np.where(group[:, None] == group, 10, 0) + np.eye(30, dtype=int) * 50
    confusion[np.ix_(group == 0, group == 1)] += 1
    order = draw.similar_order(confusion)
    assert sorted(order) == list(range(30))
    changes = np.count_nonzero(np.diff(group[order]))
    assert changes == 2


def test_similar_order_of_a_perfect_model() -> None:
    assert sorted(draw.similar_order(np.eye(5, dtype=np.int64) * 7)) == list(range(5))


def test_small_pictures_keep_every_pixel() -> None:
    picture = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    image = opened(draw.data_uri(picture))
    assert np.array_equal(np.asarray(image), picture.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_large_pictures_shrink_whatever_their_channels(channels: int) -> None:
    image = opened(draw.data_uri(torch.zeros(channels, 300, 600, dtype=torch.uint8)))
    assert image.size == (224, 112)
    assert image.format == "JPEG"


def test_overlay_lights_the_pane_that_is_attended_to() -> None:
    picture = torch.full((3, 128, 192), 128, dtype=torch.uint8)
    attention = torch.zeros(2, 3)
    attention[1, 2] = 0.4
    lit = np.asarray(draw.overlay(picture, attention)).astype(int)
    assert lit.shape == (128, 192, 3)
    assert lit[64:, 128:].mean() > 2 * lit[:64].mean()
    assert np.ptp(lit[:64], axis=(0, 1)).max() == 0  # the other panes are equally dark
    assert np.array_equal(lit[70, 130], lit[127, 191])


def test_overlay_of_no_attention_is_dark_and_of_small_pictures_is_enlarged() -> None:
    shown = draw.overlay(torch.full((1, 20, 20), 200, dtype=torch.uint8), torch.zeros(5, 5))
    assert shown.size == (140, 140)
    assert np.asarray(shown).max() <= 200 * 0.25
