import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch

from vitrail.config import OptimConfig, ScheduleConfig
from vitrail.models import Model, create_model
from vitrail.training import optim, schedule
from vitrail.training.muon import orthogonal

CPU = torch.device("cpu")


def groups_of(config: OptimConfig, **overrides: object) -> dict[str, dict[str, float]]:
    model = create_model("vit_micro_patch4_16", **overrides)
    groups = optim.parameter_groups(model, config)
    found = {name: {"decay": g["weight_decay"], "scale": g["lr_scale"]} for g in groups for name in g["names"]}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(found)
    return found


def test_only_matrices_decay() -> None:
    found = groups_of(OptimConfig(weight_decay=0.3), registers=2)
    decayed = {name for name, group in found.items() if group["decay"]}
    assert {"blocks.0.attn.qkv.weight", "blocks.2.mlp.fc1.weight", "embed.proj.weight", "head.linear.weight"} <= decayed
    assert all(found[name]["decay"] == 0.3 for name in decayed)
    for part in ("bias", "norm", "class_token", "registers", "positions"):
        assert not [name for name in decayed if part in name]


def test_layer_decay_counts_from_the_head() -> None:
    found = groups_of(OptimConfig(layer_decay=0.5))
    assert found["head.linear.weight"]["scale"] == 1
    assert found["blocks.2.mlp.fc1.weight"]["scale"] == 0.5
    assert found["blocks.0.mlp.fc1.weight"]["scale"] == 0.125
    assert found["embed.proj.weight"]["scale"] == 0.0625
    assert {group["scale"] for group in groups_of(OptimConfig()).values()} == {1.0}


def test_frozen_parameters_are_left_out() -> None:
    model = create_model("vit_micro_patch4_16")
    model.blocks.requires_grad_(False)
    names = [name for group in optim.parameter_groups(model, OptimConfig()) for name in group["names"]]
    assert names
    assert not any(name.startswith("blocks") for name in names)


@pytest.mark.parametrize(
    ("config", "kind", "settings"),
    [
        (OptimConfig("adamw", weight_decay=0.1, beta2=0.95), torch.optim.AdamW, {"betas": (0.9, 0.95)}),
        (OptimConfig("adam", weight_decay=0.1), torch.optim.Adam, {}),
        (OptimConfig("sgd", weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9}),
        (OptimConfig("sgd", weight_decay=0.1, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (OptimConfig("sgd", weight_decay=0.1, momentum=0.0, nesterov=True), torch.optim.SGD, {}),
    ],
)
def test_updates_are_those_of_the_plain_optimiser(config: OptimConfig, kind: Any, settings: dict[str, Any]) -> None:
    model = create_model("vit_micro_patch4_16")
    twin = copy.deepcopy(model.blocks[0].mlp.fc1.weight)
    ours, theirs = optim.build_optimizer(model, config, CPU), kind([twin], lr=0.01, weight_decay=0.1, **settings)
    optim.set_lr(ours, 0.01)
    for _ in range(3):
        gradient = torch.randn_like(twin)
        model.blocks[0].mlp.fc1.weight.grad, twin.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight, twin, rtol=1e-5, atol=1e-7)


def test_learning_rates_follow_the_scale() -> None:
    model = create_model("vit_micro_patch4_16")
    optimizer = optim.build_optimizer(model, OptimConfig(layer_decay=0.5), CPU)
    optim.set_lr(optimizer, 0.4)
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {0.4, 0.2, 0.1, 0.05, 0.025}


def test_lr_is_scaled_to_the_batch_only_when_asked() -> None:
    assert optim.scaled_lr(OptimConfig(lr=0.1), 512) == 0.1
    assert optim.scaled_lr(OptimConfig(lr=0.1, lr_batch=256), 512) == pytest.approx(0.2)


def test_gradient_norm_is_global() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert optim.gradient_norm([a, b, c]).item() == pytest.approx(5.0)


def with_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("name", "field"), [("adamw", "exp_avg_sq"), ("sgd", "momentum_buffer"), ("muon", "momentum")])
def test_optimiser_state_survives_being_flattened(name: str, field: str) -> None:
    config = OptimConfig(name, layer_decay=0.9)  # type: ignore[arg-type]
    model = create_model("vit_micro_patch4_16")
    first = optim.build_optimizer(model, config, CPU)
    for seed in range(2):
        with_gradients(model, seed)
        first.step()
    tensors = {key: tensor.clone() for key, tensor in optim.optimizer_tensors(first).items()}
    assert f"blocks.0.attn.qkv.weight/{field}" in tensors
    twin = copy.deepcopy(model)
    second = optim.build_optimizer(twin, config, CPU)
    optim.restore_optimizer(second, tensors)
    again = optim.optimizer_tensors(second)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    for one, optimizer in ((model, first), (twin, second)):
        with_gradients(one, 2)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def steps_of(model: Model, decay: float = 0.0) -> dict[str, torch.Tensor]:
    """What Muon's first step at learning rate 1 takes from every parameter, by name."""
    optimizer = optim.build_optimizer(model, OptimConfig("muon", lr=1.0, weight_decay=decay), CPU)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def test_muon_makes_the_steps_of_hidden_products_orthogonal() -> None:
    model = create_model("vit_micro_patch4_16")
    with_gradients(model, 0)
    steps = steps_of(model)
    products = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    hidden = {name for name in steps if name.startswith("blocks.") and name.endswith(products)}
    assert len(hidden) == 4 * model.config.depth
    for name in hidden:
        for part in steps[name].chunk(3 if "qkv" in name else 1):
            values = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
            assert values.max() < 1.3, name
            assert values.quantile(0.25) > 0.6, name  # a square matrix drawn at random has values near zero
    for name in set(steps) - hidden:  # AdamW's first step is the sign of the gradient
        torch.testing.assert_close(steps[name], model.get_parameter(name).grad.sign(), atol=1e-3, rtol=0)


def test_muon_turns_with_the_gradient() -> None:
    """Turning the gradient's rows and columns turns the step alike: it depends on no basis, as AdamW's does."""
    gradient = torch.randn(2, 12, 20, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (12, 20))
    turned = orthogonal((left @ gradient @ right).float()).double()
    torch.testing.assert_close(turned, left @ orthogonal(gradient.float()).double() @ right, atol=1e-4, rtol=0)


def test_muon_decays_weights_apart_and_treats_kernels_as_matrices() -> None:
    model = create_model("resnet_micro")
    with_gradients(model, 0)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for mine, theirs in zip(last.parameters(), model.parameters(), strict=True):
        mine.grad = torch.empty_like(mine).copy_(theirs.grad)
    name = next(name for name, p in model.named_parameters() if p.ndim == 4 and p.shape[2] == 3 and name.startswith("stages.1"))
    weight = model.get_parameter(name).detach().clone()
    plain, decayed = steps_of(copy_with_gradients(model)), steps_of(copy_with_gradients(model), 0.1)
    torch.testing.assert_close(decayed[name], plain[name] + 0.1 * weight)
    values = torch.linalg.svdvals(plain[name].flatten(1)) / (0.2 * max(weight.flatten(1).shape) ** 0.5)
    assert 0.6 < values.min() < values.max() < 1.3
    torch.testing.assert_close(steps_of(last)[name], plain[name], atol=1e-5, rtol=1e-4)


def copy_with_gradients(model: Model) -> Model:
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    return twin


def test_muon_leaves_depthwise_kernels_and_positions_to_adamw() -> None:
    for name in ("cvt_micro", "swin_micro", "mvitv2_micro"):
        groups = optim.parameter_groups(create_model(name), OptimConfig("muon"))
        chosen = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True) if g["parts"]]
        assert len(chosen) > 8
        assert all(p.ndim > 1 and p.shape[1] > 1 for _, p in chosen)
        assert not [n for n, _ in chosen if any(part in n for part in ("head", "table", "rel_", "token"))]


def test_ema_warms_up_and_ends_at_its_decay() -> None:
    model = create_model("resnet_micro")
    ema = optim.build_ema(model, 0.5)
    weight, running = model.stem.conv.weight, model.stem.norm.running_mean
    expected = None
    with torch.no_grad():
        for n in range(12):
            weight.fill_(float(n))
            running.fill_(float(n))
            model.stem.norm.num_batches_tracked.fill_(n)
            ema.update_parameters(model)
            decay = min(0.5, (1 + n) / (10 + n))
            expected = 0.0 if expected is None else decay * expected + (1 - decay) * n
    averaged = ema.module
    assert averaged.stem.conv.weight.flatten()[0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.stem.norm.running_mean[0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.stem.norm.num_batches_tracked.item() == 11


def factors(total: int, warmup: int, **settings: object) -> list[float]:
    config = dataclasses.replace(ScheduleConfig(), **settings)  # type: ignore[arg-type]
    return [schedule.factor(config, step, total, warmup) for step in range(total + 1)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    values = factors(20, 4)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(values) == 1.0


def test_cosine_and_linear_end_at_the_smallest() -> None:
    cosine, linear = factors(20, 4, min_lr=0.1), factors(20, 4, schedule="linear", min_lr=0.1)
    assert cosine[-1] == linear[-1] == pytest.approx(0.1)
    assert cosine[12] == linear[12] == pytest.approx(0.55)
    assert cosine[6] > linear[6]
    assert all(a > b for a, b in itertools.pairwise(cosine[4:]))


def test_step_and_constant() -> None:
    steps = factors(10, 0, schedule="step", milestones=(0.3, 0.6))
    assert steps == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert set(factors(10, 0, schedule="constant")) == {1.0}


def test_lengths() -> None:
    assert schedule.total_steps(ScheduleConfig(epochs=2.5), 10) == 25
    assert schedule.total_steps(ScheduleConfig(epochs=2.5, steps=7), 10) == 7
    assert schedule.total_steps(ScheduleConfig(epochs=0.01), 10) == 1
    assert schedule.warmup_steps(ScheduleConfig(warmup_epochs=2), 10, 100) == 20
    assert schedule.warmup_steps(ScheduleConfig(warmup_epochs=2, warmup_steps=5), 10, 100) == 5
    assert schedule.warmup_steps(ScheduleConfig(warmup_epochs=9), 10, 30) == 10
