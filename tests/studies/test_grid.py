"""A grid goes on after being killed, spends the same FLOPs on every model, and says mean and spread."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitrail.config import ConfigError, RunConfig, replace_flat
from vitrail.studies.grid import Cell, Grid, steps_within

# In one process: a fork of it is killed in the middle of the second cell.
GRIDS = """
import csv, json, os, pathlib, signal, sys
import torch
import torchmetrics.functional.classification
from vitrail.cost import Memory
from vitrail.studies import grid
from vitrail.training import loop, plan

plan.forecast_memory = lambda *_, **__: Memory(1, 2, 3, 4, 5)
plan.matmul_peak = lambda device, precision: 1e9
plan.count_flops = grid.count_flops = lambda model: 1000
pixels = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
samples = [(image // (1 + i % 3), i % 3) for i, image in enumerate(pixels)]

def run(out, **changes):
    settings = dict(
        data={"colours": samples}, models=["vit_micro_patch4_16"], seeds=(0, 1), batch_size=8, budget_flops=6 * 3 * 1000 * 8,
        overrides={"depth": 1}, device="cpu", precision="fp32", workers=0, save_every_steps=2, save_every_minutes=0,
        tests={"again": samples},
    )
    return grid.run_grid(out, **{**settings, **changes})

def table(out):
    with open(out + "/cells.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

def fatal(path, state, *rest):
    save(path, state, *rest)
    if "seed1" in str(path) and state.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

folder = sys.argv[1]
os.dup2(1, 2)  # what a resumed run says is read, too
child = os.fork()
if child == 0:
    save, loop.save_checkpoint = loop.save_checkpoint, fatal
    run(folder + "/killed")
    os._exit(0)
status = os.waitpid(child, 0)[1]
found = {"signal": os.WTERMSIG(status), "after": table(folder + "/killed")}
summary = str(run(folder + "/killed"))
run(folder + "/whole")
# As written by a version without one of the settings: the default is meant, and nothing is run again.
cell = next(pathlib.Path(folder, "whole").glob("*seed0*/cell.json"))
older = json.loads(cell.read_text())
del older["asked"]["config"]["seed"], older["asked"]["config"]["optim"]["clip_norm"]
cell.write_text(json.dumps(older))
run(folder + "/whole")
try:
    run(folder + "/whole", lr=0.5)
except ValueError as problem:
    found["refused"] = str(problem)
print(json.dumps({**found, "killed": table(folder + "/killed"), "whole": table(folder + "/whole"), "summary": summary}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_a_killed_grid_goes_on_to_the_same_table(tmp_path: Path, run_python: Callable[..., str]) -> None:
    output = run_python(GRIDS, str(tmp_path), timeout=280)
    found = json.loads(output.splitlines()[-1])
    assert found["signal"] == 9
    assert len(found["after"]) == 1
    assert found["killed"] == found["whole"]
    assert [(row["seed"], row["steps"], row["flops"]) for row in found["whole"]] == [
        ("0", "6", "144000.0"),
        ("1", "6", "144000.0"),
    ]
    assert "top1@again" in found["whole"][0]
    assert "top1: mean" in found["summary"]
    assert "lr: 0.001 there, 0.5 asked for" in found["refused"]
    assert "resumed  at step 4 of 6" in output


def test_equal_flops_for_every_model() -> None:
    small = replace_flat(RunConfig(), {"image_size": 16, "batch_size": 10})
    spent = {}
    for model in ("vit_micro_patch4_16", "resnet_micro"):
        steps, step = steps_within(1e12, replace_flat(small, {"model": model}), "digits")
        spent[model] = steps * step
        assert steps >= 10
    assert max(spent.values()) <= 1e12
    assert min(spent.values()) > 0.9e12
    with pytest.raises(ConfigError, match="pays for no step"):
        steps_within(1e3, small, "digits")


def test_mean_and_spread() -> None:
    found = [("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.9)]
    grid = Grid(Path("x"), [{"data": "d", "model": m, "variant": "", "seed": s, "top1": v, "flops": 1e9} for m, s, v in found])
    first, second = grid.summary()
    assert (first["mean"], first["seeds"]) == (pytest.approx(0.6), 2)
    assert first["spread"] == pytest.approx(math.sqrt(0.02))
    assert math.isnan(second["spread"])
    assert "0.6000" in str(grid)
    assert Cell("photos/x.csv", "m", "mixup", 3).folder == "x-m-mixup-seed3"
