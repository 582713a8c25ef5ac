"""Reader of the golden cases: rebuilds weights and inputs from names, and gives the stored outputs."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tests.cases import FOLDER, manifest, original, versions

__all__ = ["manifest", "original", "versions"]  # of tests.cases, and all that is here
_TOKENS = re.compile(r"token|pos_embed|position_embedding|pos_embedding|time_embed|class_pos|spatial_pos|temporal_pos")
_AS_BUILT = ("relative_position_index", "attn_mask", "relative_coords_table")


def normals(name: str, shape: Any) -> np.ndarray:
    """The stream of standard normals that belongs to a name."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def value(name: str, shape: Any, dtype: str) -> np.ndarray | None:
    """The value of a state-dict entry; None where the model's own is meant."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if leaf in _AS_BUILT or not dtype.startswith(("float", "bfloat")):
        return None
    n = np.asarray(normals(name, shape))
    if leaf == "running_var":
        return np.float32(0.5) + np.abs(n)
    scale, shift = _scale(leaf, shape)
    np.multiply(n, np.float32(scale), out=n)  # in place: the large cases hold gigabytes
    return np.add(n, np.float32(shift), out=n) if shift else n


def _scale(leaf: str, shape: Any) -> tuple[float, float]:
    """(factor, summand) of the normals of an entry."""
    if leaf == "logit_scale":
        return 0.1, math.log(10)
    if leaf == "relative_position_bias_table" or _TOKENS.search(leaf):
        return 0.2, 0.0
    if leaf in ("rel_pos_h", "rel_pos_w", "rel_pos_t", "running_mean") or leaf.endswith("bias"):
        return 0.1, 0.0
    if len(shape) <= 1:
        return 0.1, 1.0
    fan_in = math.sqrt(int(np.prod(shape[1:])))
    return (math.sqrt(2) / fan_in if len(shape) == 2 else 1 / fan_in), 0.0


def state(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The filled state dict of a case, under the peer's published names."""
    return dict(_state(json.dumps([case["state_dict"], case.get("scale") or []])))


@lru_cache(maxsize=1)  # cases of other input sizes have the same weights and stand side by side
def _state(described: str) -> dict[str, torch.Tensor]:
    entries, scales = json.loads(described)
    out = {}
    for name, shape, dtype in entries:
        filled = value(name, shape, dtype)
        if filled is None:
            continue
        for pattern, factor in scales:
            if re.search(pattern, name) and filled.dtype == np.float32:
                filled = filled * np.float32(factor)
        out[name] = torch.from_numpy(np.asarray(filled))
    return out


def inputs(case: dict[str, Any], key: str = "x") -> torch.Tensor:
    """A case's input: normals, or a mask that is true with the case's ratio."""
    spec = case["inputs"][key]
    if spec["dtype"] == "bool":
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(("mask/" + spec["name"]).encode())))
        return torch.from_numpy(generator.random(tuple(spec["shape"])) < spec.get("ratio", 0.5))
    return torch.from_numpy(normals("input/" + spec["name"], spec["shape"]) * np.float32(spec.get("scale", 1)))


def outputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The stored outputs; entries with a flat_stride are every so manieth element of the flattened tensor."""
    return {k: torch.from_numpy(v) for k, v in load_file(FOLDER / "outputs" / f"{case['id']}.safetensors").items()}


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def strided(case: dict[str, Any], key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our tensor in the stored form of output `key`."""
    step = case["outputs"][key].get("flat_stride")
    return tensor.reshape(-1)[::step] if step else tensor


_RULES = {
    "kernel": lambda n, fan_in: n * np.float32(1 / np.sqrt(fan_in)),
    "scale": lambda n, fan_in: np.float32(1) + np.float32(0.1) * n,
    "small": lambda n, fan_in: np.float32(0.1) * n,
    "var": lambda n, fan_in: np.float32(0.5) + np.abs(n),
    "tiny": lambda n, fan_in: np.float32(0.003) * n,
    "tinyvar": lambda n, fan_in: np.float32(1e-5) * (np.float32(0.5) + np.abs(n)),
}


def original_state(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The filled state dict of an authors' case, its bytes checked against the stored hash."""
    digest, out = hashlib.sha256(), {}
    for name, shape, rule, fan_in in case["params"]:
        if rule == "keep":
            continue
        filled = np.ascontiguousarray(_RULES[rule](normals(name, shape), fan_in), dtype=np.float32)
        digest.update(filled.tobytes())
        out[name] = torch.from_numpy(filled)
    wanted = case.get("params_sha256")
    assert wanted is None or digest.hexdigest() == wanted, "the fill rule differs from the stored hash"
    return out


def original_outputs(case_id: str) -> dict[str, torch.Tensor]:
    """The stored outputs of an authors' case."""
    return {k: torch.from_numpy(v) for k, v in load_file(FOLDER / "original" / f"{case_id}.safetensors").items()}
