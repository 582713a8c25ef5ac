from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro

from vitrail.cli.parse import parse
from vitrail.studies import STUDIES
from vitrail.studies.study import study


@dataclass(frozen=True)
class Arguments:
    """Several words."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    views: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("words", "views"),
    [
        (["--views", "lens,cka"], ("lens", "cka")),
        (["--views", "lens", "cka"], ("lens", "cka")),
        (["--views", "lens,cka", "filters"], ("lens", "cka", "filters")),
        (["--views", "runs/a,b", "mean=0.5,0.5"], ("runs/a,b", "mean=0.5,0.5")),  # a path, a setting
        ([], ()),
    ],
)
def test_names_come_apart_or_joined_by_commas(words: list[str], views: tuple[str, ...]) -> None:
    assert parse(Arguments, words, prog="x", examples="").views == views


def test_files_stay_whole_and_numbers_are_joined() -> None:
    found = parse(Arguments, ["one,two", "three", "--seeds", "0,1"], prog="x", examples="")
    assert found == Arguments(files=("one,two", "three"), seeds=(0, 1))


@pytest.mark.parametrize("name", STUDIES)
def test_the_examples_of_every_study_are_read(name: str) -> None:
    module = study(name)
    for line in module.EXAMPLES.splitlines():
        words = line.split("  ")[0].split()
        assert words[:3] == ["vitrail", "study", name]
        config = parse(module.Config, words[3:], prog="x", examples="")
        if "--starts" in words:
            assert len(config.starts) == 3
