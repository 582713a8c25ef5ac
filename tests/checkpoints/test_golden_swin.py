"""Every golden case of Swin v1 and v2: same keys in, same numbers out, same keys back; and the rules that resize tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import golden, proofs

from vitrail.checkpoints import CheckpointError, load_model
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES
from vitrail.layers.attention import record_attention
from vitrail.layers.bias import resize_bias

CASES = [i for i, c in golden.manifest().items() if c["family"] in ("swin", "swin_v2")]
# What weights cannot tell and a configuration beside them would: picture sizes, windows of v2, timm's always_partition.
HINTS = {
    "timm_swin_tinycfg_pad": {"image_size": (40, 40)}, "hf_swin_tinycfg_pad": {"image_size": (40, 40)},
    "timm_swin_tinycfg_always_partition": {"image_size": (24, 24), "fit": "always"},
    "timm_swinv2_tinycfg": {"window": (4, 4)}, "tv_swin_v2_tinycfg": {"window": (4, 4)},
}  # fmt: skip


def hints(case_id: str) -> dict:
    return HINTS.get(case_id, {})


def site_of(key: str, case_id: str) -> str:
    """attn.<stage>.<block>; transformers gives one map per stage, of its last block."""
    part = key.split(".")
    return f"stages.{part[1]}.blocks.{part[2] if len(part) > 2 else 1}.attn.site"


@pytest.mark.parametrize("case_id", CASES)
def test_matches_the_peer(case_id: str, record_property) -> None:
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **hints(case_id))
    assert (model.family, model.config.version) == ("swin", 2 if case["family"] == "swin_v2" else 1)
    want, x = golden.outputs(case), golden.inputs(case)
    last = len(model.stages) - 1
    with torch.inference_mode(), record_attention(model) as maps:
        features, pyramid = model.features(x), model.pyramid(x)
        got = {"logits": model(x), "features": features.tokens}
        got |= {f"stage.{2 * s + 1}": pyramid[s].tokens for s in range(last)}  # torchvision: stages at odd places
        got |= {key: maps[site_of(key, case_id)] for key in want if key.startswith("attn.")}
        got |= {f"block.{s}.1": pyramid[s].tokens for s in range(last)}
    known = {key: value for key, value in want.items() if key in got}
    errors = {
        key: golden.worst(golden.strided(case, key, got[key]).reshape(value.shape), value) for key, value in known.items()
    }
    proofs.record(record_property, case_id, max(errors.values()))
    assert {"logits", "features"} <= set(errors)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("case_id", [i for i in CASES if "tinycfg" in i or i in ("hf_swin_tiny_224", "tv_swin_v2_t")])
def test_tables_write_what_they_read(case_id: str) -> None:
    state = golden.state(golden.manifest()[case_id])
    model = load_model(state, quiet=True, **hints(case_id))
    (source,) = (s for s in SOURCES if s.recognise(state))
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == {name for name, *_ in golden.manifest()[case_id]["state_dict"]}
    for name, shape, _ in golden.manifest()[case_id]["state_dict"]:
        assert list(back[name].shape) == shape
        if name not in state:
            continue  # a buffer that the peer makes for itself
        if name.endswith("qkv.bias") and model.config.version == 2:  # torchvision ignores what it stores for the keys
            back[name][len(back[name]) // 3 : -len(back[name]) // 3] = state[name].chunk(3)[1]
        assert torch.equal(back[name], state[name])


def test_matches_the_authors(record_property) -> None:
    case, want = golden.original("swin_tiny_cfg"), golden.original_outputs("swin_tiny_cfg")
    state = golden.original_state(case)
    model = load_model({"model": state}, quiet=True, image_size=64)
    x = torch.from_numpy(golden.normals(case["input"]["name"], case["input"]["shape"]))
    with torch.inference_mode():
        pyramid = model.pyramid(x)
        got = {"logits": model(x), "i.norm": pyramid[1].tokens, "pre_logits": model.pool(pyramid[1])}
    proofs.record(record_property, "swin_tiny_cfg", max(golden.worst(got[key], want[key]) for key in got))
    for key, value in got.items():
        assert (value - want[key]).abs().max() <= 2e-5, key
    (source,) = (s for s in SOURCES if s.recognise(state))
    assert source.name == "microsoft"
    back = write(source.rules(model.config), model.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["w4to6", "w7to12_newhead", "w4to7_ape"])
def test_resizes_tables_as_the_authors(key: str, capsys, record_property) -> None:
    entry = next(c for c in golden.original("swin_load_pretrained_resize")["cases"] if c["key"] == key)
    want = {k.removeprefix(key + "/"): v for k, v in golden.original_outputs("swin_load_pretrained_resize").items()
            if k.startswith(key + "/")}  # fmt: skip
    target = entry["target"]
    state = golden.original_state({"params": entry["source_params"]})
    model = load_model(
        state, image_size=target["img_size"], window=(target["window_size"],) * 2, num_classes=target["num_classes"]
    )
    got = write(next(s for s in SOURCES if s.recognise(state)).rules(model.config), model.state_dict())
    x = torch.from_numpy(np.array(golden.normals(entry["input_name"], entry["input_shape"])))
    with torch.inference_mode():
        got["logits"] = model(x)
    error = max(golden.worst(got[name], value) for name, value in want.items())
    proofs.record(record_property, "swin_load_pretrained_resize", error)
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= 2e-5, name
    side = target["img_size"]
    assert f"windows at {side}x{side}: {target['window_size']}x{target['window_size']} of" in capsys.readouterr().err


def test_resizes_tables_as_timm(record_property) -> None:
    case = golden.manifest()["resample_swin_bias_7_to_12"]
    got, want = resize_bias(golden.inputs(case)[0], (7, 7), (12, 12), "geometric"), golden.outputs(case)["resampled"]
    proofs.record(record_property, "resample_swin_bias_7_to_12", golden.worst(got, want))
    assert golden.worst(got, want) <= 1e-5


@pytest.mark.parametrize("rule", ["bicubic_corners", "bicubic_plain", "geometric"])
def test_resizing_keeps_the_centre_and_the_same_window(rule: str) -> None:
    table = torch.randn(13 * 13, 3)
    assert resize_bias(table, (7, 7), (7, 7), rule) is table
    larger = resize_bias(table, (7, 7), (12, 9), rule)
    assert larger.shape == (23 * 17, 3)
    torch.testing.assert_close(larger[11 * 17 + 8], table[6 * 13 + 6])
    if rule == "bicubic_corners":
        torch.testing.assert_close(larger[[0, -1]], table[[0, -1]])


def test_tables_that_fit_no_window_plan_are_refused() -> None:
    state = golden.state(golden.manifest()["timm_swin_tinycfg_w4"])
    state["layers.1.blocks.0.attn.relative_position_bias_table"] = torch.randn(36, 4)
    with pytest.raises(CheckpointError, match=r"built_size=\(height, width\)"):
        load_model(state, quiet=True)
