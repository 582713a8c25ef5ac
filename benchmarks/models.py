"""Models side by side with peers (timm, torchvision, ...): `python -m benchmarks.models [--only vit_tiny] [--list]`.

A cell is (model, task, precision, mode). Both sides carry the same weights, read through our own checkpoint tables, and use
the same threads, batch, memory format, precision, loss, optimiser class and flags; for inference ours is folded as our
predictor folds it (batch normalisation into convolutions), which no peer does by itself. bfloat16 is torch's autocast, ours
with what our training adds to it on CPUs that lack the type (`vitrail.layers.halves`). Before timing, logits (and
gradients, when training) are compared with float64: our error may be at most 1.5 times the peer's, on the batch that is timed
or, should rounding have turned a maximum or a ReLU over there, on both of two others; else the row is void. Then
steps of both sides alternate; what is reported is the median of the pairwise ratios peer / ours with its 95 % bootstrap
interval (above 1: ours is faster), against each peer. A cell passes when the upper end of the interval against the fastest
peer is at least 1.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import re
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import bootstrap_interval, kind_of, machine, merge
from vitrail import cost
from vitrail.checkpoints.mapping import write
from vitrail.checkpoints.store import SOURCES, load_model
from vitrail.cost import count_flops, matmul_peak, memory_format
from vitrail.inference.engines import fold_batchnorm
from vitrail.models import Model, create_model

BATCH = {"vit_tiny_patch16_224": 16, "vit_small_patch16_224": 8, "vit_base_patch16_224": 4, "resnet50": 8,
         "deit_small_distilled_patch16_224": 8, "resnetv2_50x1_bit": 8, "vit_base_r50_s16_224": 4,
         "cvt_13": 8, "swin_tiny_patch4_window7_224": 8, "mvitv2_tiny": 8, "mvit_base_16x4": 1,
         "mvitv2_small_16x4": 1, "vivit_base_16x2": 1, "timesformer_base_divided_8x224": 1,
         "x3d_s": 2, "slowfast_r50_8x8": 2}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # where the peer computes other than the authors
    "cvt_13": {"activation": "gelu"}, "x3d_s": {"plain_shortcut": True}, "slowfast_r50_8x8": {"slow_frames": "linspace"},
}  # fmt: skip
TASKS, PRECISIONS, MODES = ("infer", "train"), ("fp32", "bf16"), ("eager", "compiled")
ERROR_LIMIT = 1.5
LONG = 5.0  # seconds of a step that needs no warming up
PEER_ERRORS: dict[tuple[str, ...], float] = {}  # by model, task, precision, peer and batch: a compiled row has the eager one's


@dataclass
class Side:
    """One contestant: the model, how to call it for logits, and its own steps."""

    name: str
    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    layouts: dict[str, torch.memory_format] = field(default_factory=dict)  # by precision, where a peer is faster in another

    def arrange(self, precision: str) -> torch.memory_format:
        """Bring the weights into the layout of a precision, which the input should have too."""
        layout = self.layouts.get(precision, memory_format(self.model, precision))
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        return layout


def ours(name: str) -> Side:
    """Our model with seeded random weights of a realistic scale, the head included."""
    torch.manual_seed(0)
    model = create_model(name, **SETTINGS.get(name, {}))
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.02)
    for name, module in model.named_modules():  # small last gains, as in trained networks: else rounding errors explode
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.1, 0.3) if "conv3" in name else nn.init.uniform_(module.weight, 0.5, 1.0)
    return Side("vitrail", model, model)


def peers(name: str, model: Model) -> dict[str, Callable[[], Side]]:
    """Builders of every peer that has this model, loaded strictly with our weights."""
    if model.family == "resnet":
        return {"torchvision": lambda: _torchvision_resnet(name, model), "timm": lambda: _timm(name, model)}
    if model.family == "deit":
        return {"timm": lambda: _timm(name, model), "transformers": lambda: _transformers_deit(model)}
    if model.family == "hybrid":
        return {"timm": lambda: _timm(name, model)}
    if model.family == "swin":
        return {"timm": lambda: _timm(name, model, drop_path_rate=0.0), "torchvision": lambda: _torchvision_swin(model)}
    if model.family == "mvit":
        return {"torchvision": lambda: _torchvision_mvit(model)} if model.takes_clips else {"timm": lambda: _timm(name, model)}
    if model.family == "x3d":
        return {"pytorchvideo": lambda: _pytorchvideo_x3d(model)}
    if model.family == "slowfast":
        return {"pytorchvideo": lambda: _pytorchvideo_slowfast(model)}
    if model.family in ("vivit", "timesformer"):
        return {"transformers": lambda: _transformers_clips(model)}
    if model.family == "bit":
        return {"timm": lambda: _timm(name, model), "transformers": lambda: _transformers_bit(model)}
    if model.family == "cvt":
        return {"transformers": lambda: _transformers_cvt(model)}
    return {
        "timm": lambda: _timm(name, model),
        "torchvision": lambda: _torchvision_vit(model),
        "transformers": lambda: _transformers_vit(model),
    }


def naming(model: Model) -> str:
    """The project in whose naming gradients are compared: timm, or where it lacks the model the peer that has it."""
    if model.family in ("x3d", "slowfast"):
        return "pytorchvideo"
    return "transformers" if model.family in ("cvt", "vivit", "timesformer") else "torchvision" if model.takes_clips else "timm"


def translate(model: Model, project: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our parameter names (weights or gradients) in a project's naming."""
    source = next(s for s in SOURCES if s.name == project and s.family == model.family)
    return write(source.rules(model.config), tensors)


def _timm(name: str, model: Model, **settings: Any) -> Side:
    import timm

    peer = timm.create_model(name, num_classes=model.config.num_classes, **settings)
    peer.load_state_dict(translate(model, "timm", model.state_dict()))
    return Side("timm", peer, peer)


def _torchvision_resnet(name: str, model: Model) -> Side:
    import torchvision

    peer = torchvision.models.get_model(name)
    peer.load_state_dict(translate(model, "torchvision", model.state_dict()))
    return Side("torchvision", peer, peer)


def _torchvision_swin(model: Model) -> Side:
    import torchvision

    c = model.config
    peer = torchvision.models.swin_transformer.SwinTransformer(
        list(c.patch), c.width, list(c.depths), list(c.heads), list(c.window), stochastic_depth_prob=0.0
    )
    peer.load_state_dict(translate(model, "torchvision", model.state_dict()))
    return Side("torchvision", peer, peer)


def _torchvision_vit(model: Model) -> Side:
    import torchvision

    c = model.config
    peer = torchvision.models.VisionTransformer(c.image_size[0], c.patch[0], c.depth, c.heads, c.width, c.mlp_dim)
    peer.load_state_dict(translate(model, "torchvision", model.state_dict()))
    return Side("torchvision", peer, peer)


def _torchvision_mvit(model: Model) -> Side:
    import torchvision

    video = torchvision.models.video
    build = video.mvit_v2_s if model.config.relative else video.mvit_v1_b
    peer = build(dropout=0.0, stochastic_depth_prob=0.0)
    peer.load_state_dict(translate(model, "torchvision", model.state_dict()))
    return Side("torchvision", peer, peer)


def _pytorchvideo_x3d(model: Model) -> Side:
    from pytorchvideo.models.x3d import create_x3d

    c = model.config
    peer = create_x3d(
        input_clip_length=c.frames, input_crop_size=c.image_size[0], depth_factor=2.2, model_num_class=c.num_classes,
        dropout_rate=0.0, head_activation=None,
    )  # fmt: skip
    peer.load_state_dict(translate(model, "pytorchvideo", model.state_dict()))
    return Side("pytorchvideo", peer, peer, {"fp32": torch.channels_last_3d})  # five times as fast as contiguous


def _pytorchvideo_slowfast(model: Model) -> Side:
    from pytorchvideo.models.slowfast import create_slowfast

    c = model.config
    peer = create_slowfast(model_num_class=c.num_classes, dropout_rate=0.0)
    peer.load_state_dict(translate(model, "pytorchvideo", model.state_dict()))
    slow = torch.linspace(0, c.frames - 1, c.frames // c.alpha).long()  # as its transform picks the slow pathway's frames
    return Side("pytorchvideo", peer, lambda x: peer([x[:, :, slow.to(x.device)], x]))


def _transformers_vit(model: Model) -> Side:
    import transformers

    c = model.config
    settings = transformers.ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_dim,
        image_size=c.image_size[0], patch_size=c.patch[0], num_labels=c.num_classes, layer_norm_eps=c.norm_eps,
    )  # fmt: skip
    state = translate(model, "transformers", model.state_dict())
    peer = transformers.ViTForImageClassification.from_pretrained(None, config=settings, state_dict=state)
    return Side("transformers", peer, lambda x: peer(pixel_values=x).logits)


def _transformers_bit(model: Model) -> Side:
    import transformers

    c = model.config
    settings = transformers.BitConfig(
        embedding_size=c.trunk.stem_width,
        hidden_sizes=list(c.trunk.widths),
        depths=list(c.trunk.depths),
        num_labels=c.num_classes,
    )
    peer = transformers.BitForImageClassification(settings)
    peer.load_state_dict(translate(model, "transformers", model.state_dict()))
    return Side("transformers", peer, lambda x: peer(pixel_values=x).logits)


def _transformers_clips(model: Model) -> Side:
    import transformers

    c = model.config
    settings: dict[str, Any] = {
        "hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads, "intermediate_size": c.mlp_dim,
        "image_size": c.image_size[0], "num_frames": c.frames, "num_labels": c.num_classes, "layer_norm_eps": c.norm_eps,
    }  # fmt: skip
    state = translate(model, "transformers", model.state_dict())
    if model.family == "vivit":
        config = transformers.VivitConfig(**settings, tubelet_size=list(c.tubelet))
        peer = transformers.VivitForVideoClassification.from_pretrained(None, config=config, state_dict=state)
    else:
        config = transformers.TimesformerConfig(**settings, patch_size=c.patch[0])
        peer = transformers.TimesformerForVideoClassification.from_pretrained(None, config=config, state_dict=state)
    return Side("transformers", peer, lambda x: peer(pixel_values=x.transpose(1, 2)).logits)


def _transformers_deit(model: Model) -> Side:
    import transformers

    c = model.config
    settings = transformers.DeiTConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads, intermediate_size=c.mlp_dim,
        image_size=c.image_size[0], patch_size=c.patch[0], num_labels=c.num_classes, layer_norm_eps=c.norm_eps,
    )  # fmt: skip
    state = translate(model, "transformers", model.state_dict())
    peer = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(None, config=settings, state_dict=state)
    return Side("transformers", peer, lambda x: peer(pixel_values=x).logits)


def _transformers_cvt(model: Model) -> Side:
    import transformers

    peer = transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=model.config.num_classes))
    peer.load_state_dict(translate(model, "transformers", model.state_dict()))
    return Side("transformers", peer, lambda x: peer(pixel_values=x).logits)


def autocast(side: Side, precision: str, device: str) -> AbstractContextManager[Any]:
    """Mixed precision as each side's users have it: a peer's by torch, ours by `vitrail.cost.autocast`."""
    if side.name == "vitrail":
        return cost.autocast(torch.device(device), precision)
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


def make_step(side: Side, task: str, precision: str, mode: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A step as a user would run it: logits under inference mode, or forward, backward and AdamW."""
    device = x.device.type
    x = x.contiguous(memory_format=side.arrange(precision))
    forward = torch.compile(side.logits, fullgraph=True) if mode == "compiled" else side.logits
    if task == "infer":
        side.model.eval()

        def infer() -> None:
            with torch.inference_mode(), autocast(side, precision, device):
                forward(x)

        return infer
    side.model.train()
    optimiser = torch.optim.AdamW(side.model.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        with autocast(side, precision, device):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return train


def errors(
    side: Side, task: str, precision: str, x: Tensor, y: Tensor, exact: tuple[Tensor, Tensor | None], flat: Any
) -> float:
    """Largest relative error of logits, and of the gradient as a whole, against float64."""
    side.model.train(task == "train")
    side.arrange(precision)
    side.model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(task == "train"), autocast(side, precision, x.device.type):
        logits = side.logits(x)
        loss = F.cross_entropy(logits, y)
    found = float((logits.detach().double() - exact[0]).norm() / exact[0].norm())
    if task == "train":
        loss.backward()
        gradient = flat(side).double()
        found = max(found, float((gradient - exact[1]).norm() / exact[1].norm()))
        side.model.zero_grad(set_to_none=True)
    return found


def flat_gradient(model: Model) -> Callable[[Side], Tensor]:
    """Gradients of either side as one vector in the same order: ours are translated into the peer's naming."""

    def flatten(side: Side) -> Tensor:
        grads = {n: p.grad for n, p in side.model.named_parameters() if p.grad is not None}
        if side.name == "vitrail":
            grads = translate(model, naming(model), grads)
        elif model.family == "cvt":
            pass  # transformers' modules are called as in its files
        elif side.name == "transformers":
            hints = {} if model.family == "bit" else {"heads": model.config.heads}
            state = load_model({_file_name(n): g for n, g in grads.items()}, quiet=True, **hints).state_dict()
            grads = translate(model, naming(model), {n: t for n, t in state.items() if n in dict(model.named_parameters())})
        elif side.name == "torchvision":
            state = (
                load_model(grads, quiet=True, heads=getattr(model.config, "heads", 1)).state_dict()
                if model.family in ("vit", "swin")
                else None
            )
            grads = translate(model, "timm", state) if state is not None else grads
        return torch.cat([grads[n].flatten() for n in sorted(grads)])

    return flatten


def _file_name(name: str) -> str:
    """transformers 5 names modules unlike files: parameters of a module under their published names."""
    for inside, published in (
        ("vit.layers.", "vit.encoder.layer."), ("deit.layers.", "deit.encoder.layer."),
        ("vivit.layers.", "vivit.encoder.layer."),
        ("attention.q_proj.", "attention.attention.query."),
        ("attention.k_proj.", "attention.attention.key."), ("attention.v_proj.", "attention.attention.value."),
        ("attention.o_proj.", "attention.output.dense."), ("mlp.fc1.", "intermediate.dense."), ("mlp.fc2.", "output.dense."),
    ):  # fmt: skip
        name = name.replace(inside, published)
    return name


def exact_answer(side: Side, task: str, x: Tensor, y: Tensor, flat: Any) -> tuple[Tensor, Tensor | None]:
    """Logits and gradient in float64."""
    side.model.double().train(task == "train")
    with torch.set_grad_enabled(task == "train"):
        logits = side.logits(x.double())
        gradient = None
        if task == "train":
            F.cross_entropy(logits, y).backward()
            gradient = flat(side)
            side.model.zero_grad(set_to_none=True)
    side.model.float()
    return logits.detach(), gradient


def peak_memory(step: Callable[[], None], device: str) -> tuple[float, float]:
    """MiB that one step needs on top of what is held before it (resident memory on a CPU), and the seconds it took."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _seconds(step, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator keeps, or the highest size tells nothing
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = _status("VmRSS")
    seconds = _seconds(step, device)
    return (_status("VmHWM") - before) / 1024, seconds


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return float(line.split()[1])


def _seconds(step: Callable[[], None], device: str) -> float:
    cost.synchronise(torch.device(device))
    start = time.perf_counter()
    step()
    cost.synchronise(torch.device(device))
    return time.perf_counter() - start


def time_pairs(
    a: Callable[[], None], b: Callable[[], None], pairs: int, device: str = "cpu", warm: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of `pairs` alternating steps of both sides after `warm` steps of each; who starts alternates too."""
    for step in (a, b) * warm:
        step()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for which in ((0, 1), (1, 0))[i % 2]:
            times[which].append(_seconds((a, b)[which], device))
    return times


def duel(
    ours_step: Callable[[], None], peer_step: Callable[[], None], pairs: int, device: str, mode: str = "eager"
) -> dict[str, float]:
    """Times and memory of both over `pairs` alternating steps, and the median of the ratios peer / ours with its interval.

    Steps of more than `LONG` seconds, beside which warming up is nothing, are not wasted: the first of both sides counts, and
    so does the one whose memory is measured.
    """
    steps = ours_step, peer_step
    if mode == "compiled":
        for step in steps:
            step()
    first = [_seconds(step, device) for step in steps]
    long = max(first) > LONG
    kept = [[seconds] if long else [] for seconds in first]
    timed = time_pairs(*steps, pairs - 2 * long, device, warm=0 if long else 1)
    (ours_mib, ours_last), (peer_mib, peer_last) = (peak_memory(step, device) for step in steps)
    last = [[ours_last], [peer_last]] if long else [[], []]
    ours_times, peer_times = ([*a, *b, *c] for a, b, c in zip(kept, timed, last, strict=True))
    ratios = [b / a for a, b in zip(ours_times, peer_times, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "ratio": statistics.median(ratios), "low": low, "high": high,
        "ours_s": statistics.median(ours_times), "peer_s": statistics.median(peer_times),
        "ours_mib": ours_mib, "peer_mib": peer_mib,
    }  # fmt: skip


@functools.cache
def pictures(name: str, device: str, draw: int = 0) -> tuple[Tensor, Tensor]:
    """A batch for a model, the first of which is timed: noise pictures or clips, and random labels."""
    torch.manual_seed(1 + draw)
    with torch.device("meta"):
        model = create_model(name)
    x = torch.randn(BATCH[name], *model.input_shape, device=device)
    return x, torch.randint(model.config.num_classes, (BATCH[name],), device=device)


@functools.cache
def reference(name: str, task: str, device: str, draw: int) -> tuple[Tensor, Tensor | None]:
    """The float64 answer to a batch, computed once per process."""
    side = ours(name)
    side.model.to(device)
    return exact_answer(side, task, *pictures(name, device, draw), flat_gradient(side.model))


def agreement(our_error: Callable[[int], float], peer_error: Callable[[int], float]) -> dict[str, Any]:
    """Errors of both sides on the first batch and, where ours is too large there, on two more, which must both agree.

    Rounding can turn a maximum or a ReLU over on one batch, on either side; a wrong computation is wrong on every batch.
    """
    pairs = [(our_error(0), peer_error(0))]
    if not _within(*pairs[0]):
        pairs += [(our_error(draw), peer_error(draw)) for draw in (1, 2)]
    entry: dict[str, Any] = {"error": pairs[0][0], "peer_error": pairs[0][1]}
    if others := pairs[1:]:
        entry["on_other_batches"] = others
    return entry | {"void": not all(_within(*pair) for pair in others or pairs)}


def _within(error: float, peer_error: float) -> bool:
    return error <= ERROR_LIMIT * peer_error + 1e-12


def run_cell(name: str, task: str, precision: str, mode: str, pairs: int, device: str) -> dict[str, Any]:
    """All peers of one cell, one after the other against the same model of ours."""
    x, y = pictures(name, device)
    torch._dynamo.reset()
    mine = ours(name)
    initial = create_model(name, **SETTINGS.get(name, {}))
    initial.load_state_dict(mine.model.state_dict())
    mine.model.to(device)
    if task == "infer":  # what `Predictor` and `vitrail predict` run
        folded = fold_batchnorm(mine.model)
        mine = Side(mine.name, folded, folded)
    flat = flat_gradient(initial)

    def error(side: Side, draw: int) -> float:
        batch = pictures(name, device, draw)
        return errors(side, task, precision, *batch, reference(name, task, device, draw), flat)

    @functools.cache
    def our_error(draw: int) -> float:
        if task == "train":  # timing an earlier peer has trained it a little
            mine.model.load_state_dict(initial.state_dict())
        return error(mine, draw)

    def peer_error(side: Side, draw: int) -> float:
        key = (name, task, precision, side.name, str(draw))
        if key not in PEER_ERRORS:
            PEER_ERRORS[key] = error(side, draw)
        return PEER_ERRORS[key]

    our_error(0)
    step = make_step(mine, task, precision, mode, x, y)
    row: dict[str, Any] = {"batch": BATCH[name], "pairs": pairs, "peers": {}}
    for peer_name, build in peers(name, initial).items():
        try:  # a peer that cannot be built or run is shown as failing, not counted
            other = build()
            other.model.to(device)
            entry = agreement(our_error, functools.partial(peer_error, other))
            row["peers"][peer_name] = entry | duel(step, make_step(other, task, precision, mode, x, y), pairs, device, mode)
        except Exception as problem:
            row["peers"][peer_name] = {"fails": f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"}
        gc.collect()
    return row | verdict(row["peers"], count_flops(initial) * BATCH[name] * (3 if task == "train" else 1), device, precision)


def verdict(entries: dict[str, dict[str, Any]], flops: int, device: str, precision: str) -> dict[str, Any]:
    """The comparison with the fastest peer, and how much of the machine's matrix-product peak both reach."""
    valid = {name: entry for name, entry in entries.items() if "fails" not in entry and not entry["void"]}
    if not valid:
        return {"passes": False}
    fastest = min(valid, key=lambda name: valid[name]["ratio"])
    best, peak = valid[fastest], matmul_peak(device, precision, refresh=True)
    return {
        "fastest_peer": fastest, "ratio": best["ratio"], "low": best["low"], "high": best["high"], "passes": best["high"] >= 1,
        "percent_of_peak": 100 * flops / best["ours_s"] / peak, "peer_percent_of_peak": 100 * flops / best["peer_s"] / peak,
    }  # fmt: skip


def main() -> None:
    """Run the cells asked for, one by one; each is merged into the results as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name this regular expression is found in, e.g. 'vit_.*bf16'")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--batch", type=int, help="in place of each model's own number of inputs a step")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    arguments = parser.parse_args()
    if arguments.batch:
        BATCH.update(dict.fromkeys(BATCH, arguments.batch))
    for name in BATCH:
        for task in TASKS:
            for precision in PRECISIONS:
                for mode in MODES:
                    cell = f"{name} {task} {precision} {mode}"
                    if not re.search(arguments.only, cell):
                        continue
                    if arguments.list:
                        print(cell)
                        continue
                    row = run_cell(name, task, precision, mode, arguments.pairs, arguments.device)
                    merge(f"models-{kind_of(arguments.device)}", cell, row, machine(arguments.device))
                    print(_line(cell, row), flush=True)


def _line(cell: str, row: dict[str, Any]) -> str:
    parts = []
    for peer, entry in row["peers"].items():
        if "fails" in entry:
            parts.append(f"{peer} fails")
        else:
            void = " VOID" if entry["void"] else ""
            parts.append(f"{peer} {entry['ratio']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]{void}")
    peak = f"{row.get('percent_of_peak', 0):.0f} % of peak (fastest peer {row.get('peer_percent_of_peak', 0):.0f} %)"
    word = "passes" if row["passes"] else "FAILS"
    return f"{cell:48s} {word:6s} {'; '.join(parts)}; {peak}"


if __name__ == "__main__":
    main()
