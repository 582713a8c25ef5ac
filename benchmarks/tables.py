"""The tables of docs/benchmarks.md, written from results/: `python -m benchmarks.tables`.

Whatever stands between `<!-- NAME -->` and `<!-- end -->` is replaced by the table of results/NAME.json.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS
from vitrail.checkpoints.io import write_text

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
Cells = dict[str, dict[str, Any]]


def models(cells: Cells) -> str:
    """One row a cell: the fastest peer, the ratio with its interval, shares of the peak, memory; then geometric means."""
    lines = [
        "| model | task | precision | mode | fastest peer | peer / ours (95 %) | % of peak, ours / peer | MiB, ours / peer | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, row in cells.items():
        *_, task, precision, mode = cell.split()
        name = f"`{cell.split()[0]}` | {task} | {precision} | {mode}"
        if "fastest_peer" not in row:
            why = "; ".join(f"{peer}: {entry.get('fails', 'void')}" for peer, entry in row["peers"].items())
            lines.append(f"| {name} | none runs ({why}) | | | | |")
            continue
        best = row["peers"][row["fastest_peer"]]
        failing = [peer for peer, entry in row["peers"].items() if "fails" in entry]
        lines.append(
            f"| {name} | {row['fastest_peer']}{''.join(f' ({peer} fails)' for peer in failing)} "
            f"| {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {row['percent_of_peak']:.0f} / {row['peer_percent_of_peak']:.0f} "
            f"| {best['ours_mib']:.0f} / {best['peer_mib']:.0f} | {'passes' if row['passes'] else '**fails**'} |"
        )
    timed = [(cell, row) for cell, row in cells.items() if "ratio" in row]
    kinds = [f"{t} {p} {m}" for t in ("infer", "train") for p in ("fp32", "bf16") for m in ("eager", "compiled")]
    ratios = {kind: [row["ratio"] for cell, row in timed if cell.endswith(f" {kind}")] for kind in kinds}
    means = [f"{kind} {_mean(values)}" for kind, values in ratios.items() if values]
    passed = sum(bool(row["passes"]) for row in cells.values())
    return "\n".join([
        *lines, "", f"{passed} of {len(cells)} cells pass. Geometric means of the ratios: {'; '.join(means)}. {_where(cells)}",
    ])  # fmt: skip


def data(cells: Cells) -> str:
    """Pictures a second of the data path, and the checks of its pixels."""
    lines = ["| pictures | task | peer | peer / ours (95 %) | pictures/s, ours / peer | target |", "|---|---|---|---|---|---|"]
    checks = []
    for cell, row in cells.items():
        if "ratio" in row:
            pictures, task, peer = cell.split()
            target = f"{row['target']}: {'passes' if row['passes'] else '**fails**'}" if "target" in row else ""
            lines.append(
                f"| {pictures} | {task} | {peer} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
                f"| {row['ours_per_second']:.0f} / {row['peer_per_second']:.0f} | {target} |"
            )
        else:
            facts = "; ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in ("measured", "passes"))
            checks.append(f"- {cell}: {facts}{'' if row.get('passes') is None else f' ({_verdict(row)})'}")
    return "\n".join([*lines, "", *checks, "", _where(cells)])


def video(cells: Cells) -> str:
    """Frames a second of the video path, and what it costs to learn when frames are shown."""
    lines = ["| frames | peer | peer / ours (95 %) | frames/s, ours / peer | pixels |", "|---|---|---|---|---|"]
    for cell, row in cells.items():
        if "ratio" in row:
            task, peer = cell.split()
            apart = "the same" if row["same"] else f"up to {row['worst_mean_difference']:.2g} apart"
            lines.append(
                f"| {task} | {peer} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
                f"| {row['ours_per_second']:.0f} / {row['peer_per_second']:.0f} | {apart} |"
            )
    index = f"- index: {1e3 * cells['index']['seconds']:.1f} ms a file, once per process" if "index" in cells else ""
    return "\n".join([*lines, "", index, "", _where(cells)])


TABLES: dict[str, Callable[[Cells], str]] = {
    "models-cpu": models, "models-cpu-avx2": models, "models-cuda": models, "data": data, "video": video,
}  # fmt: skip


def _verdict(row: dict[str, Any]) -> str:
    return "passes" if row["passes"] else "**fails**"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _mean(ratios: Iterable[float]) -> str:
    return f"{math.exp(statistics.fmean(math.log(ratio) for ratio in ratios)):.2f}"


def _where(cells: Cells) -> str:
    """On what, when and with which versions the cells were measured."""
    seen = sorted({
        f"{m['device']}, {m['threads']} of {m['cores']} cores, "
        f"{', '.join(f'{name} {version}' for name, version in m['versions'].items())}"
        for m in (row["measured"] for row in cells.values())
    })  # fmt: skip
    days = sorted({row["measured"]["date"] for row in cells.values()})
    commits = sorted({row["measured"]["commit"] for row in cells.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured on {when} at {', '.join(commits)}: {'; '.join(seen)}."


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with the table of every file that is there. Raises ValueError for a name that no table belongs to."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are: {', '.join(TABLES)}")
        path = folder / f"{name}.json"
        table = TABLES[name](json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not measured yet."
        return f"<!-- {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
