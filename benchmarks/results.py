"""Shared by all benchmarks: intervals, the machine's description, and results merged cell by cell into JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.checkpoints.io import write_text

RESULTS = Path(__file__).parent / "results"


def bootstrap_interval(values: list[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    sample = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(np.median(sample[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def machine(
    device: str = "cpu", packages: tuple[str, ...] = ("torch", "torchvision", "timm", "transformers")
) -> dict[str, Any]:
    """Where and with what a figure was measured."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def kind_of(device: str) -> str:
    """What the figures of a device are filed under: "cuda", "cpu" (AVX512), "cpu-amx" (with matrix tiles) or "cpu-avx2"."""
    if device != "cpu":
        return device
    if torch.cpu._is_amx_tile_supported():
        return "cpu-amx"
    return "cpu" if torch.cpu._is_avx512_supported() else "cpu-avx2"


def merge(name: str, cell: str, row: dict[str, Any], where: dict[str, Any]) -> Path:
    """Put one cell into results/NAME.json, leaving the others as they are; written whole or not at all."""
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content[cell] = {**_rounded(row), "measured": where}
    write_text(path, json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    model = next((value.strip() for key, value in facts.items() if key.strip() == "model name"), platform.machine())
    flags = next((value for key, value in facts.items() if key.strip() == "flags"), "").split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({', '.join(wide)})"


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
