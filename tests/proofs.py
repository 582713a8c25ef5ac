"""Which golden case was proven, and how near: recorded by the tests, printed when they end, and kept in docs/results.md.

A test of a case ends with `proofs.record(record_property, case_id, error)` before it asserts anything, so that a failing
case stands in the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tests.cases import FOLDER, manifest

_PROPERTY = "golden"
_KINDS = {"timm": "timm", "tv": "torchvision", "hf": "transformers", "ptv": "pytorchvideo", "resample": "timm"}
# How the manifests call families, as the tables call them; the authors' cases by how their names begin.
_FAMILIES = {
    "vit": "ViT", "vit_mim": "ViT", "resample": "ViT", "resnet": "ResNet", "deit": "DeiT", "vit_hybrid": "hybrid", "bit": "BiT",
    "swin": "Swin", "swin_v2": "Swin v2", "cvt": "CvT", "mvit_v2_image": "MViT v2 (images)", "vivit": "ViViT",
    "timesformer": "TimeSformer", "mvit_v1": "MViT", "mvit_v2": "MViT v2", "x3d": "X3D", "slowfast": "SlowFast",
    "swin3d": "Video Swin", "resample_swin": "Swin",
}  # fmt: skip
_AUTHORS = {
    "bigvision_fewshot": "few-shot probe", "bigvision_vit": "ViT", "bit": "BiT", "cvt": "CvT", "deit": "DeiT", "swin": "Swin",
    "slowfast_mvit_tiny_v1": "MViT", "slowfast_mvit_tiny_v2": "MViT v2", "slowfast_slowfast": "SlowFast",
    "slowfast_x3d": "X3D", "timesformer": "TimeSformer", "vitjax_tiny_hybrid": "hybrid", "vitjax": "ViT", "vivit": "ViViT",
}  # fmt: skip
VIDEO = ("ViViT", "TimeSformer", "MViT", "MViT v2", "X3D", "SlowFast", "Video Swin")
NOT_RUN = {"Video Swin": "not run: the family is not built"}


class Row(NamedTuple):
    """Cases of one family by one implementation; the error relative to the largest value of the output, worst of all."""

    family: str
    implementation: str
    cases: int
    run: int
    passed: int
    error: float


def record(record_property: Callable[[str, Any], None], case_id: str, error: float) -> None:
    """Write down that a case was run, and its largest relative error."""
    assert case_id in known(), case_id
    record_property(_PROPERTY, [case_id, float(error)])


def known() -> dict[str, tuple[str, str]]:
    """{case: (family, implementation)} of everything in the folder of golden cases."""
    found = {}
    for case_id, case in manifest().items():
        family = "resample_swin" if case_id.startswith("resample_swin") else case["family"]
        found[case_id] = _FAMILIES[family], _KINDS[case_id.split("_")[0]]
    for path in sorted((FOLDER / "original").glob("*.json")):
        found[path.stem] = next(v for k, v in _AUTHORS.items() if path.stem.startswith(k)), "the authors"
    return found


def gather(reports: Iterable[Any]) -> dict[str, tuple[float, bool]]:
    """{case: (largest error of its tests, whether all passed)} in test reports."""
    found: dict[str, tuple[float, bool]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == _PROPERTY and report.when == "call":
                error, passed = found.get(value[0], (0.0, True))
                found[value[0]] = max(error, value[1]), passed and report.passed
    return found


def rows(found: dict[str, tuple[float, bool]], everything: bool = True) -> list[Row]:
    """One row a family and implementation, pictures before video; without `everything` only of what was run."""
    order = [*dict.fromkeys(_FAMILIES.values()), *_AUTHORS.values()]
    cases: dict[tuple[str, str], list[str]] = {}
    for case_id, key in known().items():
        if everything or case_id in found:
            cases.setdefault(key, []).append(case_id)
    ordered = sorted(cases, key=lambda key: (key[0] in VIDEO, order.index(key[0]), key[1] == "the authors", key[1]))
    made = []
    for key in ordered:
        ran = [found[case_id] for case_id in cases[key] if case_id in found]
        worst = max((error for error, _ in ran), default=float("nan"))
        made.append(Row(*key, len(cases[key]), len(ran), sum(passed for _, passed in ran), worst))
    return made


def text(table: Iterable[Row]) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"{'family':<18}{'implementation':<15}{'cases':>5}{'run':>5}{'passed':>7}  {'largest relative error':>22}"
    for row in table:
        yield f"{row.family:<18}{row.implementation:<15}{row.cases:>5}{row.run:>5}{row.passed:>7}  {row.error:>22.1e}"


def markdown(table: Iterable[Row]) -> Iterator[str]:
    """Lines for a page."""
    yield "| family | implementation | cases | run | passed | largest relative error |"
    yield "|---|---|---|---|---|---|"
    for row in table:
        error = f"{row.error:.1e}" if row.run else NOT_RUN.get(row.family, "")
        yield f"| {row.family} | {row.implementation} | {row.cases} | {row.run} | {row.passed} | {error} |"
