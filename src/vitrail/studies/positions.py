"""Position embeddings: which kind, and at the stem, before every layer, or there from one shared table (ViT, appendix D.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from vitrail.config import ConfigError
from vitrail.studies.small import vit
from vitrail.studies.statistics import by, difference, mean, verdict
from vitrail.studies.study import Chart, Findings, Row, Runs, Series, StudyConfig, Table, train_runs

EXAMPLES = """\
vitrail study positions photos/ --budget 1e12
vitrail study positions digits --image-size 20 --kinds none 1d sincos --places stem --train channels=1 hflip=0"""

NONE, RELATIVE = "none", "relative"
PLACES = {"stem": "at the stem", "layers": "before every layer", "shared": "before every layer, shared"}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Compare position embeddings of a plain ViT (the paper found that any is better than none, and which hardly matters)."""

    kinds: tuple[Literal["none", "1d", "2d", "sincos", "relative"], ...] = ("none", "1d", "2d", "relative")
    """Position embeddings to compare; none always takes part."""
    places: tuple[Literal["stem", "layers", "shared"], ...] = ("stem", "layers", "shared")
    """Where they are added: at the stem, before every layer from a table of its own, or there from one shared table."""
    model: str = "vit_tiny_patch16_224"  # a plain ViT
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings of the model, over those of the small one that studies use (width 96, depth 6, patch 8)."""


def variants(config: Config) -> dict[str, dict[str, Any]]:
    """{name: settings}; relative positions act in every layer, so they have tables of their own or one shared table."""
    if not config.places:
        raise ConfigError(f"places is empty; give one or more of {', '.join(PLACES)}")
    found = {NONE: {"position.kind": NONE}}
    for kind in config.kinds:
        for place in config.places if kind != NONE else ():
            if kind == RELATIVE and place == "stem":
                continue
            found[f"{kind} {place}"] = {"position.kind": kind, "position.place": place}
    if RELATIVE in config.kinds and not {"layers", "shared"} & set(config.places):
        found[f"{RELATIVE} layers"] = {"position.kind": RELATIVE, "position.place": "layers"}
    common = {**vit(config.image_size), **config.overrides}
    return {name: {"overrides": {**common, **change}} for name, change in found.items()}


def measure(config: Config) -> list[Row]:
    """Train, or go on."""
    return train_runs("positions", config, [Runs(models=[config.model], variants=variants(config))])


def conclude(config: Config, rows: Sequence[Row]) -> Findings:
    """What a position is worth, and whether its kind and place matter."""
    cells = by(rows, "variant")
    tops = {name: mean(row["top1"] for row in group) for name, group in cells.items()}
    ranked = sorted((name for name in tops if name != NONE), key=lambda name: -tops[name].value)
    if not ranked:
        return Findings(answer=f"Without positions: top-1 {tops[NONE].percent()} %. Nothing else was asked for.")
    gains = {name: difference(cells[name], cells[NONE]) for name in ranked}
    best, worst = ranked[0], ranked[-1]
    better = [name for name in ranked if gains[name].low > 0]
    answer = f"Against no positions, {verdict(gains[best], best, 'none')}"
    if better and len(ranked) > 1:
        told = "all" if len(better) == len(ranked) else f"{len(better)} of {len(ranked)}"
        answer += f"; {told} of the position embeddings are better than none beyond doubt"
    sentences = []
    if len(ranked) > 1:
        spread = difference(cells[best], cells[worst])
        sentences.append(f"Between the best and the worst embedding: {verdict(spread, best, worst)}.")
    for place, told in PLACES.items():
        there = [name for name in ranked if name.endswith(f" {place}")]
        if there:
            sentences.append(f"Mean over kinds {told}: {100 * sum(tops[n].value for n in there) / len(there):.1f} %.")
    kinds = list(dict.fromkeys(name.split()[0] for name in variants(config) if name != NONE))
    places = [place for place in PLACES if any(name.endswith(f" {place}") for name in ranked)]
    table = Table(
        "Top-1 accuracy in percent, mean and 95 % interval over seeds",
        ["position", *(PLACES[place] for place in places)],
        [
            [NONE, tops[NONE].percent(), *([""] * (len(places) - 1))],
            *([kind, *(tops[n].percent() if (n := f"{kind} {place}") in tops else "" for place in places)] for kind in kinds),
        ],
        note="Relative positions meet the query inside every layer, so there are none at the stem.",
    )
    gain_table = Table(
        "Points gained over no positions, seed by seed",
        ["position", "gain", "95 % interval"],
        [[n, f"{100 * g.value:+.1f}", f"{100 * g.low:+.1f} to {100 * g.high:+.1f}"] for n, g in gains.items()],
    )
    order = [NONE, *ranked]
    series = Series.of_means("", range(len(order)), (tops[n] for n in order), line=False)
    return Findings(
        answer=f"{answer}.",
        sentences=sentences,
        tables=[table, gain_table],
        charts=[Chart("positions", "Accuracy by position embedding", "", "top-1", [series], order, percent=True)],
        numbers={
            "top1": {name: m._asdict() for name, m in tops.items()},
            "gain_over_none": {name: gap._asdict() for name, gap in gains.items()},
        },
    )
