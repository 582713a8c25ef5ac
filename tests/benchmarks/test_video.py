from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import results, video


def test_both_sides_take_the_same_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells run, are stored, and compare like with like."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (tmp_path / "videos").mkdir()
    video.make_videos(tmp_path / "videos", number=1, frames=70)
    video.run(sorted((tmp_path / "videos").iterdir()), pairs=1)
    cells = json.loads((tmp_path / "results" / "video.json").read_text())
    assert set(cells) == {"sequential pyav", "random pyav", "index"}
    assert cells["sequential pyav"]["same"]
    assert cells["sequential pyav"]["frames"] == 70
    assert cells["random pyav"]["same"]
    assert cells["random pyav"]["frames"] == 4 * 16
    assert cells["index"]["seconds"] > 0
