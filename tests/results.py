"""Run what proves the models equal to others and count what they cost, and write both into the documentation.

    python -m tests.results          (about 4 minutes of one core; --golden or --published for one of the two)

Tables stand between marks in docs/results.md and docs/published.md, so that the text around them stays.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests import golden, proofs, published

ROOT = Path(__file__).parents[1]


class _Reports:
    """Collects the reports of a test run."""

    def __init__(self) -> None:
        self.all: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.all.append(report)


def golden_table() -> list[str]:
    """Run all tests that read golden cases and make their table."""
    users = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "golden." in path.read_text(encoding="utf-8")]
    reports = _Reports()
    pytest.main(
        ["-q", "--durations=0", "--durations-min=1e9", "-k", "golden or inflate or authors or ridge", *users], plugins=[reports]
    )
    rows = proofs.rows(proofs.gather(reports.all))
    run, cases = sum(row.run for row in rows), sum(row.cases for row in rows)
    versions = golden.versions()
    return [
        *proofs.markdown(rows),
        "",
        f"{run} of {cases} cases run, {sum(row.passed for row in rows)} passed; the outputs were made with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + " and the authors' repositories.",
    ]


def published_tables() -> tuple[list[str], list[str]]:
    """(differences by reason, every figure), counted now."""

    from vitrail.cost import count_flops, count_parameters
    from vitrail.models import ShapesOnly, create_model

    counted: dict[tuple[str, tuple[int, ...], bool], tuple[int, int]] = {}
    by_reason: dict[str, list[published.Difference]] = defaultdict(list)
    rows = published.printed()
    lines = ["| model | input | parameters | as printed | GMACs | as printed | printed by |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        key = row.model, row.shape, bool(row.gmacs)
        if key not in counted:
            settings: dict[str, object] = {"frames": row.shape[1]} if len(row.shape) == 4 else {}
            with ShapesOnly():
                published_model = create_model(row.model)
                sized = create_model(row.model, image_size=row.shape[-2:], **settings) if row.gmacs else published_model
            counted[key] = count_parameters(published_model), count_flops(sized) if row.gmacs else 0
            print(row.model, row.shape, file=sys.stderr)
        parameters, flops = counted[key]
        found = list(published.differences(row, parameters, flops or None))
        for difference in found:
            by_reason[difference.reason].append(difference)
        apart = {difference.what: f" ({difference.share:+.1%})" for difference in found}
        views = f" of {row.views} views" if row.views > 1 else ""
        gmacs = (
            (f"{flops / 2e9 * row.views:,.2f}", f"{float(row.gmacs):,g}{apart.get('gmacs', '')}{views}")
            if row.gmacs
            else ("", "")
        )
        size = f"{parameters / 1e6:,.3f}", f"{row.parameters}{apart.get('parameters', '')}" if row.parameters else ""
        shape = "x".join(map(str, row.shape[1:]))
        lines.append(
            f"| {row.model} | {shape} | {size[0]} | {size[1]} | {gmacs[0]} | {gmacs[1]} | {row.source}: {row.called} |"
        )
    figures = sum(bool(row.parameters) + bool(row.gmacs) for row in rows)
    apart_count = sum(map(len, by_reason.values()))
    summary = [
        f"{figures} figures of {len({row.model for row in rows})} variants: {figures - apart_count} are ours, rounded. "
        f"The other {apart_count}, by reason:",
        "",
        "| reason | figures | largest difference | models |",
        "|---|---|---|---|",
    ]
    for reason, group in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        largest = max(group, key=lambda difference: abs(difference.share))
        names = list(dict.fromkeys(difference.row.model for difference in group))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        summary.append(f"| {reason} | {len(group)} | {largest.share:+.1%} ({largest.row.model}) | {shown} |")
    return summary, lines


def put(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what stands between the marks of a table."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: made by python -m tests.results -->", f"<!-- end of {name} -->"
    assert text.count(begin) == text.count(end) == 1, f"{path} has no place for {name}"
    body = begin + "\n\n" + "\n".join(lines) + "\n\n" + end
    new = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: body, text, flags=re.DOTALL)
    path.write_text(new, encoding="utf-8")


def main(words: list[str]) -> None:
    """Write the tables that were asked for, by default all."""
    if "--published" not in words:
        put(ROOT / "docs" / "results.md", "golden cases", golden_table())
    if "--golden" not in words:
        summary, everything = published_tables()
        put(ROOT / "docs" / "results.md", "differences", summary)
        put(ROOT / "docs" / "published.md", "figures", everything)


if __name__ == "__main__":
    main(sys.argv[1:])
