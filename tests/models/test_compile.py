"""torch.compile takes every family in one graph, in a process without the type checks, which would break it."""

from __future__ import annotations

import pytest

from vitrail.models import MODELS

FULL_GRAPH = """
import sys, torch
from tests.awake import awake
from vitrail.layers.attention import attention_sites, record_attention
from vitrail.models import MODELS, create_model

torch.set_num_threads(1)
name = sys.argv[1]
torch.manual_seed(0)
# One block where all are alike: each is traced anew, for seconds.
model = awake(create_model(name, depth=1) if hasattr(MODELS[name], "depth") else create_model(name))
x = torch.randn(2, *model.input_shape)
traced = torch.compile(model, fullgraph=True, backend="aot_eager")  # forward and backward as one graph each
traced(x).square().sum().backward()
got = {n: p.grad.clone() for n, p in model.named_parameters()}
model.zero_grad()
model(x).square().sum().backward()
for n, p in model.named_parameters():
    torch.testing.assert_close(got[n], p.grad, atol=2e-4, rtol=2e-3, msg=n)

model.eval()
compiled = torch.compile(model, fullgraph=True, backend=sys.argv[2])
with torch.inference_mode():
    torch.testing.assert_close(compiled(x), model(x), atol=2e-5, rtol=1e-4)
    if sites := attention_sites(model):
        with record_attention(compiled) as maps:
            compiled(x)
        assert set(maps) == set(sites), list(maps)
        for weights in maps.values():
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
print("same function")
"""


@pytest.mark.parametrize("name", [name for name in MODELS if "_micro" in name])
def test_compiles_to_a_full_graph(name: str, run_python) -> None:
    assert "same function" in run_python(FULL_GRAPH, name, "eager")


@pytest.mark.compiler
def test_compiles_to_machine_code(run_python) -> None:
    assert "same function" in run_python(FULL_GRAPH, "vit_micro_patch4_16", "inductor")
