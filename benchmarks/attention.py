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

from benchmarks.results import bootstrap_interval, kind_of, machine, merge
from vitrail.layers import attention
from vitrail.layers.attention import AttentionSite, attend

SHAPES = (  # batch, tokens, heads, their width: narrow models, windows, attention over time, whole pictures
    (64, 25, 4, 16), (512, 8, 4, 16), (128, 64, 4, 16), (256, 49, 3, 32), (392, 8, 12, 64),
    (64, 26, 4, 64), (16, 50, 12, 64), (16, 197, 3, 64), (8, 197, 12, 64), (4, 577, 6, 64), (2, 1025, 6, 64),
)  # fmt: skip


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
    parser.add_argument("--precisions", nargs="+", default=("fp32", "bf16"), choices=("fp32", "bf16"))
    arguments = parser.parse_args()
    for precision in arguments.precisions:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        for training in (False, True):
            for b, n, heads, width in SHAPES:
                packed = torch.randn(b, n, 3 * width * heads, device=arguments.device, dtype=dtype)
                fused, plain = one(True, training, packed, heads), one(False, training, packed, heads)
                with torch.set_grad_enabled(training):
                    pairs = [(plain(), fused()) for _ in range(arguments.pairs + 2)][2:]
                ratios = [a / b for a, b in pairs]
                low, high = bootstrap_interval(ratios)
                task = "train" if training else "infer"
                row = {"ratio": statistics.median(ratios), "low": low, "high": high, "pairs": arguments.pairs}
                cell = f"{precision} {task} batch {b} tokens {n} heads {heads}" + (f" of {width}" if width != 64 else "")
                merge(f"attention-{kind_of(arguments.device)}", cell, row, machine(arguments.device, ("torch",)))
                print(f"{cell:42s} {row['ratio']:.2f} [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
