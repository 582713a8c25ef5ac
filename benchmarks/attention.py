"""Which attention kernel is fast where: `python -m benchmarks.attention`. The rule in layers/attention.py rests on this table.

Both kernels of `attend` on the same operands, laid out as a model lays them out (views of one fused projection), alternating;
ratio = seconds of batched products around a softmax / seconds of scaled_dot_product_attention: above 1 the fused kernel wins.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.results import bootstrap_interval, machine, merge
from vitrail.layers import attention
from vitrail.layers.attention import AttentionSite, attend

SHAPES = ((64, 26, 4), (16, 50, 12), (16, 197, 3), (8, 197, 12), (4, 577, 6), (2, 1025, 6))  # batch, tokens, heads of 64


def one(fused: bool, training: bool, packed: Tensor, heads: int) -> Callable[[], float]:
    """A step through one kernel: forward, and backward when training; returns its seconds."""
    site = AttentionSite()
    b, n, c = packed.shape

    def step() -> float:
        attention._prefers_fused = lambda *_: fused  # type: ignore[assignment]
        x = packed.detach().requires_grad_(training)
        start = time.perf_counter()
        q, k, v = x.view(b, n, 3, heads, c // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(q, k, v, site=site).transpose(1, 2).reshape(b, n, c // 3)
        if training:
            out.backward(out.detach())
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Measure every shape, precision and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    kind = f"{arguments.device}-amx" if arguments.device == "cpu" and attention._AMX else arguments.device
    for dtype in (torch.float32, torch.bfloat16):
        for training in (False, True):
            for b, n, heads in SHAPES:
                packed = torch.randn(b, n, 3 * 64 * heads, device=arguments.device, dtype=dtype)
                fused, plain = one(True, training, packed, heads), one(False, training, packed, heads)
                with torch.set_grad_enabled(training):
                    pairs = [(plain(), fused()) for _ in range(arguments.pairs + 2)][2:]
                ratios = [a / b for a, b in pairs]
                low, high = bootstrap_interval(ratios)
                task, precision = "train" if training else "infer", "fp32" if dtype == torch.float32 else "bf16"
                row = {"ratio": statistics.median(ratios), "low": low, "high": high, "pairs": arguments.pairs}
                cell = f"{precision} {task} batch {b} tokens {n} heads {heads}"
                merge(f"attention-{kind}", cell, row, machine(arguments.device, ("torch",)))
                print(f"{cell:42s} {row['ratio']:.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
