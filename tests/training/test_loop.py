import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import Tensor, nn

from vitrail.checkpoints import load_model
from vitrail.config import ConfigError, RunConfig, load
from vitrail.evaluation import evaluate
from vitrail.models import Model
from vitrail.training import loop
from vitrail.training.loop import Run, train
from vitrail.training.objectives import Classify
from vitrail.training.plan import Rehearsal
from vitrail.training.state import saved_checkpoints
from vitrail.training.step import NonFiniteError

Fit = Callable[..., Run]
Samples = list[tuple[Tensor, int]]


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "model" / "model.safetensors")


def of_kind(run: Run, kind: str) -> list[dict[str, Any]]:
    return [record for record in run.history if record["kind"] == kind]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_everything_behind(fit: Fit, samples: Samples, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(steps=30, lr=3e-3, eval_every=2.0, tensorboard=True)
    assert run.metrics["top1"] > 0.9
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "tensorboard", "checkpoints", "best", "model", "evaluation.json",
    }  # fmt: skip
    loaded = load_model(run.path)
    assert loaded.card.classes == ("0", "1", "2")
    assert loaded.card.preprocess.image_size == (16, 16)
    assert loaded.card.metrics["top1"] == run.metrics["top1"]
    assert evaluate(loaded, samples, split="val", progress=False).metrics == run.metrics
    assert [record["step"] for record in of_kind(run, "eval")] == [8, 16, 24, 30]
    assert [record["step"] for record in of_kind(run, "train")] == list(range(1, 31))
    assert of_kind(run, "train")[-1]["loss"] < of_kind(run, "train")[0]["loss"] / 2
    shown = capsys.readouterr().out
    for part in (
        "classes  3 (0 ",
        "vit_micro_patch4_16",
        "GMACs",
        "lr       0.003",
        "30 steps",
        "a step",
        "top-1 accuracy",
        str(run.path),
    ):
        assert part in shown


def test_the_stored_settings_are_complete_and_repeat_the_run(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    first = fit(precision="auto", epochs=1.5, steps=0)
    stored = load(RunConfig, first.path / "config.yaml")
    assert stored.schedule.steps == 6
    assert stored.precision in ("fp32", "bf16")
    assert stored == first.config
    second = train(dataclasses.replace(stored, out=str(tmp_path / "again")), samples)
    assert same(weights(first), weights(second))


def test_another_seed_gives_another_run(fit: Fit, tmp_path: Path) -> None:
    first, second = fit(), fit(seed=1, out=str(tmp_path / "other"))
    assert not same(weights(first), weights(second))


@pytest.mark.parametrize("settings", [{}, {"loss": "bce", "balance": "weights", "label_smoothing": 0.1}])
def test_accumulated_gradients_are_those_of_the_whole_batch(fit: Fit, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = fit(optimizer="sgd", lr=0.1, **settings)
    parts = fit(optimizer="sgd", lr=0.1, accumulate=4, out=str(tmp_path / "parts"), **settings)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-4, atol=1e-6)
    for a, b in zip(of_kind(whole, "train"), of_kind(parts, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_checkpointing_changes_memory_only(fit: Fit, tmp_path: Path) -> None:
    overrides = {"depth": 2, "dropout": 0.1, "drop_path": 0.1}
    plain, thrifty = fit(overrides=overrides), fit(overrides=overrides, checkpointing=True, out=str(tmp_path / "thrifty"))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(thrifty)[name], tensor, rtol=1e-4, atol=1e-6)


def test_averaged_weights_are_evaluated_and_kept(fit: Fit, tmp_path: Path) -> None:
    plain, averaged = fit(), fit(ema=0.9, out=str(tmp_path / "ema"))
    last = saved_checkpoints(averaged.path)[-1]
    assert same(load_file(last / "model.safetensors"), weights(plain))  # the trained weights are the same
    assert not same(weights(averaged), weights(plain))
    kept = {
        k.removeprefix("ema/module."): v
        for k, v in load_file(last / "state.safetensors").items()
        if k.startswith("ema/module.")
    }
    assert same(kept, weights(averaged))
    assert averaged.metrics["nll"] == pytest.approx(of_kind(averaged, "eval")[-1]["nll"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_float32_weights(fit: Fit, precision: str) -> None:
    run = fit(precision=precision, steps=20, lr=3e-3, optimizer="adam")
    assert run.metrics["top1"] > 0.6
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    scale = json.loads((saved_checkpoints(run.path)[-1] / "state.json").read_text())["scaler"]
    assert bool(scale) == (precision == "fp16")


@pytest.mark.parametrize(
    "settings",
    [
        {"balance": "sampler"}, {"balance": "logit-adjustment"}, {"mixup": 0.4}, {"loss": "bce", "cutmix": 1.0},
        {"repeats": 2}, {"optimizer": "sgd", "nesterov": True, "schedule": "step"},
        {"model": "resnet_micro", "overrides": {}, "clip_norm": 0.0},
        {"layer_decay": 0.7, "schedule": "linear", "lr_batch": 32}, {"image_size": (16, 24), "fit": "pad"},
        {"crop": "random", "hflip": 0.5, "randaugment_ops": 2, "erasing": 0.5},
    ],
)  # fmt: skip
def test_recipes_run(fit: Fit, settings: dict[str, Any]) -> None:
    run = fit(**settings)
    losses = [record["loss"] for record in of_kind(run, "train")]
    assert len(losses) == 6
    assert all(0 < loss < 10 for loss in losses)


def test_several_labels(fit: Fit) -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (64, 3), generator=draws).float()
    images = torch.randint(0, 100, (64, 3, 16, 16), dtype=torch.uint8, generator=draws)
    images += (labels[..., None, None] * 100).to(torch.uint8)
    run = fit(list(zip(images, labels, strict=True)), steps=40, lr=3e-3, eval_every=5.0)
    assert run.metrics["map"] > 0.9
    assert load_model(run.path).card.multi_label
    assert {"accuracy", "loss"} <= set(of_kind(run, "train")[0])


def test_learning_rate_is_scaled_warmed_up_and_recorded(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(lr=0.01, lr_batch=32, warmup_steps=2, schedule="constant")
    assert [record["lr"] for record in of_kind(run, "train")] == pytest.approx(
        [0.005 / 3, 0.01 / 3, 0.005, 0.005, 0.005, 0.005]
    )
    assert "0.005 (0.01 x 16 / 32)" in capsys.readouterr().out


def test_own_objective_and_evaluators(fit: Fit) -> None:
    class Margin(nn.Module):
        def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
            logits = model(images)
            return {"loss": nn.functional.multi_margin_loss(logits, targets), "spread": logits.std()}

    def size(model: Model) -> Iterator[tuple[str, float]]:
        yield "size", float(model.head.linear.weight.detach().norm())

    run = fit(objective=Margin(), evaluators=[size])
    assert {"loss", "spread"} <= set(of_kind(run, "train")[0])
    records = of_kind(run, "eval")
    assert [set(record) for record in records] == [{"kind", "step", "epoch", "size"}] * len(records)


def test_early_stopping_counts_evaluations_without_improvement(fit: Fit, samples: Samples) -> None:
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    run = fit(steps=100, eval_every=0.5, patience=2, evaluators=[lambda model: [("score", next(values))]])
    assert [record["step"] for record in of_kind(run, "eval")] == [2, 4, 6, 8]
    assert same(load_file(run.path / "best" / "model.safetensors"), weights(run)) is False
    again = train(resume=run.path, data=samples)  # nothing left to do
    assert same(weights(again), weights(run))
    assert again.history[-1]["kind"] == "final"
    assert len(again.history) == len(run.history)


def test_without_validation_pictures_nothing_is_evaluated(fit: Fit) -> None:
    run = fit(val_fraction=0.0)
    assert run.metrics == {}
    assert run.report is None
    assert {record["kind"] for record in run.history} == {"train"}
    assert not (run.path / "best").exists()


class Faulty(Classify):
    """An objective whose loss (or gradient) is not a number at the micro-steps it is told."""

    def __init__(self, at: set[int], gradient: bool = False):
        super().__init__()
        self.at, self.gradient, self.calls = at, gradient, -1

    def forward(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        values = super().forward(model, images, targets)
        if self.calls in self.at:
            loss = values["loss"]
            values["loss"] = (loss - loss.detach()).sqrt() if self.gradient else loss * float("nan")
        return values


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "rehearse", lambda job, stream: (Rehearsal(0.01, 0.0, 0.01, 0.001), stream))


@pytest.mark.usefixtures("unrehearsed")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("model", ["vit_micro_patch4_16", "resnet_micro"])
def test_a_step_that_is_not_finite_changes_nothing(fit: Fit, samples: Samples, model: str, gradient: bool) -> None:
    run = fit(
        model=model, overrides={}, ema=0.5, steps=5, accumulate=2, save_every_steps=1, keep_last=9,
        objective=Faulty({4, 7}, gradient), evaluators=[lambda model: [("score", 0.0)]],
    )  # fmt: skip
    saved = saved_checkpoints(run.path)
    states = [{**load_file(path / "model.safetensors"), **load_file(path / "state.safetensors")} for path in saved]
    # steps 3 (micro-step 4) and 4 (micro-step 7) were refused
    assert [same(a, b) for a, b in itertools.pairwise(states)] == [False, True, True, False]
    assert [record["step"] for record in of_kind(run, "refused")] == [3, 4]
    assert all(record["loss"] is None or gradient for record in of_kind(run, "refused"))
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    kept = run.path / "nonfinite-step-3.safetensors"
    tensors = load_file(kept)
    assert set(tensors) == {f"{i}/{name}" for i in (0, 1) for name in ("images", "targets", "indices", "keys")}
    assert tensors["0/images"].shape == (8, 3, 16, 16)
    with safe_open(kept, "pt") as file:
        about = json.loads(file.metadata()["nonfinite"])
    assert (about["seed"], about["micro_step"], len(about["samples"])) == (0, 4, 16)


@pytest.mark.usefixtures("unrehearsed")
def test_too_many_refused_steps_in_a_row_end_the_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .*last: step 6.*lower --lr"):
        fit(steps=20, max_nonfinite=3, objective=Faulty({0, 1, 3, 4, 5}))
    assert "step 1 refused: loss nan" in capsys.readouterr().out


@pytest.mark.usefixtures("unrehearsed")
def test_only_so_many_refused_batches_are_kept(fit: Fit, tmp_path: Path) -> None:
    fit(steps=14, max_nonfinite=20, objective=Faulty(set(range(12))))
    assert len(list((tmp_path / "run").glob("nonfinite-step-*"))) == 10


def test_the_rehearsal_leaves_no_trace(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": "resnet_micro", "overrides": {}, "ema": 0.9, "accumulate": 2}
    rehearsed = fit(**settings)
    monkeypatch.setattr(loop, "rehearse", lambda job, stream: (Rehearsal(0.01, 0.0, 0.01, 0.001), stream))
    fresh = fit(**settings, out=str(tmp_path / "fresh"))
    assert same(weights(rehearsed), weights(fresh))
    states = [load_file(saved_checkpoints(run.path)[-1] / "state.safetensors") for run in (rehearsed, fresh)]
    assert same(*states)


def test_a_time_budget_becomes_a_number_of_steps(fit: Fit, monkeypatch: pytest.MonkeyPatch, samples: Samples) -> None:
    # 0.5 s a step, 0.025 s for a validation picture: every epoch, and once at the end
    measured = Rehearsal(micro=0.2, wait=0.1, update=0.2, picture=0.025)
    monkeypatch.setattr(loop, "rehearse", lambda job, stream: (measured, stream))
    run = fit(steps=0, epochs=100, time_budget=5.0 / 60)
    assert run.report is not None
    judging, every = run.report.metrics["n"] * 0.025, of_kind(run, "eval")[0]["step"]
    expected = int((5.0 - judging) / (0.5 + judging / every))
    steps = load(RunConfig, run.path / "config.yaml").schedule.steps
    assert expected - 2 <= steps <= expected  # less what the start took
    assert of_kind(run, "train")[-1]["step"] == steps
    assert train(resume=run.path, data=samples).config.schedule.steps == steps


def test_a_budget_longer_than_the_run_does_not_lengthen_it(fit: Fit) -> None:
    assert fit(steps=3, time_budget=10.0).config.schedule.steps == 3


def test_a_directory_that_holds_a_run_is_refused_with_two_ways_out(fit: Fit, tmp_path: Path) -> None:
    fit()
    with pytest.raises(ConfigError, match=r"already holds a run \(saved at step 6\).*--resume .*run.*--out"):
        fit()
    assert fit(out=str(tmp_path / "elsewhere")).path.name == "elsewhere"


def test_resume_when_there_is_a_run_and_start_when_there_is_none(fit: Fit, samples: Samples) -> None:
    whole = fit(resume=True)
    records = len(whole.history)
    assert len(fit(resume=True).history) == records
    with pytest.raises(ConfigError, match=r"keeps its settings.*lr \(0.001 there, 0.1 asked for\).*--out"):
        fit(resume=True, lr=0.1)
    changed = train(resume=whole.path, data=samples, workers=0, keep_last=5)
    assert changed.config.keep_last == 5


def test_the_same_call_resumes_whatever_form_its_settings_take(fit: Fit) -> None:
    settings = {"overrides": {"depth": 1, "patch": (8, 8)}, "precision": "auto", "time_budget": 5.0, "steps": 4}
    fit(resume=True, **settings)
    assert fit(resume=True, **settings).history[-1]["kind"] == "final"
    with pytest.raises(ConfigError, match=r"keeps its settings.*overrides"):
        fit(resume=True, **{**settings, "overrides": {"depth": 2}})


def test_resuming_what_is_no_run_is_refused(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(resume=tmp_path, data=samples)


def test_a_collection_must_be_handed_over_again(fit: Fit, samples: Samples) -> None:
    run = fit()
    with pytest.raises(ConfigError, match="hand it over again"):
        train(resume=run.path)
    fewer = samples[:-3]
    with pytest.raises(ConfigError, match="training samples are not those that"):
        train(resume=run.path, data=fewer)
    other = [(image, label + 1) for image, label in samples]
    with pytest.raises(ConfigError, match="classes are not those of the model"):
        train(resume=run.path, data=other)


def test_a_run_without_a_checkpoint_starts_over(fit: Fit, samples: Samples, tmp_path: Path) -> None:
    whole = fit()
    expected, count = weights(whole), len(whole.history)
    for path in saved_checkpoints(whole.path):
        path.rename(path.with_name("." + path.name))
    again = train(resume=whole.path, data=samples)
    assert same(weights(again), expected)
    assert len(again.history) == count


def test_starting_from_a_run_keeps_its_body_and_remakes_the_head(fit: Fit, tmp_path: Path) -> None:
    first = fit()
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    other = [(pixels + i, "xyzw"[i % 4]) for i in range(40)]
    start = {"init_from": str(first.path), "overrides": {}, "lr": 0.0, "steps": 1}
    with pytest.raises(ConfigError, match="init_from is a vit_micro_patch4_16, model says resnet18"):
        fit(other, **start, model="resnet18", out=str(tmp_path / "tuned"))
    tuned = fit(other, **start, out=str(tmp_path / "tuned"))
    before, after = weights(first), weights(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head"))
    assert after["head.linear.weight"].shape[0] == 4
    card = load_model(tuned.path).card
    assert card.classes == ("w", "x", "y", "z")
    assert any("from " in step for step in card.provenance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learnin_rate": 1}, "unknown setting 'learnin_rate'"),
        ({"model": "vit_mikro_patch4_16"}, "did you mean 'vit_micro_patch4_16'"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 cannot be divided.*nearest: 8 or 12"),
        ({"image_size": 18}, "18"),
        ({"overrides": {"dept": 3}}, "did you mean 'depth'"),
        ({"device": "cuda:9"}, "this machine has"),
        ({"lr": "fast"}, "expected a number"),
    ],
)
def test_settings_that_cannot_be_used(fit: Fit, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**settings)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_full_device_is_said_with_ways_out(fit: Fit) -> None:
    def greedy(model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(ConfigError, match="cpu has too little memory for 8 pictures at a time: --accumulate 4"):
        fit(objective=greedy, accumulate=2)


def test_no_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="no data was named"):
        train()


COMPILED = """
import functools, sys, torch
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # traces as always, but needs no C++ compiler
from vitrail.training.loop import train
pixels = torch.randint(0, 255, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
data = [(image, i % 3) for i, image in enumerate(pixels)]
settings = dict(model="vit_micro_patch4_16", overrides={"depth": 1}, batch_size=8, steps=3, device="cpu",
                precision="fp32", workers=0)
runs = [train(data=data, out=f"{sys.argv[1]}/{on}", compile=on, tensorboard=False, **settings) for on in (False, True)]
a, b = (run.model.state_dict() for run in runs)
print(max((a[name] - b[name]).abs().max().item() for name in a))
"""


def test_compiled_runs_are_the_same(run_python: Callable[..., str], tmp_path: Path) -> None:
    assert float(run_python(COMPILED, str(tmp_path)).split()[-1]) < 1e-4
