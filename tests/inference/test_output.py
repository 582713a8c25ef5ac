from __future__ import annotations

import csv
import io
import json

import pytest

from vitrail.config import ConfigError
from vitrail.inference import Prediction, write_predictions

FOUND = [
    Prediction("a.png", "cat", 0.91, (("cat", 0.91), ("dog, wild", 0.05)), ("cat",)),
    Prediction("ü\nb.png", "dog, wild", 0.5, (("dog, wild", 0.5),), ("dog, wild", "cat")),
    Prediction("c.png", error="not a picture"),
]


def written(format: str, predictions: list[Prediction] = FOUND) -> tuple[str, tuple[int, int]]:
    file = io.StringIO()
    counts = write_predictions(iter(predictions), format, file)
    return file.getvalue(), counts


def test_table_has_one_line_per_picture() -> None:
    text, counts = written("table")
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["91.0", "%", "cat", "a.png"]
    assert "dog, wild, cat" in lines[2]
    assert r"ü\nb.png" in lines[2]
    assert lines[3].endswith("c.png: not a picture")
    assert counts == (2, 1)


def test_json_lines_hold_everything() -> None:
    text, counts = written("jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["path"] for row in rows] == [p.path for p in FOUND]
    assert rows[0]["top"] == [["cat", 0.91], ["dog, wild", 0.05]]
    assert rows[1]["labels"] == ["dog, wild", "cat"]
    assert rows[2]["error"] == "not a picture"
    assert [row["probability"] for row in rows] == [0.91, 0.5, None]
    assert "ü" in text
    assert counts == (2, 1)


def test_csv_is_read_back_by_a_csv_reader() -> None:
    rows = list(csv.DictReader(io.StringIO(written("csv")[0])))
    assert [row["path"] for row in rows] == [p.path for p in FOUND]
    assert rows[0]["probability"] == "0.910000"
    assert rows[0]["top"] == "cat=0.910000|dog, wild=0.050000"
    assert rows[1]["labels"] == "dog, wild|cat"
    assert (rows[2]["probability"], rows[2]["error"]) == ("", "not a picture")


def test_names_that_are_no_text_survive_as_json_and_harm_no_format(tmp_path) -> None:  # type: ignore[no-untyped-def]
    odd = Prediction("bad\udcff\x1b[31m.png", "cat", 1.0, (("cat", 1.0),), ("cat",))
    for format in ("table", "jsonl", "csv"):
        text, _ = written(format, [odd])
        (tmp_path / format).write_text(text, encoding="utf-8")
        if format == "jsonl":
            assert json.loads(text)["path"] == odd.path
        if format == "table":
            assert "\x1b" not in text


def test_nothing_given_is_said_with_the_nearest_label() -> None:
    text, _ = written("table", [Prediction("a.png", "cat", 0.2, (("cat", 0.2),), ())])
    assert "none; nearest cat" in text


def test_lines_come_as_the_answers_do() -> None:
    file = io.StringIO()

    def answers():  # type: ignore[no-untyped-def]
        yield FOUND[0]
        assert "a.png" in file.getvalue()
        yield FOUND[1]

    assert write_predictions(answers(), "jsonl", file) == (2, 0)


def test_an_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'jsonl'"):
        written("json")
