"""What a model costs and what this machine can do: FLOPs, memory forecasts, devices, measured matrix-product peaks.

FLOPs and memory are found by running the model on tensors without storage, so no weight is read and nothing large is
allocated. Imports torch and models only.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vitrail.layers.halves import LACKING, by_float32, half_products
from vitrail.models import Model
from vitrail.models.pretext import Pretext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAST_BF16 = 1.5  # bf16 counts as fast where its matrix products run at this multiple of float32's
STATES = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 1}  # tensors of the size of (nearly all) weights that an optimiser keeps


def pick_device(name: str = "auto") -> torch.device:
    """The device of a setting: auto (an accelerator if there is one), cpu, cuda, cuda:N or mps.

    Raises ValueError for a device that this machine does not have or a name that does not exist.
    """
    found = ["cpu"]
    if torch.cuda.is_available():
        found = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), *found]
    if torch.backends.mps.is_available():
        found.insert(0, "mps")
    if name == "auto":
        return torch.device(found[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in found:
        raise ValueError(f"device {name!r} is not here; this machine has: {', '.join(found)} (or say auto)")
    return torch.device(wanted)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for a setting; "auto" is bf16 where the device computes it natively and fast, else fp32.

    On a CPU "fast" is measured (see `matmul_peak`): many emulate bf16.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"precision {name!r} does not exist; valid: auto, {', '.join(DTYPES)}")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and matmul_peak(device, "bf16") > FAST_BF16 * matmul_peak(device, "fp32"):
        return "bf16"
    return "fp32"


def slow_precision(device: torch.device, precision: str) -> str:
    """What to know of a precision that a CPU emulates, slower than fp32; else nothing."""
    if device.type != "cpu" or precision == "fp32":
        return ""
    slower = matmul_peak(device, "fp32") / matmul_peak(device, precision)
    if slower < 1.1:
        return ""
    return f"this CPU emulates {precision}: its matrix products take {slower:.2g} times as long as those of --precision fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context that computes in `precision`; weights stay float32. For a CPU that lacks the type see `layers.halves`."""
    if precision == "fp32":
        return nullcontext()
    return _half_precision(device.type, DTYPES[precision])


@contextmanager
def _half_precision(device: str, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(device, dtype), half_products(dtype, device):
        yield


def memory_format(model: nn.Module, precision: str = "fp32") -> torch.memory_format:
    """The layout of inputs and weights that a model runs fastest in: channels last where convolutions hold most weights.

    But not for float32, or a type that goes by it, on a CPU where there are group norms, which torch then sums plainly (for
    batch normalisation see `layers.norm`). Nor for such clips on a CPU, where it gains nothing; in bfloat16 SlowFast answers
    1.4 times as fast (measured on AVX512-BF16).
    """
    by_float32 = precision == "fp32" or DTYPES[precision] in LACKING
    plainly = by_float32 and next(model.parameters()).device.type == "cpu"
    grouped = any(isinstance(module, nn.GroupNorm) for module in model.modules())
    for kind, layout in ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)):
        convolved = sum(m.weight.numel() for m in model.modules() if isinstance(m, kind))
        if 2 * convolved > count_parameters(model):
            return torch.contiguous_format if plainly and (grouped or kind is nn.Conv3d) else layout
    return torch.contiguous_format


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of parameters, or of those that receive a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_flops(model: Model | Pretext, shape: tuple[int, ...] | None = None) -> int:
    """FLOPs of one forward pass of one input of `shape`, without the batch (default: the model's `input_shape`).

    A multiply-add counts as 2; matrix products, convolutions and attention count, element-wise work does not (the convention
    of torch.utils.flop_counter). Half of it is what papers print as "GFLOPs" (GMACs).
    """
    counter = _Products()
    with _pretended(model, torch.device("meta")) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        forward(torch.empty(1, *(shape or model.input_shape)))
    return counter.flops


class _Products(TorchDispatchMode):
    """Adds up the FLOPs of what runs, quicker than FlopCounterMode, which also follows the modules.

    Norms, softmax and activations cost nothing by the convention, but finding their shapes takes most of the time on the meta
    device, milliseconds each, as it does for a product with a bias: here their shapes are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operation = kwargs or {}, func._overloadpacket
        if operation in _SHAPED_LIKE_THE_INPUT:
            like = torch.empty_like(args[0])
            return (like, like, like) if operation in _WITH_STATISTICS else like  # which only gradients need
        if operation is torch.ops.aten.addmm:
            out = args[1].new_empty(args[1].shape[0], args[2].shape[1])
        else:
            out = func(*args, **kwargs)
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=out)
        return out


_WITH_STATISTICS = {torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm, torch.ops.aten.native_batch_norm}
_SHAPED_LIKE_THE_INPUT = {
    *_WITH_STATISTICS, torch.ops.aten._softmax, torch.ops.aten._safe_softmax, torch.ops.aten.gelu, torch.ops.aten.silu,
}  # fmt: skip


def flops_by_part(model: Model) -> dict[str, int]:
    """FLOPs of one forward pass by the model's direct children, as `count_flops` counts; children without any are left out."""
    counter = FlopCounterMode(display=False)
    with _pretended(model, torch.device("meta")) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        forward(torch.empty(1, *model.input_shape))
    found: dict[str, int] = {}
    for where, counts in counter.get_flop_counts().items():
        path = where.split(".")[1:]  # after the model's class
        in_list = len(path) == 2 and path[1].isdigit() and isinstance(model.get_submodule(path[0]), nn.ModuleList)
        if len(path) == 1 or in_list:
            found[path[0]] = found.get(path[0], 0) + sum(counts.values())
    return found


@dataclass(frozen=True)
class Memory:
    """A forecast in bytes. Activations are the highest sum of tensors alive at a time beside the other four."""

    parameters: int  # and buffers
    gradients: int
    optimiser: int
    averaged: int  # the moving average of the weights
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.gradients + self.optimiser + self.averaged + self.activations


def forecast_memory(
    model: Model | Pretext,
    batch_size: int,
    *,
    shape: tuple[int, ...] | None = None,
    training: bool = True,
    precision: str = "fp32",
    optimizer: str = "adamw",
    ema: bool = False,
) -> Memory:
    """Memory of one training micro-step (or of inference) with `batch_size` inputs of `shape`, whatever device it will run on.

    The step is run on tensors without storage, in the model's own kernels on the CPU, with activation checkpointing if the
    model has it switched on. The allocator's fragmentation, kernels' workspaces and the loader come on top.
    """
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) if training else 0
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # says "cpu", so that kernels are chosen as they will be
    with _pretended(model, fake, training) as forward, torch.set_grad_enabled(training):
        images = torch.empty(batch_size, *(shape or model.input_shape))
        with _LiveBytes() as live:
            with autocast(torch.device("cpu"), precision):
                answer = forward(images)
            if training:
                _loss(answer).backward()
        activations = images.numel() * images.element_size() + max(live.peak - trained, 0)
    return Memory(
        parameters=weights,
        gradients=trained,
        optimiser=trained * STATES[optimizer],
        averaged=weights if ema else 0,
        activations=activations,
    )


def _loss(answer: Tensor | dict[str, Tensor]) -> Tensor:
    """That of a classifier's logits, or the one that comes with the answer."""
    if isinstance(answer, dict):
        return answer["loss"]
    return torch.nn.functional.cross_entropy(answer.float(), torch.zeros(len(answer), dtype=torch.long))


@contextmanager
def _pretended(model: Model | Pretext, world: AbstractContextManager[Any], training: bool = False) -> Iterator[Any]:
    """A function input -> output that runs the model on tensors that have shapes but no storage, as all are that are made in
    `world`; the model is not touched."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        with world:
            state = {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers()}
            for name, p in model.named_parameters():
                state[name] = torch.empty(p.shape, dtype=p.dtype, requires_grad=training and p.requires_grad)
            yield lambda x: functional_call(model, state, (x,))
    finally:
        for module, mode in modes.items():
            module.training = mode


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations create; `peak` is the largest sum of bytes alive at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, nbytes: int) -> None:
        self.now -= nbytes


def matmul_peak(device: torch.device | str = "cpu", precision: str = "fp32", *, refresh: bool = False) -> float:
    """The best rate of square matrix products measured on this machine, in FLOP/s, with torch's current thread count.

    Takes a fraction of a second the first time; kept in the process and in the user's cache directory per processor, torch
    version, thread count and precision. `refresh` measures again and keeps the better: what was measured while other programs
    ran is too low, and nothing makes it too high.
    """
    device = torch.device(device)
    way = ", by fp32" if device.type == "cpu" and DTYPES[precision] in LACKING else ", a b.T"
    key = "|".join((_device_name(device), torch.__version__, f"{torch.get_num_threads()} threads", precision + way))
    if refresh or key not in _peaks():
        _peaks()[key] = max(_measure_peak(device, DTYPES[precision]), _peaks().get(key, 0.0))
        _keep_peaks()
    return _peaks()[key]


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Grow the product until one takes 20 ms on a CPU (or fills an accelerator), then take the best of repeated runs.

    The second factor is transposed, as the weights of a linear layer are. A type that the CPU lacks goes by float32.
    """
    best, size, largest = 0.0, 256, 2048 if device.type == "cpu" else 8192
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product: Callable[[], Tensor] = partial(torch.mm, a, b.T, out=torch.empty_like(a))
        if device.type == "cpu" and dtype in LACKING:
            product = partial(by_float32, torch.mm, dtype, a, b.T)
        product()
        fastest = min(_seconds(product, device) for _ in range(8 if size >= 1024 else 3))
        best = max(best, 2 * size**3 / fastest)
        if size >= largest or fastest > 0.02:
            return best
        size *= 2


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    product()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; returns at once on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def resident_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.node()} {processor()} x{os.cpu_count()} {device.type}"


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitrail" / "peaks.json"


@cache
def _peaks() -> dict[str, float]:
    """Known peaks by key, read once from the cache file; an unreadable file only costs measuring again."""
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in content.items() if float(value) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep_peaks() -> None:
    """Write the cache file as a whole; a home that cannot be written only costs measuring again."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(_peaks(), file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return
