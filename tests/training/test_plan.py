import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail import cost
from vitrail.config import RunConfig, flat, replace_flat
from vitrail.recipes import RECIPES
from vitrail.training import plan
from vitrail.training.distributed import Ranks
from vitrail.training.idle import idle_settings
from vitrail.training.plan import Plan, Rehearsal, hand_out, length_lines, make_plan, rehearse
from vitrail.training.setup import Job, prepare, resolve

Samples = list[tuple[torch.Tensor, int]]
RANKS = Ranks(torch.device("cpu"))


@pytest.fixture
def job(samples: Samples, tmp_path: Path) -> Callable[..., Job]:
    def make(**settings: Any) -> Job:
        given = {
            "model": "vit_micro_patch4_16",
            "batch_size": 16,
            "out": str(tmp_path),
            "workers": 0,
            "precision": "fp32",
            **settings,
        }
        return prepare(resolve(RunConfig(), samples, given, False), RANKS, None, ())

    return make


def text(*lines: str) -> dict[str, str]:
    return {line[:9].strip(): line[9:] for line in lines}


def test_the_plan_says_what_will_happen(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "matmul_peak", lambda device, precision: 2e12)
    made = job(epochs=3, ema=0.9, lr=0.002, lr_batch=64, accumulate=2, overrides={"depth": 2})
    steps = made.loader.steps_per_epoch
    rehearsal = Rehearsal(micro=0.04, wait=0.01, update=0.1, picture=0.001)
    lines = text(*make_plan(made).lines, *length_lines(made, rehearsal))
    assert "train" in lines["data"]
    assert lines["classes"].startswith("3 (0 ")
    assert lines["input"] == "16 x 16 pixels, 3 channels, fit crop; pictures of about 16 x 16 (height x width)"
    assert "vit_micro_patch4_16 (depth 2)" in lines["model"]
    assert lines["batch"] == "16 = 8 x 2 micro-steps"
    assert lines["lr"].startswith("0.0005 (0.002 x 16 / 64), adamw, cosine after")
    assert lines["length"].startswith(f"{3 * steps} steps, 3 epochs of {steps};")
    assert "2 TFLOP/s" in lines["machine"]
    assert "activations" in lines["memory"]
    assert "200 ms a step, 80 images/s" in lines["time"]


def test_many_classes_are_summed_up(job: Callable[..., Job], samples: Samples, tmp_path: Path) -> None:
    many = [(image, i % 20) for i, (image, _) in enumerate(samples)]
    settings = {"model": "vit_micro_patch4_16", "batch_size": 16, "out": str(tmp_path), "workers": 0}
    made = prepare(resolve(None, many, settings, False), RANKS, None, ())
    assert "training samples each" in text(*make_plan(made).lines)["classes"]
    assert set(text(*length_lines(made, None))) == {"length"}


def test_too_little_memory_is_said_with_a_way_out(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    made = job()
    assert 2**20 < plan.available_memory(RANKS.device) < 2**50
    assert "only" not in text(*make_plan(made).lines)["memory"]
    monkeypatch.setattr(plan, "available_memory", lambda device: 2**20)
    assert "only 1 MiB are free: --accumulate 2" in text(*make_plan(made).lines)["memory"]


def test_an_emulated_precision_is_a_note(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "matmul_peak", lambda device, precision: 1e9 if precision == "bf16" else 4e9)
    assert "take 4 times as long as those of --precision fp32" in text(*make_plan(job(precision="bf16")).lines)["note"]
    assert not any("emulates" in line for line in make_plan(job()).lines)


def test_settings_without_effect_are_named(job: Callable[..., Job]) -> None:
    def told(**settings: Any) -> list[str]:
        lines = make_plan(job(**settings)).lines
        return [line.removeprefix("note").strip() for line in lines if line.startswith("note") and "effect" in line]

    assert told(distill="soft", distill_weight=0.5, mask_ratio=0.4, momentum=0.8) == [
        "distill, distill_weight have no effect without a teacher (--teacher)",
        "mask_ratio has no effect without --objective masked or mae",
        "momentum has no effect without --optimizer sgd",
    ]
    assert told(optimizer="sgd", momentum=0.8, schedule="step", milestones=(0.5,), mixup=0.2, mix_probability=0.5) == []
    assert told(objective="mae", patch_norm=False, mask_ratio=0.5, mask_target="pixels") == [
        "mask_target has no effect without --objective masked"
    ]


def test_recipes_set_nothing_without_effect() -> None:
    for name, recipe in RECIPES.items():
        config = recipe()
        asked = frozenset(key for key, value in flat(config).items() if value != flat(RunConfig())[key])
        taught = replace_flat(config, {"teacher": "runs/tutor"}) if name.startswith("deit_") else config
        assert idle_settings(taught, asked) == (), name


def test_utilisation_is_three_forward_passes_against_the_peak() -> None:
    made = Plan((), flops=1_000_000, memory=cost.Memory(0, 0, 0, 0, 0), peak=1e9)
    assert made.utilisation(100.0) == pytest.approx(0.3)
    assert made.utilisation(100.0, 2) == pytest.approx(0.15)


def test_rehearsing_measures_and_hands_the_batches_out_again(job: Callable[..., Job]) -> None:
    made = job(accumulate=2, ema=0.9)
    before = {name: tensor.clone() for name, tensor in made.state.model.state_dict().items()}
    measured, stream = rehearse(made, made.loader.batches(0))
    assert measured.micro > 0
    assert measured.update > 0
    assert measured.step(2) == pytest.approx(2 * (measured.micro + measured.wait) + measured.update)
    waits: list[float] = []
    for ours, theirs in itertools.islice(zip(stream, made.loader.batches(0), strict=False), 12):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.keys, theirs.keys)
        waits.append(ours.wait)
    assert waits[:2] == [0, 0]  # no step waits again for what was waited for while rehearsing
    after = made.state.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made.state.optimizer.state == {}
    assert made.state.ema is not None
    assert int(made.state.ema.n_averaged) == 0
    assert all(parameter.grad is None for parameter in made.parameters)
    assert made.state.progress.step == 0


def test_closing_what_is_handed_out_closes_the_stream() -> None:
    closed = []

    def stream() -> Any:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    given = hand_out([], stream())
    assert next(given) == 0
    given.close()
    assert closed == [True]
