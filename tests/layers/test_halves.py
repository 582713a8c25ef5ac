"""Products in half precision by way of float32: as exact as where the CPU has the type, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.awake import awake
from torch import Tensor

from vitrail.cost import autocast
from vitrail.layers import attention, halves
from vitrail.models import MODELS, create_model

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fused attention."""
    return attention._fused(q, k, v, bias, 0.0, 0.3)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((3, 5, 8), (6, 8), (6,))),
    "linear without bias": (F.linear, ((5, 8), (6, 8))),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), ((2, 4, 9, 7), (6, 4, 3, 3), (6,))),
    "grouped convolution": (lambda x, w: F.conv2d(x, w, None, 1, (1, 0), 1, 2), ((2, 4, 6, 6), (6, 2, 3, 1))),
    "convolution padded by name": (lambda x, w: F.conv2d(x, w, padding="same"), ((2, 4, 6, 6), (6, 4, 3, 3))),
    "convolution of clips": (lambda x, w: F.conv3d(x, w, stride=(1, 2, 2), padding=1), ((2, 3, 4, 6, 6), (5, 3, 3, 3, 3))),
    "product": (lambda a, b: a @ b, ((2, 3, 4, 5), (2, 3, 5, 6))),
    "product of repeated factors": (lambda a, b: a @ b, ((2, 1, 4, 5), (3, 5, 6))),
    "product with a vector": (lambda a, b: a @ b, ((4, 5), (5,))),
    "sum by indices": (lambda a, b: torch.einsum("bkhwd,hyd->bkhwy", a, b), ((2, 2, 3, 4, 5), (3, 6, 5))),
    "sum over an index of one factor": (lambda a, b: torch.einsum("abc,cd->ad", a, b), ((2, 3, 4), (4, 5))),
    "sum of one factor": (lambda a: torch.einsum("abc->ca", a), ((2, 3, 4),)),
    "factors by name": (lambda x, w, b: F.linear(bias=b, input=x, weight=w), ((5, 8), (6, 8), (6,))),
    "attention": (attended, ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4))),
    "attention of channels first": (
        lambda *operands: attended(*(x.mT for x in operands)),
        ((2, 2, 4, 5), (2, 2, 4, 6), (2, 2, 4, 6)),
    ),
    "attention of channels first with a bias": (
        lambda q, k, v, bias: attended(q.mT, k.mT, v.mT, bias.detach().mT) + 0 * bias.sum(),
        ((2, 2, 4, 5), (2, 2, 4, 6), (2, 2, 4, 6), (2, 1, 6, 5)),
    ),
    "attention to nothing": (attended, ((2, 2, 5, 4), (2, 2, 0, 4), (2, 2, 0, 4))),
    "attention of wider values": (attended, ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 8))),
    "attention with a bias that learns": (attended, ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4), (1, 2, 5, 6))),
    "attention with a bias": (
        lambda q, k, v, bias: attended(q, k, v, bias.detach()) + 0 * bias.sum(),
        ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4), (1, 2, 5, 6)),
    ),
}  # fmt: skip


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this CPU had no half-precision type."""
    monkeypatch.setattr(halves, "LACKING", frozenset(HALVES))


def ulp(dtype: torch.dtype) -> float:
    """Half a unit in the last place, relative."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.usefixtures("lacking")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_rounded_operands(name: str, dtype: torch.dtype) -> None:
    function, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    operands = [torch.randn(shape).requires_grad_() for shape in shapes]
    with torch.autocast("cpu", dtype), halves.half_products(dtype, "cpu"):
        found = function(*operands)
    exact_operands = [x.detach().to(dtype).double().requires_grad_() for x in operands]
    exact = function(*exact_operands)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ulp(dtype), atol=1e-5)
    seed = torch.randn(found.shape).to(dtype)
    found.backward(seed)
    exact.backward(seed.double())
    for x, wanted in zip(operands, exact_operands, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=1.01 * ulp(dtype), atol=1e-5)


@pytest.mark.usefixtures("lacking")
def test_what_a_gradient_needs_is_kept_in_half_precision() -> None:
    kept: list[torch.dtype] = []
    x, w, kernel = torch.randn(2, 8, 8, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t)
    with keeping, torch.autocast("cpu", torch.bfloat16), halves.half_products(torch.bfloat16, "cpu"):
        F.conv2d(F.linear(x, w), kernel) @ w[:6, :6]
    assert kept == [torch.bfloat16] * 6


@pytest.mark.usefixtures("lacking")
def test_float32_and_float64_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_multiply", None)
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with halves.half_products(torch.bfloat16, "cpu"):
        assert F.linear(x, w).dtype == torch.float32  # without autocast
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x.double(), w.double()).dtype == torch.float64
            assert (torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64)).dtype == torch.int64
            with torch.autocast("cpu", enabled=False):
                assert (x @ w.T).dtype == torch.float32


def test_a_cpu_that_has_the_type_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "LACKING", frozenset())
    monkeypatch.setattr(halves, "_multiply", None)
    with autocast(CPU, "bf16"):
        assert F.linear(torch.randn(3, 4), torch.randn(5, 4)).dtype == torch.bfloat16


def answer(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of their squares as one vector, in float64."""
    logits = model(x)
    logits.double().square().sum().backward()
    return logits.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [name for name in MODELS if "_micro" in name])
def test_every_family_is_as_exact_as_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = awake(create_model(name, num_classes=5))
    x = torch.randn(4, *model.input_shape)
    exact = answer(copy.deepcopy(model).double(), x.double())

    def errors(lacking: frozenset[torch.dtype]) -> list[float]:
        monkeypatch.setattr(halves, "LACKING", lacking)
        with autocast(CPU, "bf16"):
            found = answer(copy.deepcopy(model), x)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    native, ours = errors(frozenset()), errors(frozenset(HALVES))
    assert 1e-4 < native[0] < 0.1
    assert all(mine <= 1.5 * torchs for mine, torchs in zip(ours, native, strict=True)), (ours, native)


@pytest.mark.usefixtures("lacking")
def test_checkpointed_blocks_are_computed_again_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[Any] = []
    multiply = halves._multiply
    monkeypatch.setattr(halves, "_multiply", lambda *args, **kwargs: products.append(0) or multiply(*args, **kwargs))
    model = create_model("vit_micro_patch4_16")
    torch.nn.init.normal_(model.head.linear.weight)
    x, counts, gradients = torch.randn(2, *model.input_shape), [], []
    for on in (False, True):
        products.clear()
        model.zero_grad()
        model.set_checkpointing(on)
        with autocast(CPU, "bf16"):
            logits = model(x)
        logits.float().square().sum().backward()
        counts.append(len(products))
        gradients.append([p.grad.clone() for p in model.parameters()])
    within_blocks = counts[0] - 2  # the patches' and the head's are not repeated
    assert counts[1] == counts[0] + within_blocks
    assert all(map(torch.equal, *gradients))


COMPILED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from vitrail.cost import autocast
from vitrail.layers import halves
from vitrail.models import create_model

halves.LACKING = frozenset((torch.bfloat16,))
torch.manual_seed(0)
model = create_model("vit_micro_patch4_16", depth=1)
torch.nn.init.normal_(model.head.linear.weight)
x = torch.randn(2, *model.input_shape)
products = []

def look(graph, inputs):
    for node in graph.graph.nodes:
        if any(word in str(node.target) for word in ("mm", "convolution", "attention")):
            products.append((str(node.target), {a.meta["val"].dtype for a in node.all_input_nodes if "val" in a.meta}))
    return graph

def gradients(f):
    model.zero_grad()
    with autocast(torch.device("cpu"), "bf16"):
        logits = f(x)
    logits.float().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

eager, traced = gradients(model), gradients(torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=look)))
assert float((eager - traced).norm() / eager.norm()) < 0.02
halved = [product for product in products if torch.bfloat16 in product[1]]
print(len(products), "products", halved)
"""


def test_compiled_products_go_by_float32_in_both_directions(run_python: Callable[..., str]) -> None:
    said = run_python(COMPILED)
    assert "products []" in said
    assert int(said.split()[0]) >= 16
