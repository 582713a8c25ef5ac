"""Maps over the space and the time of a clip, from planted attention to the page of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.inspection.test_attention import lively, planted, route_of
from tests.inspection.test_report import Page, run_in

from vitrail.config import InputConfig, ModelCard, Preprocess
from vitrail.data.embedded import motion
from vitrail.inspection import clips, pictures
from vitrail.inspection.attention import PLAIN, Placed, place, rollout
from vitrail.inspection.report import write_report
from vitrail.layers.route import Cells
from vitrail.models import create_model


def test_a_map_over_time_says_where_its_cells_lie_and_leaves_out_what_has_no_place() -> None:
    tubelets = Cells((2, 1, 2), (1.0, 2.0, 1.0), (2.0, 4.0, 2.0), prefix=1)
    edges, shares = clips.over_time(place(torch.tensor([[0.2, 0.1, 0.3, 0.4, 0.0]]), tubelets))
    assert edges.tolist() == [0.5, 2.5, 4.5]  # frames 1 and 2, then 3 and 4
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.5]))


def test_a_strip_lights_the_frames_that_are_looked_at() -> None:
    pixels = torch.full((3, 4, 8, 8), 200, dtype=torch.uint8)
    late = Placed(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), Cells((2, 1, 1), (1.0, 4.0, 4.0), (2.0, 8.0, 8.0)))
    drawn = clips.strips(pixels, {"map": late})
    assert clips.numbered(pixels, {"map": late}) == "frames 2, 4 of 4"
    light = np.asarray(drawn["map"]).astype(float)
    side = drawn[clips.INPUT].height
    assert light[:, :side].mean() < 60
    assert light[:, -side:].mean() > 180
    eight = clips.beside([Image.new("RGB", (10, 20), (n, 0, 0)) for n in range(8)])
    assert eight.size == (4 * 14 - 4, 2 * 24 - 4)
    assert [eight.getpixel((x, y))[0] for y in (0, 24) for x in (0, 14, 28, 42)] == list(range(8))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vivit_micro", {"model": "factorised_self_attention", "pool": "mean"}),
        ("timesformer_micro", {"attention": "divided"}),
        ("timesformer_micro", {"attention": "axial"}),
    ],
)
def test_attention_planted_in_the_first_frame_is_found_there(name: str, settings: dict) -> None:
    """Factorised: who looks at the first frame along time, and at itself or the class token's patches along space."""
    model = lively(name, **settings)
    route = route_of(model)
    maps = {}
    for site in route.sites.values():
        if ".time" in site.name:
            maps[site.name] = planted(site, lambda offsets: int(offsets[:, 0].nan_to_num(torch.inf).argmin()))
        else:
            maps[site.name] = torch.full((*site.queries.shape[:1], 1, site.queries.shape[1], site.keys.shape[1]), 1.0)
            maps[site.name] /= site.keys.shape[1]
    rows = next(iter(route.readout.values()))[None, None]
    found = place(rollout(route, maps, rows, PLAIN)[:, 0], route.first)
    _, shares = clips.over_time(found)
    assert shares.tolist() == pytest.approx([1.0, *[0.0] * (route.first.grid[0] - 1)], abs=1e-5)
    assert float(found.shares.sum()) > 0.5


def test_the_page_of_a_video_run_shows_strips_over_space_and_a_chart_over_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motion, "TRAIN_CLIPS", 16)
    monkeypatch.setattr(motion, "TEST_CLIPS", 8)
    monkeypatch.setattr(pictures, "LOOKED_AT", 3)
    monkeypatch.setattr(pictures, "MEASURED", 2)
    torch.manual_seed(0)
    model = create_model("vivit_micro", num_classes=8, model="factorised_encoder").eval()
    torch.nn.init.normal_(model.head.linear.weight)
    model.card = ModelCard(
        classes=motion.MOTIONS, preprocess=Preprocess(image_size=(16, 16), frames=4, sampling="uniform"), multi_label=False
    )
    run = run_in(tmp_path / "run", "motion", model, input=InputConfig(image_size=(16, 16), frames=4, sampling="uniform"))
    page = Page(write_report(run, model=model))
    told = page.text["attention"]
    assert "frames 2, 4 of 4" in told
    assert "Mean distance in pixels" in told
    assert "Mean distance in frames" in told
    assert len(page.pictures["attention"]) % 3 == 0
    assert page.source.count("attention over time") == len(page.pictures["attention"]) // 3
    assert "of the videos named rightly" in page.text["result"]
    assert " pictures" not in " ".join(page.text.values()).replace("augmented pictures", "")
