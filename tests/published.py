"""Parameters and multiply-adds that papers and model zoos print, beside ours; every difference beyond rounding has a reason.

published.csv holds the figures as printed: parameters in millions, multiply-adds in billions (of all views together, where
a table prints that).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Printed(NamedTuple):
    """One row of a published table; figures as text, since the digits tell how they were rounded ("" where there is none)."""

    model: str
    shape: tuple[int, ...]
    parameters: str
    gmacs: str
    views: int
    called: str
    source: str


class Difference(NamedTuple):
    """A figure that is not ours, rounded: by how much, and why."""

    row: Printed
    what: str  # "parameters" or "gmacs"
    ours: float
    share: float  # ours / printed - 1
    reason: str


_ADDS = "the counter of that table adds element-wise work (normalisation, softmax, activations); ours counts products alone"
_HEADLESS = "counted without the head of 1000 classes"
_CUT = "cut off, not rounded"
_SSV2 = "counted with the 174 classes of Something-Something, ours with 400"
_UNKNOWN = "the paper does not say how it counts; not explained"
# (source, model, what, largest share, reason); the first rule that fits gives the reason.
REASONS = (
    ("timm", r"vit_large_patch32_224|vit_huge_patch14_224|vit_base_r50_s16_224", "parameters", 0.008, _HEADLESS),
    ("timm", r"", "gmacs", 0.034, _ADDS),
    ("ViT paper", r"vit_base", "parameters", 0.007, _HEADLESS),
    ("ViT paper", r"vit_large", "parameters", 0.009, "307 is what L/32 has (306.5); L/16 has 304.3"),
    ("BiT paper|CvT paper", r"resnetv2_152x4_bit", "parameters", 0.01, _HEADLESS),
    ("Swin paper|CvT paper", r"resnetv2", "gmacs", 0.003, "cited: two papers give 840.5 and 837 for one network"),
    ("Swin paper", r"swin_tiny", "parameters", 0.026, "the authors' model hub prints 28"),
    ("CvT paper", r"cvt", "parameters", 0.003, "the authors' code and transformers have ours; not explained"),
    ("CvT paper", r"cvt", "gmacs", 0.009, _UNKNOWN),
    ("ViViT paper", r"", "gmacs", 0.009, "2.6 more operations per attention weight would be it; not said"),
    ("TimeSformer paper", r"hr_16x448|l_96x224", "parameters", 0.006, "printed as the base model; position tables differ"),
    ("TimeSformer paper", r"", "parameters", 0.003, _SSV2),
    ("PySlowFast", r"mvitv2", "parameters", 0.005, _SSV2),
    ("PySlowFast", r"mvitv2_base_32x3", "gmacs", 0.003, _UNKNOWN),
    ("MViTv2 model zoo", r"mvitv2_base", "", 0.011, "timm has ours (51.47 million); not explained"),
    ("pytorchvideo|mmaction2", r"slowfast_r101_8x8", "", 0.17, "another network: all res4 blocks are temporal"),
    ("pytorchvideo|mmaction2", r"", "gmacs", 0.082, _ADDS),
    ("SlowFast paper|MViT paper", r"nonlocal", "", 0.005, "how non-local blocks are counted is not said; not explained"),
)  # fmt: skip


def printed() -> list[Printed]:
    """All rows, in the order of the file."""
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        return [
            Printed(r["model"], tuple(map(int, r["input"].split("x"))), r["parameters"], r["gmacs"], int(r["views"]),
                    r["called"], r["source"]) for r in csv.DictReader(file)
        ]  # fmt: skip


def last_digit(figure: str) -> float:
    """The worth of one unit of the last digit: 0.01 for "4.51", 10 for "59e1"."""
    mantissa, _, exponent = figure.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def differences(row: Printed, parameters: int, flops: int | None) -> Iterator[Difference]:
    """What of a row is not ours, rounded. Raises KeyError for a difference that has no reason."""
    ours = {"parameters": parameters / 1e6, "gmacs": None if flops is None else flops / 2e9 * row.views}
    for what, value in ours.items():
        figure = getattr(row, what)
        if value is None or not figure or abs(value - float(figure)) <= 0.5001 * last_digit(figure):
            continue
        share, unit = value / float(figure) - 1, last_digit(figure)
        if math.isclose(math.floor(value / unit) * unit, float(figure)):
            yield Difference(row, what, value, share, _CUT)
            continue
        yield Difference(row, what, value, share, _reason(row, what, share))


def _reason(row: Printed, what: str, share: float) -> str:
    for source, model, quantity, largest, reason in REASONS:
        if re.match(source, row.source) and re.search(model, row.model) and what.startswith(quantity) and abs(share) <= largest:
            return reason
    raise KeyError(f"{row.source} prints {what} of {row.model} {share:+.2%} away from ours, and nothing says why")
