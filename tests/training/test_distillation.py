"""Learning from a teacher: the loss against the authors' numbers, the view, the classes, resuming, stored answers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests import golden, proofs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vitrail.checkpoints import load_model, save_model
from vitrail.config import ConfigError, DistillationConfig, ModelCard, Preprocess
from vitrail.data.transforms import Normalise
from vitrail.evaluation import evaluate
from vitrail.models import create_model
from vitrail.training import teacher as teachers
from vitrail.training.distillation import Distill, Taught
from vitrail.training.distributed import Ranks
from vitrail.training.loop import Run, train
from vitrail.training.objectives import Classify
from vitrail.training.state import saved_checkpoints
from vitrail.training.teacher import Found, Teacher, class_columns, find

Fit = Callable[..., Run]
Samples = list[tuple[Tensor, int]]
PREPROCESS = Preprocess((16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


class Both(torch.nn.Module):
    """Stands for a distilled model: its logits are given."""

    def __init__(self, first: Tensor, second: Tensor):
        super().__init__()
        self.logits = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits


CASES = {f"{c['base']}.{c['type']}.a{c['alpha']}.t{c['tau']}": c for c in golden.original("deit_distillation_loss")["cases"]}


@pytest.mark.parametrize("key", CASES)
def test_the_loss_is_that_of_the_authors(key: str, record_property) -> None:
    case, stored = CASES[key], golden.original_outputs("deit_distillation_loss")
    first, second = (stored[name].clone().requires_grad_() for name in ("outputs", "outputs_kd"))
    labels = stored["soft_labels"] if case["base"] == "soft_target" else stored["labels"]
    base = Classify("ce", 0.1 if case["base"] == "ls0.1" else 0.0)
    if case["type"] == "none":
        loss = base(torch.nn.Identity(), first, labels)["loss"]
    else:
        objective = Distill(base, DistillationConfig("", case["type"], case["alpha"], case["tau"]))
        values = objective(Both(first, second), first, Taught(labels, stored["teacher"]))
        loss = values["loss"]
        assert values["agreement"] == (second.argmax(1) == stored["teacher"].argmax(1)).float().mean()
    loss.backward()
    errors = [abs(loss.item() - case["loss"]) / abs(case["loss"])]
    for name, logits in (("grad_out", first), ("grad_kd", second)):
        if f"{name}/{key}" in stored:
            want = stored[f"{name}/{key}"]
            errors.append(float((logits.grad - want).abs().max() / want.abs().max().clamp_min(1e-12)))
    proofs.record(record_property, "deit_distillation_loss", max(errors))
    assert max(errors) <= 1e-5


def test_one_head_learns_from_both_and_micro_batches_add_up() -> None:
    draws = torch.Generator().manual_seed(0)
    logits, answers = torch.randn(12, 5, generator=draws), torch.randn(12, 5, generator=draws)
    targets = torch.arange(12) % 5
    for kind in ("soft", "hard"):
        objective = Distill(Classify(), DistillationConfig("", kind, 0.3, 2.0))
        whole = objective(torch.nn.Identity(), logits, Taught(targets, answers))["loss"]
        parts = [
            objective(torch.nn.Identity(), logits[i : i + 4], Taught(targets[i : i + 4], answers[i : i + 4]))["loss"]
            for i in (0, 4, 8)
        ]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"distill_weight": 1.5}, "must be at least 0 and at most 1"), ({"distill_temperature": 0.0}, "must be above 0")],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(data="digits", **settings)


def found(classes: tuple[str, ...] = ("0", "1", "2"), **preprocess: Any) -> Found:
    torch.manual_seed(5)
    model = create_model("vit_micro_patch4_16", num_classes=len(classes))
    torch.nn.init.normal_(model.head.linear.weight)
    return Found("tutor", model, dataclasses.replace(PREPROCESS, **preprocess), classes, len(classes))


def test_the_teacher_sees_the_same_picture_normalised_and_sized_its_own_way() -> None:
    student = Preprocess((16, 16))
    pixels = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    given = Normalise(student)(pixels)
    same = Teacher(found(), None, student, "fp32")
    torch.testing.assert_close(same.view(given), Normalise(PREPROCESS)(pixels), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same(given, torch.arange(2)), same.model(Normalise(PREPROCESS)(pixels)), atol=1e-4, rtol=1e-4)
    larger = Teacher(found(image_size=(20, 24), interpolation="bilinear"), None, student, "fp32")
    view = larger.view(given)
    assert view.shape == (2, 3, 20, 24)
    assert view.mean().item() == pytest.approx(same.view(given).mean().item(), abs=0.02)


def test_classes_are_found_by_name() -> None:
    four = found(("cat", "dog", "eel", "fox"))
    assert class_columns(four, ("cat", "dog", "eel", "fox"), "name") is None
    assert class_columns(four, ("fox", "dog"), "name") == [3, 1]
    picked = Teacher(four, [3, 1], PREPROCESS, "fp32")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(picked(x, torch.arange(2)), four.model(x)[:, [3, 1]])
    assert class_columns(four, ("a", "b", "c", "d"), "order") is None
    assert len({Teacher(four, columns, PREPROCESS, "fp32").identity for columns in (None, [3, 1], [1, 3])}) == 3


@pytest.mark.parametrize(
    ("classes", "by", "message"),
    [
        (("cat", "gnu", "yak"), "name", "does not know 2 of 3 classes: 'gnu', 'yak'; it knows 'cat', 'dog'$"),
        (("gnu", "yak"), "name", "does not know 2 of 2 .* --teacher-classes order"),
        (("a", "b", "c"), "order", "answers 2 classes, the data has 3"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(classes: tuple[str, ...], by: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        class_columns(found(("cat", "dog")), classes, by)


def test_a_teacher_without_class_names_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing names the classes"):
        class_columns(dataclasses.replace(found(), classes=()), ("0", "1", "2"), "name")


def tutor(folder: Path, classes: tuple[str, ...] = ("0", "1", "2"), seed: int = 0, **card: Any) -> str:
    """The path of a teacher that answers by the brighter channel, as the samples' labels do."""
    torch.manual_seed(seed)
    model = create_model("vit_micro_patch4_16", num_classes=len(classes), depth=1)
    torch.nn.init.normal_(model.head.linear.weight)
    model.card = ModelCard(classes=classes, preprocess=PREPROCESS, metrics={"top1": 0.875}, **card)
    save_model(model, folder)
    return str(folder)


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def learned(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.history if record["kind"] == "train"]


@pytest.mark.parametrize("model", ["deit_micro", "vit_micro_patch4_16"])
def test_a_student_comes_to_agree_with_its_teacher(
    fit: Fit, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taught_by = tutor(tmp_path / "tutor")
    run = fit(model=model, teacher=taught_by, steps=30, lr=3e-3, distill_weight=0.9)
    records = learned(run)
    assert records[-1]["agreement"] > max(0.8, records[0]["agreement"])
    assert {"loss", "accuracy", "agreement", "label_loss", "teacher_loss"} <= set(records[0])
    shown = capsys.readouterr().out
    by = "the distillation head" if model == "deit_micro" else "the head that learns the labels"
    assert f"teacher  {taught_by}: " in shown
    assert "top-1 accuracy 87.5% by its card" in shown
    assert f"its answers (hard) weigh 0.9 of the loss, learned by {by}" in shown
    assert set(weights(run)) == set(create_model(model, depth=1).state_dict())  # the teacher is not in the checkpoint
    assert any(step.startswith(f"taught by {taught_by} (") for step in load_model(run.path).card.provenance)
    if model == "deit_micro":
        assert not torch.equal(weights(run)["head.linear.weight"], weights(run)["head.distilled.weight"])


def test_soft_distillation_with_mixed_pictures_and_half_precision(fit: Fit, tmp_path: Path) -> None:
    given = {"teacher": tutor(tmp_path / "tutor"), "distill": "soft", "distill_temperature": 3.0, "distill_weight": 0.1}
    run = fit(model="deit_micro", mixup=0.5, cutmix=0.5, precision="bf16", accumulate=2, **given)
    for record in learned(run):
        assert 0 < record["teacher_loss"] < 10
        assert record["loss"] == pytest.approx(0.9 * record["label_loss"] + 0.1 * record["teacher_loss"], rel=1e-4)


def test_a_distilled_model_without_a_teacher_learns_the_labels_with_both_heads(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(model="deit_micro", steps=20, lr=3e-3)
    assert "without a teacher: both heads learn the labels" in capsys.readouterr().out
    assert run.metrics["top1"] > 0.6
    assert torch.equal(weights(run)["head.linear.bias"], weights(run)["head.distilled.bias"])


@pytest.mark.parametrize("prediction", ["class", "distillation", "joint"])
def test_replicas_of_a_distilled_model_without_a_teacher_get_every_gradient(
    fit: Fit, prediction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A replica in a group of one process waits for gradients as one of several does, and raises if some did not come."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(Ranks, "wrap", lambda self, model: DistributedDataParallel(model))
        run = fit(model="deit_micro", overrides={"depth": 1, "prediction": prediction}, steps=3)
    finally:
        dist.destroy_process_group()
    read = {"class": ["linear"], "distillation": ["distilled"], "joint": ["linear", "distilled"]}[prediction]
    for head in ("linear", "distilled"):
        assert bool(weights(run)[f"head.{head}.weight"].any()) == (head in read)
    said = "both heads learn" if prediction == "joint" else f"the {prediction} head learns the labels, the other one stays"
    assert said in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_bits(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    settings = {"model": "deit_micro", "overrides": {"depth": 1, "drop_path": 0.2, "dropout": 0.1}, "mixup": 0.3, "hflip": 0.5}
    whole = fit(teacher=tutor(tmp_path / "tutor"), save_every_steps=3, keep_last=9, **settings)
    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    first, last = saved_checkpoints(cut)
    shutil.rmtree(last)
    assert first.name == "step-00000003"
    assert same(weights(train(resume=cut, data=samples)), weights(whole))
    moved = tmp_path / "moved"
    shutil.rmtree(cut)
    shutil.copytree(whole.path, cut)
    shutil.rmtree(saved_checkpoints(cut)[-1])
    shutil.move(tmp_path / "tutor", moved)
    with pytest.raises(ConfigError, match="tutor: no such file or folder"):
        train(resume=cut, data=samples)
    assert same(weights(train(resume=cut, data=samples, teacher=str(moved))), weights(whole))


def test_resuming_with_another_teacher_is_refused(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    run = fit(model="deit_micro", teacher=tutor(tmp_path / "tutor"))
    with pytest.raises(ConfigError, match=r"made with the teacher \w+, the run would go on with the teacher \w+: give"):
        train(resume=run.path, data=samples, teacher=tutor(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="would go on with no teacher"):
        train(resume=run.path, data=samples, teacher="")
    with pytest.raises(ConfigError, match=r"distill_weight \(0.5 there, 0.7 asked for\)"):
        train(resume=run.path, data=samples, distill_weight=0.7)


def test_teachers_that_cannot_teach(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such file or folder; a teacher is a run, a checkpoint"):
        fit(teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="does not know 1 of 3 classes: '2'"):
        fit(teacher=tutor(tmp_path / "two", ("0", "1", "x")))
    with pytest.raises(ConfigError, match="any number of labels"):
        fit(teacher=tutor(tmp_path / "labels", multi_label=True))
    with pytest.raises(ConfigError, match="takes 3 channels, the student 1; nearest: --channels 3"):
        fit(teacher=tutor(tmp_path / "tutor"), channels=1)
    with pytest.raises(ConfigError, match="several labels"):
        fit([(image, torch.tensor([1.0, label % 2])) for image, label in samples], teacher=str(tmp_path / "tutor"))
    with pytest.raises(ConfigError, match="give one of them"):
        fit(teacher=str(tmp_path / "tutor"), objective=Classify())
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_stored_answers_are_the_teachers_own_and_are_used_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": "deit_micro", "teacher": tutor(tmp_path / "tutor"), "teacher_cache": str(tmp_path / "cache")}
    plain = fit(**{**given, "teacher_cache": ""})
    stored = fit(**given, out=str(tmp_path / "stored"))
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(stored)[name], tensor, rtol=1e-4, atol=1e-5)
    (file,) = (tmp_path / "cache").iterdir()
    assert load_file(file)["logits"].isfinite().all()

    def asked(*_: object) -> None:
        raise AssertionError("the answers were stored")

    monkeypatch.setattr(teachers, "_answers", asked)
    assert same(weights(fit(**given, out=str(tmp_path / "again"))), weights(stored))
    monkeypatch.undo()
    fit(**{**given, "teacher": tutor(tmp_path / "other", seed=1), "out": str(tmp_path / "other-run")})
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_answers_are_not_stored_where_views_change(fit: Fit, tmp_path: Path) -> None:
    given = {"teacher": tutor(tmp_path / "tutor"), "teacher_cache": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match="these settings change it: crop, hflip, mixup"):
        fit(**given, crop="random", hflip=0.5, mixup=0.2)

    class Moving(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index >= 48:
                raise IndexError
            return torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8), index % 3

    with pytest.raises(ConfigError, match="may give another picture every time"):
        fit(Moving(), **given)
    assert not (tmp_path / "cache").exists()


def test_heads_of_a_distilled_model_are_judged_apart(fit: Fit, tmp_path: Path, samples: Samples) -> None:
    run = fit(model="deit_micro", teacher=tutor(tmp_path / "tutor"))
    reports = {
        name: evaluate(run.model, samples, prediction=name, progress=False) for name in ("class", "distillation", "joint")
    }
    first, second, both = (report.outputs.logits for report in reports.values())
    assert not torch.equal(first, second)
    torch.testing.assert_close((first + second) / 2, both)
    assert run.model.head.prediction == "joint"
    with pytest.raises(ValueError, match="allowed: joint, class, distillation"):
        evaluate(run.model, samples, prediction="both", progress=False)
    with pytest.raises(ConfigError, match="has one head"):
        evaluate(load_model(tmp_path / "tutor"), samples, prediction="class", progress=False)


def test_a_torchvision_teacher_whose_weights_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match="not on this machine and nothing is fetched here"):
        find("torchvision:mobilenet_v3_small")
    with pytest.raises(ConfigError, match="did you mean 'mobilenet_v3_small'"):
        find("torchvision:mobilenet_v3_smal")
    kind = models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.mobilenet_v3_small().state_dict(), tmp_path / "checkpoints" / Path(kind.url).name)
    teacher = find("torchvision:mobilenet_v3_small")
    assert teacher.accuracy == pytest.approx(0.67668)
    assert (teacher.preprocess.crop_fraction, teacher.preprocess.interpolation) == (0.875, "bilinear")
    ready = Teacher(teacher, class_columns(teacher, ("goldfish", "tench"), "name"), Preprocess((32, 32)), "fp32")
    assert ready(torch.randn(2, 3, 32, 32), torch.arange(2)).shape == (2, 2)
    assert ready.columns.tolist() == [1, 0]


TWO = """
import functools, json, os, socket, sys
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="aot_eager")
from vitrail.cost import Memory
from vitrail.training import plan
from vitrail.training.loop import train
plan.count_flops, plan.forecast_memory = (lambda *_: 1), (lambda *_, **__: Memory(1, 1, 1, 1, 1))
plan.matmul_peak = lambda *_: 1e9
folder, teacher = sys.argv[1:]
pixels = torch.randint(0, 255, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
data = [(image // (1 + i % 3), i % 3) for i, image in enumerate(pixels)]
settings = dict(model="deit_micro", overrides={"depth": 1}, batch_size=8, steps=4, device="cpu", precision="fp32", workers=0,
                crop="none", hflip=0.0, optimizer="sgd", teacher=teacher, tensorboard=False)

def run(world, name, **more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
            code = 99
            try:
                train(data=data, out=f"{folder}/{name}", **settings, **more)
                code = 0
            finally:
                sys.stdout.flush(); sys.stderr.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world
    return load_file(f"{folder}/{name}/model/model.safetensors")

one = run(1, "one")
others = {"two": run(2, "two"), "stored": run(2, "stored", teacher_cache=f"{folder}/cache")}
others["compiled"] = run(1, "compiled", compile=True)
print(json.dumps({name: max((one[n] - other[n]).abs().max().item() for n in one) for name, other in others.items()}))
"""


def test_two_processes_and_compiled_runs_learn_the_same(run_python: Callable[..., str], tmp_path: Path) -> None:
    apart = json.loads(run_python(TWO, str(tmp_path), tutor(tmp_path / "tutor")).splitlines()[-1])
    assert set(apart) == {"two", "stored", "compiled"}
    assert max(apart.values()) < 1e-5


@pytest.mark.peers
def test_a_timm_teacher_whose_weights_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub import constants

    name = "deit_tiny_patch16_224"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"are not on this machine.* hf download timm/deit_tiny_patch16_224\.fb_in1k"):
        find(f"timm:{name}")
    with pytest.raises(ConfigError, match="did you mean"):
        find("timm:deit_tinny")
    repository = tmp_path / f"models--timm--{name}.fb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    peer = timm.create_model(name).eval()
    save_file(peer.state_dict(), snapshot / "model.safetensors")
    teacher = find(f"timm:{name}")
    assert teacher.classes[0] == "n01440764"
    ready, x = Teacher(teacher, None, teacher.preprocess, "fp32"), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ready(x, torch.arange(1)), peer(x))
