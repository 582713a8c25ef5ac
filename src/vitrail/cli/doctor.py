"""`vitrail doctor`: what this installation and this machine can do, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail doctor
vitrail doctor --no-measure --json > machine.json"""

PACKAGES = ("vitrail", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "safetensors", "pyarrow", "torchmetrics")

# What is not installed with the core: the module, what it is for, how to get it.
OPTIONAL = (
    ("av", "video files", "pip install 'vitrail[video]'"),
    ("msgpack", "Flax checkpoints", "pip install 'vitrail[convert]'"),
    ("timm", "side-by-side tests and benchmarks", "pip install 'vitrail[peers]'"),
    ("transformers", "side-by-side tests and benchmarks", "pip install 'vitrail[peers]'"),
)


@dataclass(frozen=True)
class Arguments:
    """Show versions, devices, decoders and measured speed, and say what is missing and how to get it."""

    measure: bool = True  # time matrix products: the peak that training and bench compare with
    json: bool = False  # print everything as JSON


def run(words: Sequence[str]) -> int:
    """Print the findings; 1 when something that every run needs does not work."""
    arguments = parse(Arguments, words, prog="vitrail doctor", examples=EXAMPLES)
    from vitrail.cli import show

    findings: dict[str, dict[str, Any]] = {
        "versions": versions(),
        "machine": machine(),
        "devices": devices(),
        "decoders": decoders(),
        "peaks": peaks() if arguments.measure else {},
        "missing": missing(),
    }
    if arguments.json:
        show.as_json(findings)
    else:
        for title in ("versions", "machine", "devices", "decoders"):
            show.pairs(findings[title], title.capitalize())
        if findings["peaks"]:
            show.pairs(findings["peaks"], "Measured matrix products, TFLOP/s")
        show.pairs(findings["missing"] or {"nothing": "everything optional is here too"}, "Missing")
    return int(any(value.startswith("broken") for value in findings["decoders"].values()))


def versions() -> dict[str, str]:
    """Installed versions of what decides results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    """Processor, memory and threads."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "system": platform.platform(terse=True),
        "processor": _processor(),
        "cores": f"{cores} usable, {torch.get_num_threads()} used by torch",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "vector units": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def devices() -> dict[str, str]:
    """What `--device` accepts here."""
    import torch

    found = {"cpu": "always"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def decoders() -> dict[str, str]:
    """Each picture decoder, tried on a small picture of its own making."""
    import io

    import numpy as np
    from PIL import Image, features

    picture = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    formats = {"webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000", "libtiff": "TIFF"}
    return {
        "simplejpeg": _tried(_simplejpeg, jpeg),
        "Pillow": "JPEG, PNG, GIF, BMP, " + ", ".join(label for name, label in formats.items() if features.check(name)),
        "av (video)": f"{version('av')}" if find_spec("av") else "not installed",
    }


def _tried(decode: Any, jpeg: bytes) -> str:
    try:
        return decode(jpeg)
    except Exception as problem:  # a broken shared library raises whatever it likes; that is what is being reported
        return f"broken: {problem}"


def _simplejpeg(jpeg: bytes) -> str:
    import simplejpeg

    simplejpeg.decode_jpeg(jpeg)
    return "works"


def peaks() -> dict[str, float]:
    """The rate of square matrix products per device and precision, in TFLOP/s, measured now."""
    from vitrail import cost

    device = cost.pick_device()
    precisions = ("fp32", "bf16") if device.type == "cpu" else ("fp32", "bf16", "fp16")
    return {f"{device} {name}": round(cost.matmul_peak(device, name, refresh=True) / 1e12, 3) for name in precisions}


def missing() -> dict[str, str]:
    """What is absent: what it is for and how to get it."""
    found = {name: f"{purpose}: {how}" for name, purpose, how in OPTIONAL if find_spec(name) is None}
    if not shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        found["C++ compiler"] = "--compile on the CPU: install g++ (Linux) or the Xcode command line tools (macOS)"
    return found
