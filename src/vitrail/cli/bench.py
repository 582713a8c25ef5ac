"""`vitrail bench`: speed and memory of one model on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vitrail.cli.parse import parse

if TYPE_CHECKING:
    import torch

    from vitrail.models import Model

EXAMPLES = """\
vitrail bench vit_small_patch16_224
vitrail bench resnet50 --precision bf16 --batch-size 32 --train
vitrail bench vit_base_patch16_224 --image-size 384 --compile --json
vitrail bench runs/photos-vit_tiny_patch16_224                        a trained model"""

WARM_UP, MIN_RUNS, SINGLES = 2, 5, 30


@dataclass(frozen=True)
class Arguments:
    """Measure throughput, latency and memory of one model here, beside its FLOPs and this machine's own peak."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A name that `vitrail models` lists, or a checkpoint or run directory."""
    image_size: tuple[int, int] | None = None  # height,width in pixels; by default the model's own
    batch_size: int = 32  # pictures or clips at once, for the throughput
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the fast one of this device
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    compile: bool = False  # torch.compile; compiling is not counted
    train: bool = False  # measure a training step too: forward, backward and AdamW
    seconds: float = 3.0  # to measure each rate for, at least
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings of the model family, shown by `vitrail models NAME`."""
    json: bool = False  # print JSON


def run(words: Sequence[str]) -> None:
    """Measure and print."""
    arguments = parse(Arguments, words, prog="vitrail bench", examples=EXAMPLES)
    from vitrail.cli import show

    result = measure(arguments)
    if arguments.json:
        show.as_json(result)
        return
    for title, part in result.items():
        show.pairs(part, title)


def measure(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """All figures by section; rates are medians over repeated runs."""
    import torch

    from vitrail import cost

    device = cost.pick_device(arguments.device)
    precision = cost.pick_precision(arguments.precision, device)
    before = cost.resident_peak()
    model = open_model(arguments).to(device)
    flops, peak = cost.count_flops(model), cost.matmul_peak(device, precision)
    shape, word = model.input_shape, "clip" if model.takes_clips else "picture"
    result: dict[str, dict[str, Any]] = {
        "Model": {
            "name": model.name or arguments.model,
            "input": " x ".join(map(str, shape)),
            "parameters": f"{cost.count_parameters(model):,}",
            f"GFLOPs per {word}": flops / 1e9,
        },
        "Machine": {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "precision": precision,
            "compiled": arguments.compile,
            "measured peak (TFLOP/s)": peak / 1e12,
        },
    }
    if slow := cost.slow_precision(device, precision):
        result["Machine"]["note"] = slow
    runner = torch.compile(model) if arguments.compile else model
    inputs = torch.randn(arguments.batch_size, *shape, device=device)

    def infer(x: torch.Tensor) -> None:
        with torch.inference_mode(), cost.autocast(device, precision):
            runner(x)
        cost.synchronise(device)

    model.eval()
    per_batch = statistics.median(timed(lambda: infer(inputs), arguments.seconds))
    singles = sorted(timed(lambda: infer(inputs[:1]), arguments.seconds, SINGLES))
    result["Inference"] = {
        f"{word}s/s (batch {arguments.batch_size})": arguments.batch_size / per_batch,
        "of the peak": percent(flops * arguments.batch_size / per_batch / peak),
        "latency p50 (ms)": 1e3 * statistics.median(singles),
        "latency p95 (ms)": 1e3 * singles[int(0.95 * (len(singles) - 1))],
        "memory": memory(device, before),
    }
    if arguments.train:
        step = training_step(model, runner, inputs, precision)
        per_step = statistics.median(timed(step, arguments.seconds))
        result["Training"] = {
            f"{word}s/s (batch {arguments.batch_size})": arguments.batch_size / per_step,
            "of the peak": percent(3 * flops * arguments.batch_size / per_step / peak),
            "step (ms)": 1e3 * per_step,
            "memory": memory(device, before),
        }
    return result


def open_model(arguments: Arguments) -> Model:
    """A registered model with random weights, or the one in a checkpoint."""
    from pathlib import Path

    from vitrail.checkpoints import load_model
    from vitrail.config import replace_dotted
    from vitrail.models import MODELS, build, create_model

    size: dict[str, Any] = {} if arguments.image_size is None else {"image_size": arguments.image_size}
    if arguments.model in MODELS or not Path(arguments.model).exists():
        if arguments.model not in MODELS:
            return create_model(arguments.model)  # raises, naming the nearest models
        return build(replace_dotted(MODELS[arguments.model], {**arguments.overrides, **size}), arguments.model)
    return load_model(arguments.model, **arguments.overrides, **size)


def training_step(model: Model, runner: Any, images: torch.Tensor, precision: str) -> Callable[[], None]:
    """One optimiser step on a fixed random batch, as training does it."""
    import torch

    from vitrail import cost

    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=images.device.type != "mps")
    targets = torch.randint(model.config.num_classes, (len(images),), device=images.device)

    def step() -> None:
        with cost.autocast(images.device, precision):
            loss = torch.nn.functional.cross_entropy(runner(images).float(), targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        cost.synchronise(images.device)

    return step


def timed(work: Callable[[], None], seconds: float, least: int = MIN_RUNS) -> list[float]:
    """Seconds of each run, for `seconds` and at least `least` runs, after a warm-up."""
    for _ in range(WARM_UP):
        work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def memory(device: torch.device, before: int) -> str:
    """Peak memory: the allocator's on CUDA, elsewhere the growth of the process since before the model was built."""
    import torch

    from vitrail import cost

    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else cost.resident_peak() - before
    return f"{used / 2**20:,.0f} MiB"


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return f"{100 * share:.0f} %"
