"""On a CUDA device: the golden cases in float32, the error of bfloat16, compilation, resuming."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from tests import golden

from vitrail.checkpoints import load_model
from vitrail.training.interrupt import Stopped
from vitrail.training.loop import train
from vitrail.training.objectives import Classify

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


class StopsAtStep(Classify):
    """Cross-entropy that asks the run to stop, as Ctrl-C does, at its `number`-th call."""

    number = 0

    def forward(self, model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        self.number -= 1
        if self.number == 0:
            signal.raise_signal(signal.SIGINT)
        return super().forward(model, images, targets)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume(tmp_path: Path, precision: str) -> None:
    pixels = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = [(image // (1 + i % 3), i % 3) for i, image in enumerate(pixels)]
    settings = {
        "model": "vit_micro_patch4_16", "overrides": {"depth": 2, "dropout": 0.1, "drop_path": 0.2}, "batch_size": 16,
        "accumulate": 2, "steps": 9, "ema": 0.9, "mixup": 0.4, "device": "cuda", "precision": precision, "val_fraction": 0.0,
    }  # fmt: skip
    whole = train(data=data, out=str(tmp_path / "whole"), **settings)
    stopping = StopsAtStep()
    stopping.number = 10
    with pytest.raises(Stopped):
        train(data=data, out=str(tmp_path / "parts"), objective=stopping, **settings)
    resumed = train(data=data, resume=tmp_path / "parts")
    for name, value in whole.model.state_dict().items():  # the order of sums on a GPU may differ between runs
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
