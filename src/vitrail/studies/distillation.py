"""Learning from a teacher: none, soft, hard, or hard through a distillation token; from a CNN or a transformer (DeiT)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.studies.small import family, vit
from vitrail.studies.statistics import Mean, by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, directory, train_runs

EXAMPLES = """\
vitrail study distillation photos/ --budget 1e12
vitrail study distillation photos/ --teachers resnet --teacher-budget 4e12 --train hflip=0"""

NONE, TOKEN = "none", "token"
HEADS = ("class", "distillation", "joint")
TRUTH = "ground truth"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare ways of learning from a teacher (DeiT's table 3), teachers (table 2), and who agrees with whom (table 4)."""

    teachers: tuple[str, ...] = ("resnet", "vit")  # families of the teachers; each seed trains its own
    teacher_budget: float = 0.0  # training FLOPs of a teacher, 0 = the same as a student's
    scale: float = 1.0  # of all widths of the small models
    soft_weight: float = 0.1  # of the teacher in soft distillation (DeiT: 0.1, at temperature 3)
    temperature: float = 3.0  # of soft distillation


def students(config: Config) -> dict[str, dict[str, Any]]:
    """{method: settings} of one ViT with a class token, and of the same with a distillation token."""
    shape = {name: value for name, value in vit(config.image_size, config.scale).items() if name not in ("pool", "class_token")}
    plain = {"model": "vit_tiny_patch16_224", "overrides": {**shape, "pool": "cls", "class_token": True, "init": "normal"}}
    taught = {"model": "deit_tiny_distilled_patch16_224", "overrides": shape}
    soft = {"distill": "soft", "distill_weight": config.soft_weight, "distill_temperature": config.temperature}
    hard = {"distill": "hard", "distill_weight": 0.5}
    return {NONE: plain, "soft": {**plain, **soft}, "hard": {**plain, **hard}, TOKEN: {**taught, **hard}}


def measure(config: Config) -> list[Row]:
    """Train teachers, then students, then compare their answers; or go on."""
    methods, place = students(config), {"student": {"model": "vit_tiny_patch16_224"}}
    kinds = {name: family(name, config.image_size, config.scale) for name in config.teachers}
    plan = [
        Runs(models=kinds, budget=config.teacher_budget or None, folder="teachers"),
        Runs(models=place, variants={NONE: methods[NONE]}, folder="alone"),
    ]
    rows = [{**row, "teacher": ""} for row in train_runs("distillation", config, plan)]
    folders = {(row["model"], row["seed"]): row["folder"] for row in rows}
    out = directory("distillation", config)
    for teacher in config.teachers:
        for seed in config.seeds:
            runs = Runs(
                models=place, variants={name: settings for name, settings in methods.items() if name != NONE},
                settings={"teacher": str(out / folders[teacher, seed])}, folder=f"taught-by-{teacher}-seed{seed}",
            )  # fmt: skip
            taught = train_runs("distillation", dataclasses.replace(config, seeds=(seed,)), [runs])
            rows += [{**row, "teacher": teacher} for row in taught]
    return rows + _comparisons(config, out, rows)


def _comparisons(config: Config, out: Path, rows: Sequence[Row]) -> list[Row]:
    """Rows of how often two of a seed's models, or one of them and the truth, differ on the test pictures."""
    found: list[Row] = []
    for seed, group in by(rows, "seed").items():
        answers: dict[str, list[int]] = {}
        for row in group:
            name = _name(row)
            for head in HEADS if row["variant"] == TOKEN else ("",):
                told = answers_of(out / row["folder"], config.data, head)
                answers[f"{name}, {head}" if head else name] = told["answers"]
                answers[TRUTH] = told["truth"]
        names = [TRUTH, *(name for name in answers if name != TRUTH)]
        for first in names:
            for second in names:
                differ = sum(a != b for a, b in zip(answers[first], answers[second], strict=True))
                found.append({"seed": seed, "first": first, "second": second, "disagreement": differ / len(answers[first])})
    return found


def answers_of(run: Path, data: str, head: str = "") -> dict[str, list[int]]:
    """Answers and truth (class numbers) of a run on the pictures that judge it, kept in its directory."""
    from vitrail.checkpoints.io import read_json, write_text
    from vitrail.config import RunConfig, load
    from vitrail.data import open_data
    from vitrail.evaluation.classify import evaluate

    path = run / f"answers{'-' + head if head else ''}.json"
    if kept := read_json(path):
        return dict(kept)
    opened = open_data(data, load(RunConfig, run / "config.yaml").data_config)
    outputs = evaluate(str(run), opened, prediction=head, progress=False, workers=0).outputs
    assert outputs is not None
    found = {"answers": outputs.logits.argmax(1).tolist(), "truth": outputs.targets.tolist()}
    write_text(path, json.dumps(found) + "\n")
    return found


def _name(row: Mapping[str, Any]) -> str:
    """How a run is called: a teacher by its family, a student by its method and its teacher."""
    if not row["variant"]:
        return f"teacher {row['model']}"
    return f"{row['variant']}, {row['teacher']}" if row["teacher"] else str(row["variant"])


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """The methods against learning alone, the teachers against each other, and the matrix of disagreement."""
    runs = by([row for row in rows if "first" not in row], _name)
    pairs = by([row for row in rows if "first" in row], lambda row: (row["first"], row["second"]))
    differ = {pair: mean(row["disagreement"] for row in group) for pair, group in pairs.items()}
    tops = {name: mean(row["top1"] for row in group) for name, group in runs.items()}
    taught = [name for name in runs if runs[name][0]["teacher"]]
    best = max(taught, key=lambda name: tops[name].value)
    answer = f"Against learning alone, {verdict(difference(runs[best], runs[NONE]), best, 'no teacher')}."
    sentences = [
        f"{name}: {verdict(difference(runs[name], runs[NONE]), 'it', 'no teacher')}." for name in taught if name != best
    ]
    sentences.append(
        "A teacher's answers while a student learns are paid for out of the student's budget, its training is not."
    )
    if len(config.teachers) > 1:
        first, second = (f"{TOKEN}, {teacher}" for teacher in config.teachers[:2])
        told = verdict(difference(runs[first], runs[second]), f"a {config.teachers[0]}", f"a {config.teachers[1]}")
        sentences.append(f"As a teacher through the token, {told}.")
    for teacher in config.teachers:
        closer = _closer(pairs, teacher)
        if closer is not None:
            sentences.append(
                f"From the {teacher} that taught it the distillation head differs {_points(closer)} points more often than the "
                "class head does (DeiT: the distillation head is the closer one)."
            )
    order = list(runs)
    table = Table(
        "Top-1 in percent, mean and 95 % interval over seeds",
        ["run", "teacher", "top-1", "against no teacher", "differs from its teacher"],
        [
            [
                name, runs[name][0]["teacher"], tops[name].percent(),
                _points(difference(runs[name], runs[NONE])) if name in taught else "",
                _differs(differ, name, runs[name][0]["teacher"]),
            ]
            for name in order
        ],
        note="Points; of a model with a distillation token the mean of both heads answers.",
    )  # fmt: skip
    series = Series.of_means("", range(len(order)), (tops[n] for n in order), line=False)
    return Findings(
        answer=answer,
        sentences=sentences,
        tables=[table, *(_matrix(differ, teacher) for teacher in config.teachers if differ)],
        charts=[Chart("distillation", "Accuracy by way of learning", "", "top-1", [series], order, percent=True)],
        numbers={
            "top1": {name: m._asdict() for name, m in tops.items()},
            "disagreement": [{"first": a, "second": b, **m._asdict()} for (a, b), m in differ.items()],
        },
    )


def _differs(differ: Mapping[tuple[str, str], Mean], name: str, teacher: str) -> str:
    pair = (f"{name}, joint" if name.startswith(f"{TOKEN},") else name, f"teacher {teacher}")
    return f"{100 * differ[pair].value:.1f} %" if pair in differ else ""


def _closer(pairs: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], teacher: str) -> Mean | None:
    """How much more often the distillation head differs from its teacher than the class head does."""
    keys = [(f"{TOKEN}, {teacher}, {head}", f"teacher {teacher}") for head in ("distillation", "class")]
    return difference(pairs[keys[0]], pairs[keys[1]], "disagreement") if all(key in pairs for key in keys) else None


def _matrix(differ: Mapping[tuple[str, str], Mean], teacher: str) -> Table:
    """DeiT's table 4 for one teacher."""
    names = [TRUTH, f"teacher {teacher}", NONE, *(f"{TOKEN}, {teacher}, {head}" for head in HEADS)]
    shown = [name.removeprefix(f"{TOKEN}, {teacher}, ") for name in names]
    cells = [[f"{differ[a, b].value:.3f}" if a != b else "" for b in names] for a in names]
    return Table(
        f"How often two differ on the test pictures, the {teacher} teaching (DeiT, table 4)",
        ["", *shown],
        [[name, *row] for name, row in zip(shown, cells, strict=True)],
        note="Shares of the test pictures, means over seeds; class, distillation, joint: heads of the model with a token.",
    )


def _points(gain: Mean) -> str:
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
