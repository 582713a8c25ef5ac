"""`vitrail inspect`: every view that a model has, as files and on one page; two models side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from vitrail.checkpoints.io import write_text
from vitrail.config import ConfigError
from vitrail.cost import count_parameters
from vitrail.inspection import drawn
from vitrail.inspection.page import render
from vitrail.inspection.run import environment
from vitrail.inspection.subject import Subject, subject
from vitrail.inspection.views import VIEWS, choose
from vitrail.models import Model

PAGE = "inspect.html"
WRITTEN = "inspect.json"  # names the files of the page, so that the next one can take their place
ABOUT = {
    "attention": "Point at a patch of a picture to see where it looks in one layer and head; below the picture are the tokens "
    "that have no place. The brighter a pane, the larger its share, relative to the brightest. Arrow keys move the patch too.",
    "rollout": "All layers joined (Abnar and Zuidema 2020): heads averaged, the shortcut counted as half, or left out as in "
    "the ViT paper. Merged and pooled tokens are traced back as the mean of what they are made of; where windows overlap, "
    "what two of them share counts in both, which shows as a regular grid.",
    "relevance": "For the likeliest class: Grad-CAM on the last map, and attention weighted by its gradient joined through "
    "the layers (Chefer et al. 2021). Bright panes speak for the class.",
    "distance": "Mean distance between a patch and what it attends to, weighted by attention: a dot is a head, the line the "
    "mean of a layer, dashed what attention to all in reach alike would give.",
    "filters": "Principal components of the filters that read the pixels, the strongest first, each over its own range.",
    "positions": "A tile shows how alike the position of one place is to all others (cosine): a tile's place in the grid is "
    "the place that is compared.",
    "biases": "What a head prefers by offset alone. A tile is a head; its middle is no offset, warm is more "
    "and cold less than the head's mean, which softmax does not see.",
    "tokens": "Cosine similarity of class and distillation token after every block, mean over the pictures.",
    "lens": "The classifier applied to the tokens after each block, the later blocks left out.",
    "cka": "Linear centred kernel alignment between the states after every two blocks: 1 where they are the same up to "
    "rotation and scale.",
}
OF_CLIPS = (
    "Of a clip, the frames shown share one scale; the chart says how the same maps spread over all frames, dotted an even "
    "spread."
)
CLIPS = {
    "attention": "The frames of a clip lie in reading order; Page Up and Page Down move through time.",
    "rollout": OF_CLIPS,
    "relevance": OF_CLIPS,
}


def inspect(
    model: Model,
    inputs: Sequence[str],
    out: Path,
    *,
    name: str = "",
    views: Sequence[str] = (),
    shown: int = 4,
    measured: int = 32,
    other: Model | None = None,
    other_name: str = "",
    command: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Write all views (or those asked for) into `out`; returns the page's path and what could not be read or drawn.

    The files of an earlier call in `out` are replaced once all new ones are there; files of others stay.
    inputs: pictures, clips or a data set (see `subject`); `shown` of them are drawn, `measured` of them are behind the means.
    `other` is inspected beside the model, on the same inputs. Raises ConfigError for a view that does not exist, one that was
    asked for and that a model has not, and inputs that cannot be read.
    """
    if min(shown, measured) < 1:
        raise ConfigError(f"shown and measured must be at least 1, got {shown} and {measured}")
    pairs = [(model, name or model.name or model.family)]
    if other is not None:
        pairs.append((other, other_name or other.name or other.family))
        if pairs[0][1] == pairs[1][1]:
            pairs = [(each, f"{label} ({letter})") for (each, label), letter in zip(pairs, "AB", strict=True)]
    looked: list[tuple[Subject, list[str], dict[str, str]]] = []
    notes: list[str] = []
    for each, label in pairs:
        one, problems = subject(each, label, inputs, max(shown, measured))
        looked.append((one, *choose(each, label, views, len(one.samples))))
        notes += [problem for problem in problems if problem not in notes]
    with _instead_of_earlier(out) as made:
        sides = [(one, made / "ab"[place] if other is not None else made, chosen, refused)
                 for place, (one, chosen, refused) in enumerate(looked)]  # fmt: skip
        write_text(made / PAGE, _page(sides, made, shown, notes, command))
    return out / PAGE, notes


@contextmanager
def _instead_of_earlier(out: Path) -> Iterator[Path]:
    """A folder whose files move into `out` when the block succeeds; what an earlier call left there goes."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as temporary:
        yield Path(temporary)
        files = sorted(path.relative_to(temporary).as_posix() for path in Path(temporary).rglob("*") if path.is_file())
        for name in set(_earlier(out)) - set(files):
            (out / name).unlink(missing_ok=True)
            if (folder := (out / name).parent) != out and not any(folder.iterdir()):
                folder.rmdir()
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / name).replace(out / name)
        write_text(out / WRITTEN, json.dumps({"files": files}, indent=1) + "\n")


def _earlier(out: Path) -> list[str]:
    """Files that an earlier call wrote into `out`, as it noted them; never any outside of `out`."""
    try:
        names = json.loads((out / WRITTEN).read_text(encoding="utf-8"))["files"]
        inside = [name for name in names if (out / name).resolve().is_relative_to(out.resolve())]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in inside if (out / name).is_file()]


def _page(
    sides: Sequence[tuple[Subject, Path, list[str], dict[str, str]]], out: Path, shown: int, notes: Sequence[str],
    command: Sequence[str],
) -> str:  # fmt: skip
    sections = [_section(view, sides, out, shown) for view in VIEWS if any(view in side[2] for side in sides)]
    first = sides[0][0]
    context: dict[str, Any] = {
        "title": " · ".join(side[0].name for side in sides),
        "subtitle": _subtitle(sides),
        "sections": [section for section in sections if section],
        "refused": _refused(sides),
        "notes": notes,
        "reproduce": {"command": shlex.join(command), "environment": environment("cpu")},
        "script": _script(),
    }
    context["policy"] = base64.b64encode(hashlib.sha256(context["script"].encode()).digest()).decode()
    titles = {f"view-{s['view']}": s["title"] for s in context["sections"]}
    extra = {f"view-{s['view']}": s for s in context["sections"]}
    titles |= {"refused": "Views it has not", "reproduce": "Reproduce"}
    context["hard"] = max(first.preprocess.image_size) <= 64
    return render("inspect.html.jinja", titles, extra | context)


def _section(
    view: str, sides: Sequence[tuple[Subject, Path, list[str], dict[str, str]]], out: Path, shown: int
) -> dict[str, Any] | None:
    columns = []
    for one, folder, chosen, refused in sides:
        if view in chosen:
            columns.append({"name": one.name, "blocks": drawn.DRAWERS[view](one, folder, shown)})
        else:
            reason = refused.get(view, "not asked for")
            columns.append({"name": one.name, "blocks": [{"kind": "text", "text": f"Not shown: {reason}."}]})
    if view == "cka" and len(sides) == 2 and all(view in side[2] for side in sides):
        between = drawn.cka(sides[0][0], out, shown, sides[1][0])
        columns.append({"name": "between the two", "blocks": between})
    about = [ABOUT[view], *([CLIPS[view]] if view in CLIPS and any(side[0].preprocess.frames for side in sides) else [])]
    return {"view": view, "title": VIEWS[view], "about": " ".join(about), "columns": columns}


def _subtitle(sides: Sequence[tuple[Subject, Path, list[str], dict[str, str]]]) -> str:
    told = [f"{one.name}: {one.model.family}, {count_parameters(one.model) / 1e6:.3g} M parameters" for one, *_ in sides]
    first = sides[0][0]
    noun = "clip" if first.preprocess.frames else "picture"
    count = len(first.samples)
    looked = f"looked at with {count} {noun}{'' if count == 1 else 's'}" if count else f"its weights alone, without {noun}s"
    return f"{'; '.join(told)}; {looked}."


def _refused(sides: Sequence[tuple[Subject, Path, list[str], dict[str, str]]]) -> list[dict[str, str]]:
    return [{"name": one.name if len(sides) > 1 else "", "view": VIEWS[view], "reason": refused[view]}
            for one, _, _, refused in sides for view in VIEWS if view in refused]  # fmt: skip


def _script() -> str:
    return files("vitrail.inspection").joinpath("templates/inspect.js").read_text(encoding="utf-8")
