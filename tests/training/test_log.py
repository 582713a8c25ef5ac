import csv
import json
import math
from pathlib import Path

import pytest

from vitrail.training.log import Log, Meter, Screen, as_table, duration, read_records
from vitrail.training.status import Clock, bottleneck


def steps(folder: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_records(folder / "metrics.jsonl")]


def test_records_are_written_at_once_and_rounded(tmp_path: Path) -> None:
    with Log(tmp_path, tensorboard=False) as log:
        log.record("train", 3, epoch=0.1, loss=1 / 3, lr=math.inf)
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert line == {"kind": "train", "step": 3, "epoch": 0.1, "loss": 0.3333333, "lr": None}
        assert log.history == [line]


def test_reopening_cuts_back_to_the_step_and_to_whole_lines(tmp_path: Path) -> None:
    with Log(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.record("train", step)
        log.record("eval", 4, top1=0.5)
        log.record("final", 3, top1=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "ste')
    with Log(tmp_path, 4, tensorboard=False) as log:
        log.record("train", 5)
        assert len(log.history) == 6
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3), ("train", 4), ("eval", 4), ("train", 5)]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["kind"], int(row["step"])) for row in rows] == steps(tmp_path)


def test_table_has_a_column_for_every_name() -> None:
    text = as_table([{"kind": "train", "step": 1, "loss": 0.5}, {"kind": "eval", "step": 1, "top1": 0.25, "note": "a,b"}])
    assert text == 'kind,step,loss,top1,note\ntrain,1,0.5,,\neval,1,,0.25,"a,b"\n'
    assert as_table([]) == "kind,step\n"


def test_tensorboard_has_neither_gap_nor_duplicate_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path) as log:
        for step in range(1, 6):
            log.record("train", step, loss=float(step))
    with Log(tmp_path, 3) as log:
        for step in range(4, 7):
            log.record("train", step, loss=10.0 * step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with Log(tmp_path, main=False) as log:
        log.record("train", 1)
        log.sync()
        assert len(log.history) == 1
    assert list(tmp_path.iterdir()) == []


def test_meter_means_and_speeds() -> None:
    sums = {"loss": 3.0, "steps": 1.0}
    meter = Meter(sums)
    meter.add({"loss": 1.0}, seconds=0.5, wait=0.1, pictures=32)
    meter.add({"loss": 2.0}, seconds=0.5, wait=0.3, pictures=32)
    assert meter.means() == {"loss": 2.0}
    assert meter.speed == pytest.approx(64)
    assert meter.waiting == pytest.approx(0.4)
    sums.clear()
    assert meter.means() == {}


def test_screen_without_a_terminal_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen() as screen:
        screen.say("one [bold]line[/bold] that is " + "long " * 60)
        assert not screen.due
        screen.show("two")
    with Screen(main=False) as screen:
        screen.say("never")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("one [bold]line[/bold]")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 05 min"), (-1.0, "0 s"), (math.nan, "?"), (3599.8, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bottlenecks_are_named_with_a_way_out() -> None:
    clock = Clock()
    clock.spent = {"stepping": 10.0, "waiting": 0.0, "evaluating": 1.0, "saving": 0.5}
    assert bottleneck(clock, 0.1, 2) == ""
    assert bottleneck(clock, 0.37, 2) == "waiting for data 37%: more --workers, or `vitrail data pack`"
    assert bottleneck(clock, 0.37, 2, packable=False) == "waiting for data 37%: more --workers"
    assert "--workers 2 or more" in bottleneck(clock, 0.37, 0)
    clock.spent["evaluating"] = 5.0
    assert "larger --eval-every" in bottleneck(clock, 0.1, 2)
    clock.spent |= {"evaluating": 0.0, "saving": 5.0}
    assert "--save-every-minutes" in bottleneck(clock, 0.1, 2)


def test_clock_charges_accounts_and_extrapolates() -> None:
    clock = Clock()
    assert math.isnan(clock.remaining(5))
    for _ in range(2):
        with clock.measure("stepping"):
            pass
    clock.spent = {"stepping": 4.0, "waiting": 1.0, "evaluating": 2.0, "saving": 0.0}
    assert clock.remaining(10) == pytest.approx(30)
    assert clock.share("evaluating") == pytest.approx(1 / 3)
    clock.before = 100.0
    assert 100 < clock.total < 101
