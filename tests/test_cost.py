import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.counting import measured

from vitrail import cost
from vitrail.models import create_model

# FLOPs and parameters counted by torch's flop counter on timm's, torchvision's and transformers' models (1000 classes).
COUNTED = {
    "vit_tiny_patch16_224": (5_717_416, 2_507_366_400),
    "vit_small_patch32_224": (22_878_952, 2_285_819_904),
    "vit_small_patch16_224": (22_050_664, 9_197_764_608),
    "vit_base_patch16_224": (86_567_656, 35_127_656_448),
    "vit_base_patch32_224": (88_224_232, 8_818_372_608),
    "resnet50": (25_557_032, 8_178_368_512),
    "resnetv2_50x1_bit": (25_549_352, 8_178_368_512),
    "vit_tiny_r_s16_p8_224": (6_337_704, 867_363_840),
    "vit_small_r26_s32_224": (36_431_912, 6_927_702_016),
    "vit_base_r50_s16_224": (98_659_112, 43_070_717_952),
    "vit_large_r50_s32_224": (328_994_856, 38_826_590_208),
    "resnetv2_101x1_bit": (44_541_480, 15_602_810_880),
    "cvt_13": (19_997_480, 9_132_178_432),
    "cvt_21": (31_622_696, 14_355_970_048),
}


def test_parameters_and_flops_agree_with_independent_models(run_python) -> None:
    found = measured(run_python, dict.fromkeys(COUNTED))
    assert {name: tuple(counts) for name, counts in found.items()} == COUNTED


def test_flops_of_another_input_size() -> None:
    model = create_model("vit_tiny_patch16_224", image_size=(224, 320), num_classes=10)
    wide = cost.count_flops(model)
    assert cost.count_flops(model, (3, 224, 160)) < cost.count_flops(model, (3, 224, 224)) < wide
    assert model.input_shape == (3, 224, 320)


def test_counting_leaves_the_model_alone() -> None:
    model = create_model("resnet_micro").eval()
    model.stages[0].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost.count_flops(model)
    cost.forecast_memory(model, 4)
    assert not model.training
    assert model.stages[0].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_are_not_trainable() -> None:
    model = create_model("vit_micro_patch4_16")
    model.head.requires_grad_(False)
    head = sum(p.numel() for p in model.head.parameters())
    assert cost.count_parameters(model) - cost.count_parameters(model, trainable=True) == head


def test_memory_parts() -> None:
    model = create_model("vit_micro_patch4_16")
    weights = 4 * cost.count_parameters(model)
    inference = cost.forecast_memory(model, 8, training=False)
    adam = cost.forecast_memory(model, 8, optimizer="adamw", ema=True)
    assert (inference.parameters, inference.gradients, inference.optimiser, inference.averaged) == (weights, 0, 0, 0)
    assert (adam.gradients, adam.optimiser, adam.averaged) == (weights, 2 * weights, weights)
    assert cost.forecast_memory(model, 8, optimizer="sgd").optimiser == weights
    assert inference.activations < adam.activations
    assert adam.total == adam.parameters + 4 * weights + adam.activations
    assert cost.forecast_memory(model, 16).activations == pytest.approx(2 * adam.activations, rel=0.1)


def test_checkpointing_and_bf16_save_activations() -> None:
    model = create_model("vit_tiny_patch16_224", depth=6)
    plain = cost.forecast_memory(model, 8).activations
    assert cost.forecast_memory(model, 8, precision="bf16").activations < 0.7 * plain
    model.set_checkpointing(True)
    assert cost.forecast_memory(model, 8).activations < 0.5 * plain


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 24), ("bf16", 12)])  # many processors are slow at bf16
def test_forecast_is_near_the_measured_peak_of_a_step(precision: str, batch: int) -> None:
    # What the allocator hands out, not the resident size: that also holds what the libraries of this or that CPU keep.
    model = create_model("vit_tiny_patch16_224", depth=4, image_size=192)
    images = torch.randn(batch, 3, 192, 192)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        with cost.autocast(torch.device("cpu"), precision):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long)).backward()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    memory = cost.forecast_memory(model, batch, precision=precision)
    assert 0.85 < max(held) / (memory.gradients + memory.activations) < 1.15


def test_peak_is_plausible_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost._peaks.cache_clear()
    peak = cost.matmul_peak("cpu", "fp32")
    assert 1e8 < peak < 1e14
    kept = json.loads((tmp_path / "vitrail" / "peaks.json").read_text())
    assert list(kept.values()) == [peak]
    cost._peaks.cache_clear()
    monkeypatch.setattr(cost, "_measure_peak", lambda device, dtype: 1.0)
    assert cost.matmul_peak("cpu", "fp32") == peak  # from the file
    assert cost.matmul_peak("cpu", "fp32", refresh=True) == peak  # a slower one was disturbed
    monkeypatch.setattr(cost, "_measure_peak", lambda device, dtype: 2 * peak)
    assert cost.matmul_peak("cpu", "fp32", refresh=True) == 2 * peak
    cost._peaks.cache_clear()


def test_a_broken_or_unwritable_cache_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_measure_peak", lambda device, dtype: 2.0)
    (tmp_path / "vitrail").mkdir()
    (tmp_path / "vitrail" / "peaks.json").write_text("[1, 2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost._peaks.cache_clear()
    assert cost.matmul_peak() == 2.0
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    cost._peaks.cache_clear()
    assert cost.matmul_peak() == 2.0
    cost._peaks.cache_clear()


@pytest.mark.parametrize("lacking", [frozenset(), frozenset((torch.bfloat16,))])
def test_the_peak_is_that_of_products_as_linear_layers_have_them(
    monkeypatch: pytest.MonkeyPatch, lacking: frozenset[torch.dtype]
) -> None:
    products: list[Any] = []
    monkeypatch.setattr(cost, "LACKING", lacking)
    monkeypatch.setattr(cost, "_seconds", lambda product, device: products.append(product) or 1.0)
    assert cost._measure_peak(torch.device("cpu"), torch.bfloat16) == 2 * 256**3
    assert {product.args[-1].stride() for product in products} == {(1, 256)}
    assert {product.func for product in products} == {cost.by_float32 if lacking else torch.mm}
    assert products[0]().dtype == torch.bfloat16


@pytest.mark.parametrize(("ratio", "wanted"), [(4.0, "bf16"), (1.1, "fp32")])
def test_auto_precision_follows_the_measurement(monkeypatch: pytest.MonkeyPatch, ratio: float, wanted: str) -> None:
    monkeypatch.setattr(cost, "matmul_peak", lambda device, precision: ratio if precision == "bf16" else 1.0)
    assert cost.pick_precision("auto", torch.device("cpu")) == wanted
    assert cost.pick_precision("fp16", torch.device("cpu")) == "fp16"


def test_a_precision_that_a_cpu_emulates_is_named_with_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "matmul_peak", lambda device, precision: {"fp32": 10.0, "bf16": 2.0, "fp16": 30.0}[precision])
    cpu = torch.device("cpu")
    assert "emulates bf16: its matrix products take 5 times as long as" in cost.slow_precision(cpu, "bf16")
    assert [cost.slow_precision(cpu, p) for p in ("fp32", "fp16")] == ["", ""]
    assert cost.slow_precision(torch.device("meta"), "bf16") == ""


def test_unknown_devices_and_precisions_name_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"this machine has: .*cpu"):
        cost.pick_device("cuda:77")
    with pytest.raises(ValueError, match="valid: auto, fp32, bf16, fp16"):
        cost.pick_precision("fp8", torch.device("cpu"))


def test_autocast_computes_in_the_precision() -> None:
    a = torch.randn(4, 4)
    for precision, dtype in cost.DTYPES.items():
        with cost.autocast(torch.device("cpu"), precision):
            assert (a @ a).dtype == dtype


@pytest.mark.parametrize(
    ("name", "precision", "layout"),
    [
        ("resnet_micro", "fp32", torch.channels_last),
        ("resnetv2_micro", "fp32", torch.contiguous_format),
        ("resnetv2_micro", "bf16", torch.channels_last),
        ("slowfast_micro", "fp32", torch.contiguous_format),
        ("slowfast_micro", "bf16", torch.channels_last_3d),
        ("deit_micro", "bf16", torch.contiguous_format),
    ],
)
def test_the_layout_is_one_that_is_summed_well_in(
    name: str, precision: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "LACKING", frozenset())
    assert cost.memory_format(create_model(name), precision) == layout
    monkeypatch.setattr(cost, "LACKING", frozenset((torch.bfloat16,)))  # which then goes by float32
    assert cost.memory_format(create_model(name), precision) == cost.memory_format(create_model(name), "fp32")
