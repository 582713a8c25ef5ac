from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitrail.layers import norm as norm_layer
from vitrail.layers.norm import normalise


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_layer, "MANY", 1)


def innermost(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def outcome(norm: nn.Module, call: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Everything that a training step sees of a normalisation, of two batches in a row."""
    x = x.detach().requires_grad_()
    call(norm, x.detach() * 2)
    y = call(norm, x)
    y.backward(grad)
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad, **dict(norm.named_buffers())}
    return {**found, **{name: p.grad for name, p in norm.named_parameters() if p.grad is not None}}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {name: float((found[name].double() - wanted[name]).norm() / wanted[name].double().norm()) for name in wanted}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(2, 8, 16, 48, 48), (3, 5, 7, 7), (1, 3, 6, 1, 1), (2, 24, 5, 9, 11), (4, 64, 20, 20)])
def test_values_statistics_and_gradients_are_torchs(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(shape[1], momentum=momentum)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x, grad = torch.randn(shape) + 3, torch.randn(shape)
    exact = outcome(copy.deepcopy(norm).double(), nn.Module.__call__, x.double(), grad.double())
    found = errors(outcome(norm, normalise, innermost(x), innermost(grad)), exact)
    assert max(found.values()) < 1e-5, found


def test_sums_of_many_values_stay_exact() -> None:
    """Where torch's own, channels innermost, lose three digits."""
    torch.manual_seed(0)
    x, grad = innermost(torch.randn(1, 8, 32, 96, 96) + 0.5), innermost(torch.randn(1, 8, 32, 96, 96))
    exact = outcome(nn.BatchNorm3d(8).double(), nn.Module.__call__, x.double(), grad.double())
    ours = errors(outcome(nn.BatchNorm3d(8), normalise, x, grad), exact)
    plain = errors(outcome(nn.BatchNorm3d(8), nn.Module.__call__, x, grad), exact)
    assert ours["y"] < 5e-7
    assert ours["x"] < 5e-7
    assert ours["weight"] < 1e-5
    assert plain["y"] > 10 * ours["y"], "torch has become exact: normalise() can go"


def test_frozen_weights_evaluation_and_other_layouts_go_as_ever() -> None:
    torch.manual_seed(0)
    x = innermost(torch.randn(2, 6, 9, 9))
    norm = nn.BatchNorm2d(6).requires_grad_(False)
    x.requires_grad_()
    normalise(norm, x).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
    norm.eval()
    assert torch.equal(normalise(norm, x), norm(x))
    norm.train()
    for plain in (torch.randn(2, 6, 9, 9), x.bfloat16(), x.double()):
        one, other = copy.deepcopy(norm).to(plain.dtype), copy.deepcopy(norm).to(plain.dtype)
        assert torch.equal(normalise(one, plain), other(plain))
    bare = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    assert torch.equal(normalise(bare, x), bare(x))
    untracked = nn.BatchNorm2d(6, track_running_stats=False)
    torch.testing.assert_close(normalise(untracked, x), untracked(x))
    with pytest.raises(ValueError, match="more than 1 value"):
        normalise(norm, torch.randn(1, 6, 1, 1))


def test_traced_it_is_torchs_own() -> None:
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(4), innermost(torch.randn(2, 4, 6, 6))
    program = torch.export.export(Wrapped(norm), (x,))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), normalise(copy.deepcopy(norm), x))


class Wrapped(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, x)
