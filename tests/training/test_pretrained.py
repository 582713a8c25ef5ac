"""Training starts from published weights when asked to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.weights import Weights
from vitrail.config import ConfigError, Preprocess, load
from vitrail.models import create_model


def test_training_starts_from_the_weights_of_a_tag(fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("vit_micro_patch4_16", depth=1)
    torch.nn.init.constant_(model.class_token, 3.0)
    source = save_model(model, tmp_path / "published.safetensors")
    row = Weights("vit_micro_patch4_16", "mine", str(source), "mit", "nothing", Preprocess())
    rows = (dataclasses.replace(row, tag="other", source="nowhere.pth"), row)
    monkeypatch.setattr("vitrail.checkpoints.pretrained.of_model", lambda name: [r for r in rows if r.model == name])
    run = fit(model="vit_micro_patch4_16.mine", pretrained=True, lr=0.0, weight_decay=0.0, overrides={})
    assert torch.equal(run.model.class_token, model.class_token)
    assert f"from {source}" in load_model(run.path).card.provenance
    kept = load(type(run.config), run.path / "config.yaml")
    assert (kept.model, kept.pretrained) == ("vit_micro_patch4_16.mine", True)
    assert fit(model="vit_micro_patch4_16.mine", pretrained=True, lr=0.0, weight_decay=0.0, overrides={}, resume=True).path
    with pytest.raises(ConfigError, match="'mine'"):
        fit(model="vit_micro_patch4_16.mien", pretrained=True, out=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="give one of them"):
        fit(init_from=str(source), pretrained=True, out=str(tmp_path / "third"))
