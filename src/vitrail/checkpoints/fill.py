"""Translated tensors into a model: positions and stems refitted, a head of another size left at zero, the rest must fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrail.layers.embed import PatchEmbed, resize_patches
from vitrail.layers.position import ClipPosition, RelativePosition, VideoPosition, resize_grid, resize_line
from vitrail.models import Model, ShapesOnly, build

from .mapping import CheckpointError, Report, State


def build_for(state: State, config: Any, name: str) -> Model:
    """A model whose every parameter `state` will replace, so none is drawn: that would take longer than reading a file.

    Where a parameter would keep its initial value (a head that the weights lack), the model is built as ever.
    """
    with ShapesOnly():
        model = build(config, name)
    for key, parameter in model.named_parameters():
        if key not in state or (key.startswith("head.") and state[key].shape != parameter.shape):
            return build(config, name)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=torch.get_default_device())
                setattr(module, key, nn.Parameter(memory, parameter.requires_grad))
    return model


def fill(model: Model, state: State, report: Report, name: str, built: Any) -> None:
    """Put tensors into the model: positions resized, a head of another size left at zero; anything else must fit."""
    wanted = model.state_dict()
    wrong = []
    for key in list(state):
        if key not in wanted:
            if not key.startswith("head."):
                report.unexpected.append(key)
            state.pop(key)
        elif state[key].shape != wanted[key].shape:
            if key.startswith("head."):
                report.remade.append(f"{key} {tuple(state[key].shape)} -> {tuple(wanted[key].shape)}, zero-initialised")
                state.pop(key)
            elif (fitted := _refit(model, key, state[key], wanted[key], built)) is not None:
                report.resized.append(f"{key} {tuple(state[key].shape)} -> {tuple(wanted[key].shape)}")
                state[key] = fitted
            else:
                wrong.append(f"{key} is {tuple(state[key].shape)}, the model needs {tuple(wanted[key].shape)}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"{name}: shapes do not fit: {'; '.join(wrong[:3])}{more}")
    absent = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    report.missing += [key for key in absent if not key.startswith("head.")]
    if len(report.missing) > len(wanted) // 2:
        raise CheckpointError(f"{name}: {len(report.missing)} of {len(wanted)} tensors are missing ({report.missing[0]}, ...)")
    if absent and report.missing:
        raise CheckpointError(f"{name}: tensors are missing: {', '.join(report.missing[:6])}")
    model.load_state_dict(state, strict=False)


def refit_clips(model: Model, built: Any, state: State, report: Report) -> None:
    """Positions of a clip's tokens, made for `built` (a config), on the model's grid: their length does not tell the grid."""
    for name, module in model.named_modules():
        if not isinstance(module, VideoPosition):
            continue
        axes = zip(built.grid, model.config.grid, module.grid, strict=True)
        old = tuple(n if whole == own else 1 for n, whole, own in axes)  # a table of times or of places alone has ones
        for key, resize in (("table", module.resized), ("time", module.resized_time)):
            table = state.get(f"{name}.{key}")
            if table is not None and old != module.grid:
                state[f"{name}.{key}"] = resize(table, old, module.grid)
                report.resized.append(f"{name}.{key} {'x'.join(map(str, old))} -> {'x'.join(map(str, module.grid))}")


def _refit(model: Model, key: str, found: Tensor, wanted: Tensor, built: Any) -> Tensor | None:
    """A tensor of another input size or channel count as this model needs it, or None when there is no such reading."""
    part = key.split(".")
    owner: Any = model.get_submodule(".".join(part[:-1]))
    if isinstance(owner, (ClipPosition, RelativePosition)):
        return owner.refit(part[-1], found)
    if "positions" in part:
        at = part.index("positions")
        module: Any = model.get_submodule(".".join(part[: at + 2]))
        if part[at + 2] in ("rows", "columns"):
            return resize_line(found, wanted.shape[0])
        prefix = module.prefix
        old = _old_grid(found.shape[1] - prefix, model.config)
        return None if old is None else torch.cat(
            [found[:, :prefix], resize_grid(found[0, prefix:], old, module.grid, module.rule)[None]], 1
        )  # fmt: skip
    if key.endswith("embed.proj.weight") and isinstance(model.get_submodule(".".join(part[:-2])), PatchEmbed):
        found = resize_patches(found, (wanted.shape[2], wanted.shape[3]))
        if found.shape == wanted.shape:
            return found
    stems = ("embed.proj.weight", "embed.weight", "stem.conv.weight", "stem_space.conv.weight")
    if key.endswith(stems) and found.shape[2:] == wanted.shape[2:] and found.ndim >= 4:
        return _adapt_channels(found, wanted.shape[1])
    return model.refit(key, found, built)


def _old_grid(count: int, config: Any) -> tuple[int, int] | None:
    """The grid that the weights were built for: square, or of the new grid's aspect ratio."""
    side = round(count**0.5)
    if side * side == count:
        return side, side
    rows = (count * config.grid[0] / config.grid[1]) ** 0.5
    candidates = [r for r in range(1, count + 1) if count % r == 0]
    best = min(candidates, key=lambda r: abs(r - rows))
    return best, count // best


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A stem for another number of channels that answers alike to a picture repeated over channels: its mean, spread."""
    mean = weight.mean(1, keepdim=True) * weight.shape[1] / channels
    return mean.expand(-1, channels, *weight.shape[2:]).contiguous()
