"""Models without weights, to count or to fill: shapes are all that is wanted of their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ShapesOnly(TorchFunctionMode):
    """A model built in this context has parameters without memory, on the meta device; its buffers are made as ever.

    What draws initial values is left out. On `torch.device("meta")` it would run, every operation in Python: 0.1 s a model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:  # as layers make their weights
            return func(*args, **{**kwargs, "device": "meta"})
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, Tensor) and target.is_meta and func.__name__ in _INITIAL:
            return target
        return func(*args, **kwargs)


_INITIAL = {
    "normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_", "copy_",  # of a tensor
    "constant_", "kaiming_normal_", "kaiming_uniform_",  # of torch.nn.init, which hands them over whole
}  # fmt: skip
