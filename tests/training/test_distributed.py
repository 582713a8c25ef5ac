"""Two processes on one machine do what one does with the same total batch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitrail.training.distributed import Ranks, joined_ranks, unsynchronised
from vitrail.training.log import read_records

TWO = """
import json, os, socket, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from vitrail.training import plan
from vitrail.training.interrupt import Stopped
from vitrail.training.loop import train
from vitrail.cost import Memory
torch.set_num_threads(1)
plan.count_flops, plan.forecast_memory = (lambda *_: 1), (lambda *_, **__: Memory(1, 1, 1, 1, 1))
folder = Path(sys.argv[1])
draws = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (97, 3, 16, 16), dtype=torch.uint8, generator=draws)
data = [(image // (1 + i % 3), i % 3) for i, image in enumerate(pixels)]
settings = dict(model="vit_micro_patch4_16", overrides={"depth": 2}, batch_size=16, accumulate=2, steps=9, device="cpu",
                precision="fp32", ema=0.9, workers=0, optimizer="sgd", lr=0.05, affine_degrees=10.0, tensorboard=False)

def forks(world, out, run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 99
            try:
                result = run(str(folder / out))
                (folder / f"{out}-{rank}.json").write_text(json.dumps(
                    {"metrics": result.metrics, "main": result.is_main, "report": result.report is not None}))
                code = 0
            except Stopped as stop:
                code = stop.code
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def difference(a, b):
    mine, theirs = (load_file(folder / out / "model" / "model.safetensors") for out in (a, b))
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)

def stopping(out):
    import signal
    from vitrail.training import loop
    if os.environ["RANK"] == "1":  # only one of the two is asked to stop, in its fifth step
        original, calls = loop.optimiser_step, []
        def step(*a, **k):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*a, **k)
        loop.optimiser_step = step
    return train(data=data, out=out, **settings)

codes = {"one": forks(1, "one", lambda out: train(data=data, out=out, **settings)),
         "two": forks(2, "two", lambda out: train(data=data, out=out, **settings)),
         "stopped": forks(2, "stopped", stopping)}
codes["resumed"] = forks(2, "stopped", lambda out: train(resume=out, data=data))
print(json.dumps({"codes": codes, "two": difference("one", "two"), "resumed": difference("two", "stopped")}))
"""


def test_two_processes_equal_one(run_python: Callable[..., str], tmp_path: Path) -> None:
    result = json.loads(run_python(TWO, str(tmp_path)).splitlines()[-1])
    assert result["codes"]["one"] == [0]
    assert result["codes"]["two"] == [0, 0]
    assert result["two"] < 1e-5
    one, main, other = (json.loads((tmp_path / name).read_text()) for name in ("one-0.json", "two-0.json", "two-1.json"))
    assert main["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert other["metrics"] == main["metrics"]
    assert (main["main"], main["report"], other["main"], other["report"]) == (True, True, False, False)
    records = [read_records(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    assert [(r["kind"], r["step"]) for r in records[0]] == [(r["kind"], r["step"]) for r in records[1]]
    for a, b in zip(*records, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)
    # A signal to one process stops both after the same step, and what was saved goes on to the same weights.
    assert result["codes"]["stopped"] == [143, 143]
    assert result["codes"]["resumed"] == [0, 0]
    assert result["resumed"] == 0.0


def test_one_process_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_ranks("cpu") as ranks:
        assert ranks == Ranks(torch.device("cpu"), 0, 1)
        assert ranks.main
        assert ranks.total([1.5, 2.0]) == [1.5, 2.0]
        assert ranks.agree("x") == "x"
        assert ranks.gather(3) == [3]
        model = torch.nn.Linear(2, 2)
        assert ranks.wrap(model) is model
        with unsynchronised(model, True):
            pass
