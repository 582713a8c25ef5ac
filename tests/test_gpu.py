"""On a CUDA device: the golden cases in float32, the error of bfloat16, compilation."""

from __future__ import annotations

import pytest
import torch
from tests import golden

from vitrail.checkpoints import load_model

pytestmark = pytest.mark.gpu

CASES = {
    "timm_vit_tinycfg_cls": {"heads": 4}, "timm_vit_tinycfg_eps": {"heads": 4}, "hf_vit_tinycfg_eps": {"heads": 4},
    "tv_vit_tinycfg": {"heads": 4}, "timm_vit_tiny_patch16_224": {}, "timm_vit_base_patch16_224": {},
    "hf_vit_base_patch16_224": {}, "timm_vit_base_patch16_224_dynamic_192x256": {}, "tv_vit_b_32": {}, "tv_resnet50": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def answers(case_id: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    case = golden.manifest()[case_id]
    model = load_model(golden.state(case), quiet=True, **CASES[case_id]).cuda()
    return model, golden.inputs(case).cuda(), golden.outputs(case)["logits"].cuda()


@pytest.mark.parametrize("case_id", CASES)
def test_golden_cases(case_id: str) -> None:
    model, x, want = answers(case_id)
    with torch.inference_mode():
        assert (model(x) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("case_id", ["timm_vit_base_patch16_224", "tv_resnet50"])
def test_bfloat16_stays_close(case_id: str) -> None:
    model, x, want = answers(case_id)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        got = model(x).float()
    assert (got - want).norm() <= 0.02 * want.norm()


COMPILED = """
import sys, torch
from tests import golden
from vitrail.checkpoints import load_model

case = golden.manifest()["timm_vit_tiny_patch16_224"]
model, x = load_model(golden.state(case), quiet=True).cuda(), golden.inputs(case).cuda()
with torch.inference_mode():
    want = model(x)
    got = torch.compile(model, fullgraph=True)(x)
assert (got - want).abs().max() <= 1e-4 * want.abs().max()
print("same function")
"""


def test_compiled(run_python) -> None:
    assert "same function" in run_python(COMPILED)
