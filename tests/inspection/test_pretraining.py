"""The page of a run without labels: figures, curves, and pictures masked, predicted and original."""

import html
import re
from pathlib import Path

import pytest
import torch

from vitrail.checkpoints.mapping import CheckpointError
from vitrail.inspection.report import write_report
from vitrail.runs import train


@pytest.mark.parametrize(("objective", "said"), [("masked", "corrupted patches' colours"), ("mae", "pixels' mean square")])
def test_the_page_shows_masked_predicted_and_original_pictures(tmp_path: Path, objective: str, said: str) -> None:
    draws = torch.Generator().manual_seed(0)
    samples = [(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=draws), i % 2) for i in range(60)]
    run = train(
        data=samples, model="vit_micro_patch4_16", objective=objective, overrides={"depth": 1}, steps=4, batch_size=16,
        eval_every=1.0, device="cpu", precision="fp32", tensorboard=False, workers=0, out=str(tmp_path / "run"),
    )  # fmt: skip
    page = (run.path / "report.html").read_text()
    held = sum(record["kind"] == "eval" for record in run.history)
    assert held >= 1
    triples = re.findall(r'<figure class="triple">.*?</figure>', page, re.DOTALL)
    assert 3 <= len(triples) <= 12
    for triple in triples:
        shown = re.findall(r'src="(data:image/png;base64,[^"]+)".*?<span class="what">(\w+)</span>', triple)
        assert [what for _, what in shown] == ["masked", "predicted", "original"]
        assert len({uri for uri, _ in shown}) == 3
    for part in (said, f"vitrail train DATA --from {run.path}", 'id="training"', 'id="data"', 'id="reproduce"', "<svg class"):
        assert part in html.unescape(page)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    # Without the data it goes without pictures, and says why.
    (run.path / "report.html").unlink()
    bare = write_report(run.path).read_text()
    assert "no pictures are shown" in bare
    assert "masked</span>" not in bare
    (run.path / "pretext.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pretext.safetensors is missing: it is written at the end of a run"):
        write_report(run.path)
