"""Fine-tuning: other sizes, frozen parts, solved heads, low-rank adaptation, few-shot probes and progressive resolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitrail.checkpoints import load_model, save_model
from vitrail.cli.parse import parse
from vitrail.cli.train import Arguments, explicit
from vitrail.config import ConfigError, ModelCard, Preprocess, RunConfig, TransferConfig
from vitrail.layers import lora
from vitrail.models import create_model
from vitrail.training.progressive import Progressive, plan_sizes, shrink
from vitrail.training.transfer import adapt, freeze

ATTENTIVE = (
    "vit_micro_patch4_16",
    "deit_micro",
    "hybrid_micro",
    "cvt_micro",
    "swin_micro",
    "mvitv2_micro",
    "timesformer_micro",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model of 16 x 16 pixels for the classes of the samples."""
    torch.manual_seed(3)
    model = create_model("vit_micro_patch4_16", depth=2, num_classes=3)
    torch.nn.init.normal_(model.head.linear.weight)
    card = ModelCard(name="vit_micro_patch4_16", classes=("0", "1", "2"), preprocess=Preprocess(image_size=(16, 16)))
    return save_model(model, tmp_path_factory.mktemp("start") / "start.safetensors", card=card)


def same(model: torch.nn.Module, other: torch.nn.Module, names: set[str]) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items() if name in names)


@pytest.mark.parametrize("what", ["backbone", "1", "0"])
def test_what_is_frozen_stays(fit, start: Path, what: str) -> None:
    run = fit(init_from=str(start), overrides={}, freeze=what, lr=0.1, ema=0.5)
    before = load_model(start, quiet=True)
    depths = before.layer_ids()
    limit = 2 if what == "backbone" else int(what)
    frozen = {n for n, depth in depths.items() if (not n.startswith("head.") if what == "backbone" else depth <= limit)}
    assert same(run.model, before, frozen)
    assert not any(same(run.model, before, {name}) for name in set(depths) - frozen)


def test_frozen_normalisation_keeps_its_statistics() -> None:
    model = create_model("resnet_micro", num_classes=3)
    assert "the backbone" in freeze(model, "backbone")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.head.training
    part = create_model("resnet_micro", num_classes=3)
    freeze(part, "1")
    part.train()
    assert not part.stem.training
    assert part.stages[-1].training
    with pytest.raises(ConfigError, match=r"0 \(the stem alone\) to \d"):
        freeze(part, "99")


@pytest.mark.parametrize("name", ATTENTIVE)
def test_adaptation_merges_to_the_same_answers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    head = model.head.linear
    torch.nn.init.normal_(head.weight)
    x = torch.randn(2, *model.input_shape)
    plain = model(x)
    layers = lora.add_lora(model, 2, 4.0)
    assert all(".attn" in layer or "attention" in layer or "time" in layer or "space" in layer for layer in layers)
    torch.testing.assert_close(model(x), plain)  # B starts at zero
    for _, layer in lora.adapted(model):
        torch.nn.init.normal_(layer.parametrizations.weight[0].b, std=0.1)
    changed = model(x)
    assert not torch.allclose(changed, plain, atol=1e-3)
    loaded = load_model(save_model(model, tmp_path / "merged.safetensors"), quiet=True)
    torch.testing.assert_close(loaded(x), changed)
    lora.merge_lora(model)
    torch.testing.assert_close(model(x), changed)
    assert set(model.state_dict()) == set(loaded.state_dict())
    assert not list(lora.adapted(model))


def test_adaptation_leaves_batch_statistics_alone() -> None:
    model = create_model("cvt_micro", num_classes=3)
    (told,) = adapt(model, TransferConfig(lora_rank=2))
    assert "rank 2" in told
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(2, *model.input_shape)).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {n for n in model.layer_ids() if n.startswith("head.") or n.endswith((".weight.0.a", ".weight.0.b"))}
    with pytest.raises(ConfigError, match="leave freeze out"):
        list(adapt(model, TransferConfig(lora_rank=2, freeze="1")))


def test_adaptation_is_refused_where_there_is_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="none"):
        lora.add_lora(create_model("resnet_micro"), 2, 4.0)
    with pytest.raises(ValueError, match="allowed: 1 to 31"):
        lora.add_lora(create_model("vit_micro_patch4_16"), 64, 4.0)


def test_an_adapted_run_trains_only_its_own_and_resumes_exactly(fit, start: Path, tmp_path: Path) -> None:
    asked = {"init_from": str(start), "overrides": {}, "lora_rank": 2, "lr": 0.02, "ema": 0.5}
    whole = fit(**asked, out=str(tmp_path / "whole"))
    before = load_model(start, quiet=True)
    adapted = {name for name in before.state_dict() if ".attn." in name and name.endswith("weight")}
    assert same(whole.model, before, {n for n in before.state_dict() if n not in adapted and not n.startswith("head.")})
    assert not any(same(whole.model, before, {name}) for name in adapted)
    torch.testing.assert_close(load_model(whole.path / "model").state_dict(), whole.model.state_dict())
    part = fit(**asked, out=str(tmp_path / "part"), save_every_steps=2, keep_last=9)
    for step in (4, 6):  # as a kill before them would have left it
        folder = part.path / "checkpoints" / f"step-{step:08}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert len(load_model(part.path / "checkpoints" / "step-00000002", quiet=True).state_dict()) == len(before.state_dict())
    resumed = fit(resume=str(part.path), overrides={})
    assert all(torch.equal(v, whole.model.state_dict()[n]) for n, v in resumed.model.state_dict().items())


def test_a_probed_head_starts_where_linear_probing_ends(fit, start: Path) -> None:
    zero = fit(init_from=str(start), overrides={}, lr=0.0, weight_decay=0.0)
    solved = fit(init_from=str(start), overrides={}, lr=0.0, weight_decay=0.0, head="probe", out=f"{zero.path}-solved")
    assert solved.metrics["top1"] > max(zero.metrics["top1"], 0.9)
    assert same(solved.model, zero.model, {n for n in zero.model.state_dict() if not n.startswith("head.")})


def test_resizing_is_judged_before_training(fit, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(init_from=str(start), overrides={}, image_size=(24, 32), lr=0.0, weight_decay=0.0, probe_shots=(1, 4))
    said = capsys.readouterr()
    assert "after resizing alone" in said.out.replace("\n", " ")
    assert "resized: positions.0.table" in said.err
    assert run.model.config.image_size == (24, 32)
    probes = [record for record in run.history if record["kind"] == "probe"]
    assert [record["step"] for record in probes] == [4, 6]
    assert 0 <= probes[-1]["fewshot_1"] <= 1
    assert probes[-1]["fewshot_4"] > 0.3
    again = load_model(start, image_size=(16, 16), quiet=True)
    assert same(again, load_model(start, quiet=True), set(again.state_dict()))  # identity at equal size


def test_progressive_sizes_are_a_function_of_the_step(fit, start: Path, tmp_path: Path) -> None:
    plan = Progressive(((8, 8), (12, 12)), (0.25, 0.5), 0.5)
    assert [plan.size(step, 8) for step in range(8)] == [(8, 8), (8, 8), (12, 12), (12, 12), *[None] * 4]
    assert plan.mean_cost == pytest.approx(0.5 + 0.5 * 0.375)
    assert sum(plan.cost(step, 8) for step in range(8)) / 8 == pytest.approx(plan.mean_cost)
    clip = torch.rand(2, 3, 4, 16, 16)
    assert torch.equal(shrink(clip, (8, 8))[:, :, 1], shrink(clip[:, :, 1], (8, 8)))
    asked = {"progressive": (8, 12), "progressive_share": 0.7, "mixup": 0.2}
    whole = fit(**asked, out=str(tmp_path / "whole"))
    part = fit(**asked, out=str(tmp_path / "part"), save_every_steps=1, keep_last=9)
    for step in range(3, 7):
        folder = part.path / "checkpoints" / f"step-{step:08}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = fit(resume=str(part.path))
    assert all(torch.equal(v, whole.model.state_dict()[n]) for n, v in resumed.model.state_dict().items())
    plain = fit(mixup=0.2, out=str(tmp_path / "plain"))
    assert not same(plain.model, whole.model, {"embed.proj.weight"})


def test_progressive_sizes_that_do_not_fit_are_refused() -> None:
    model, config = create_model("vit_micro_patch4_16"), RunConfig().schedule.__class__
    with pytest.raises(ConfigError, match=r"multiples of 4; nearest: 8"):
        plan_sizes(model, config(progressive=(10,)))
    for wrong in ((12, 8), (16,), (8, 8)):
        with pytest.raises(ConfigError, match="must rise"):
            plan_sizes(model, config(progressive=wrong))
    sizes = plan_sizes(create_model("vit_micro_patch4_16", image_size=(16, 32)), config(progressive=(8,)))
    assert sizes.sizes == ((8, 16),)
    assert sizes.costs[0] < 0.3


def test_from_is_another_word_for_init_from() -> None:
    words = ["photos", "--from", "runs/x", "--image-size", "32", "--progressive", "16,24", "--freeze", "3"]
    arguments = parse(Arguments, words, prog="t", examples="")
    given = explicit(words, arguments, RunConfig())
    assert given["init_from"] == "runs/x"
    assert given["progressive"] == (16, 24)
    assert given["freeze"] == "3"
