"""A killed run goes on to bit-identical weights; signals and a full disk leave something to go on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START = """
import os, sys
from pathlib import Path
scripts, folder, report = sys.argv[1:]
os.environ["XDG_CACHE_HOME"] = folder
sys.path.insert(0, scripts)
import killing
killing.main(Path(folder), Path(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., str]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killing")
    path = folder / "report.json"
    run_python(START, str(Path(__file__).parent), str(folder), str(path), timeout=280)
    return json.loads(path.read_text())


def assert_same(compared: dict[str, Any]) -> None:
    assert compared["resumed"] == 0, compared["output"]
    assert compared["tensors"] > 100
    assert compared["unequal"] == []
    assert compared["same_records"], "metrics.jsonl has a gap, a duplicate or another value"
    assert compared["same_table"]
    assert compared["left_over"] == []


def test_the_uninterrupted_run_ends(report: dict[str, Any]) -> None:
    code, output = report["whole"]
    assert code == 0, output
    assert report["events"] > 150


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(report: dict[str, Any]) -> None:
    killed = report["killed"]
    assert len(killed) >= 12
    for moment, run in killed.items():
        print(moment)  # shown if one fails
        assert run["code"] == -9
        assert_same(run)


def test_the_moments_are_spread_over_step_save_and_epoch_end(report: dict[str, Any]) -> None:
    moments = " ".join(report["killed"])
    for kind in ("micro-step", "update", "folder rename begins", "folder rename done", "file rename", "evaluation"):
        assert kind in moments


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_leaves(report: dict[str, Any], name: str, code: int) -> None:
    run = report[name]
    assert run["code"] == code, run["said"]
    assert "Traceback" not in run["said"]
    assert f"stopped at step {int(run['saved'].removeprefix('step-'))} of 14 and saved" in run["said"]
    assert_same(run)


def test_a_full_disk_costs_only_what_came_after_the_last_checkpoint(report: dict[str, Any]) -> None:
    run = report["full"]
    assert run["code"] == 1
    assert "Traceback" not in run["said"]
    assert "could not save step 6, is the disk full?" in run["said"]
    assert run["left"] == ["step-00000003"]
    assert_same(run)


@pytest.mark.parametrize("model", ["swin_micro", "cvt_micro", "deit_micro"])
def test_killed_in_any_family_a_run_goes_on_to_the_same_bits(report: dict[str, Any], model: str) -> None:
    """Windows with tables of biases (and Muon), batch normalisation inside attention, two heads and a teacher."""
    run = report["families"][model]
    assert run["whole"] == 0, run["said"]
    assert ("teacher  " in run["said"]) == (model == "deit_micro")
    assert run["code"] == -9
    assert_same(run)
