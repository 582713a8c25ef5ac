"""How exact ResNet-50's gradient is in each memory format: `python -m benchmarks.layout`. `cost.memory_format` rests on it.

Relative error against float64 of the gradient as a whole, for several weights and inputs drawn from seeds.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import ours
from benchmarks.results import machine, merge

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def gradient(x: Tensor, y: Tensor, layout: torch.memory_format) -> Tensor:
    """The gradient of the cross-entropy in the type of `x`, as one float64 vector."""
    model = ours("resnet50").model.to(x.dtype).to(memory_format=layout).train()
    F.cross_entropy(model(x.contiguous(memory_format=layout)), y).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """Measure both formats on the same batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for seed in range(arguments.batches):
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 3, 224, 224, generator=draw), torch.randint(1000, (8,), generator=draw)
        exact = gradient(x.double(), y, torch.contiguous_format)
        for name, layout in LAYOUTS.items():
            found[name].append(float((gradient(x, y, layout) - exact).norm() / exact.norm()))
    for name, errors in found.items():
        row = {"error": statistics.median(errors), "lowest": min(errors), "highest": max(errors), "batches": len(errors)}
        merge("layout-cpu", f"resnet50 gradient fp32 {name}", row, machine("cpu", ("torch",)))
        print(f"{name:14s} {row['error']:.2e} [{row['lowest']:.2e}, {row['highest']:.2e}]", flush=True)


if __name__ == "__main__":
    main()
