"""Parameter groups, optimisers, clipping, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vitrail.config import OptimConfig
from vitrail.models import Model
from vitrail.models.pretext import Pretext

from .muon import Muon

EMA_DELAY = 10  # updates; shapes the warm-up of the decay, as in TensorFlow's ExponentialMovingAverage


def scaled_lr(config: OptimConfig, batch_size: int) -> float:
    """The peak learning rate of a run with `batch_size` pictures per step (Goyal et al., arXiv 1706.02677: linear)."""
    return config.lr * batch_size / config.lr_batch if config.lr_batch else config.lr


def parameter_groups(model: Model | Pretext, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups {params, names, weight_decay, lr_scale, parts} of all trained parameters.

    Weight decay spares one-dimensional parameters (biases, norms, gains) and what the model names (tokens, positions).
    lr_scale is layer_decay ** (layers between the parameter and the head). parts is not 0 for what Muon steps are for: the
    weights of products between stem and head (of their q, k and v apart), depthwise kernels aside.
    """
    spared, layers = model.no_weight_decay(), model.layer_ids()
    last = max(layers.values())
    groups: dict[tuple[bool, int, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in spared
        distance = last - layers[name] if config.layer_decay != 1 else 0
        product = decayed and 0 < layers[name] < last and parameter.shape[1] > 1
        parts = (3 if name.endswith("qkv.weight") else 1) if product and config.optimizer == "muon" else 0
        group = groups.setdefault(
            (decayed, distance, parts),
            {
                "params": [],
                "names": [],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_scale": config.layer_decay**distance,
                "parts": parts,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(model: Model | Pretext, config: OptimConfig, device: torch.device) -> Optimizer:
    """The optimiser of the settings over `parameter_groups`; its learning rates are set at every step by `set_lr`.

    The fused kernels of torch (one pass over memory) run on CPUs and CUDA; elsewhere torch's default is used.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "muon":
        return Muon(groups, config.lr, (config.beta1, config.beta2))
    fused = True if device.type in ("cpu", "cuda") else None
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate to `lr` times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The global 2-norm of all gradients."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors, "<parameter name>/<field>", for a checkpoint."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimiser of the same model and settings."""
    state: dict[int, dict[str, Tensor]] = {}
    numbers = {name: i for i, name in enumerate(n for group in optimizer.param_groups for n in group["names"])}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        state.setdefault(numbers[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def build_ema(model: Model, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers, updated by `.update_parameters(model)`, used as `.module`.

    The decay rises with the number of updates, min(decay, (1 + n) / (10 + n)), so that the start is forgotten quickly.
    """
    return AveragedModel(model, multi_avg_fn=_moving_average(decay), use_buffers=True)


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        if not torch.is_floating_point(averaged[0]):
            torch._foreach_copy_(averaged, current)
            return
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (EMA_DELAY + n)))

    return update
