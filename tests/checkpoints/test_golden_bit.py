"""Every golden case of BiT, through the checkpoint tables: same keys in, same numbers out, same keys back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests import golden, proofs

from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES, load_model
from vitrail.models import Model

CASES = [i for i, c in golden.manifest().items() if c["family"] == "bit"]
# What transformers keeps in config.json and no weight tells.
SETTINGS = {
    "hf_bit_tinycfg": {"num_groups": 8},
    "hf_bit_tinycfg_eps": {"num_groups": 8},
    "hf_bit_tinycfg_bottleneck_same": {"num_groups": 8, "layer_type": "bottleneck", "global_padding": "SAME"},
    "hf_bit_50_224": {"num_groups": 32},
}
LIMIT = 1e-4  # standardisation amplifies the rounding of small variances


def loaded(case_id: str, state: dict[str, torch.Tensor], folder: Path) -> Model:
    if case_id not in SETTINGS:
        return load_model(state, quiet=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS[case_id]))
    return load_model(folder, quiet=True)


@pytest.mark.parametrize("case_id", CASES)
def test_matches_the_peer(case_id: str, tmp_path, record_property) -> None:
    case = golden.manifest()[case_id]
    state = golden.state(case)
    model = loaded(case_id, state, tmp_path)
    want, x = golden.outputs(case), golden.inputs(case)
    with torch.inference_mode():
        pyramid = model.pyramid(x)
        errors = {"logits": golden.worst(model(x), want["logits"])}
    maps = [features.maps()[:, :, 0] for features in pyramid]
    if "features" in want:
        errors["features"] = golden.worst(golden.strided(case, "features", maps[-1]), want["features"])
    shift = 1 if case_id.startswith("hf") else 0  # transformers counts the stem
    raw = maps if not model.config.trunk.preactivation else maps[:-1]  # before the final norm
    for s, stage in enumerate(raw):
        if (key := f"stage.{s + shift}") in want:
            errors[key] = golden.worst(golden.strided(case, key, stage), want[key])
    proofs.record(record_property, case_id, max(errors.values()))
    assert max(errors.values()) <= LIMIT, errors

    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_matches_the_authors(record_property) -> None:
    case = golden.original("bit_tiny")
    state = golden.original_state(case)
    model = load_model(state, quiet=True)
    assert model.config.trunk.std_eps == 1e-10
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"]))
    want = golden.original_outputs("bit_tiny")
    with torch.inference_mode():
        pyramid = model.pyramid(x)
        errors = {
            "logits": golden.worst(model(x), want["logits"]),
            "pre_logits": golden.worst(model.pool(pyramid[-1]), want["pre_logits"]),
            "root": golden.worst(model.stem(x)[:, :8], want["i.root_ch8"]),
        }
    for s in range(3):
        errors[f"block{s + 1}"] = golden.worst(pyramid[s].maps()[:, :8, 0], want[f"i.block{s + 1}_ch8"])
    proofs.record(record_property, "bit_tiny", max(errors.values()))
    assert max(errors.values()) <= LIMIT, errors
    source = next(s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
