"""`vitrail inspect`: where a model looks, what it has learnt, and how its layers relate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail inspect runs/photos-vit_tiny_patch16_224 cat.jpg dog.jpg          every view that the model has
vitrail inspect model.safetensors photos/ --views attention rollout --out looked/
vitrail inspect runs/digits-vit digits --compare runs/digits-swin         two models side by side
vitrail inspect runs/motion-vivit clip.mp4                                attention over space and time
vitrail inspect vit_micro_patch4_16                                       weights alone; a name gives random ones"""


@dataclass(frozen=True)
class Arguments:
    """Look into a model: attention, rollout, relevance, distances, filters, positions, layers; files and one page.

    Views: attention, rollout, relevance, distance, filters, positions, biases, tokens, lens, cka. A view that has no meaning
    for a model is refused by name.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a checkpoint, a folder with one, or a name that `vitrail models` lists (random weights)."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES|CLIP|DATA")] = ()
    """Pictures or clips: files, folders, patterns; or one data set: a table, shards, an Arrow folder, an embedded set."""
    compare: str = ""  # another model, shown beside it on the same pictures
    views: tuple[str, ...] = ()  # only these; by default all that the model has
    out: str = ""  # directory of the page and the files; by default inspect/<model>
    shown: int = 4  # pictures or clips drawn
    measured: int = 32  # pictures or clips behind mean distances and the comparison of layers
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps


def run(words: Sequence[str]) -> None:
    """Write everything and name the page."""
    arguments = parse(Arguments, words, prog="vitrail inspect", examples=EXAMPLES)
    import sys

    from vitrail.checkpoints import load_model
    from vitrail.cost import pick_device
    from vitrail.inspection.inspect import inspect
    from vitrail.models import MODELS, Model, create_model

    device = pick_device(arguments.device)

    def found(name: str) -> Model:
        if name in MODELS and not Path(name).exists():
            import torch

            torch.manual_seed(0)
            print(f"{name} is a name of the registry: its weights are random", file=sys.stderr)
            return create_model(name).to(device)
        return load_model(name).to(device)

    name = Path(arguments.model).name
    page, notes = inspect(
        found(arguments.model), arguments.inputs, Path(arguments.out or f"inspect/{Path(arguments.model).stem}"), name=name,
        views=arguments.views, shown=arguments.shown, measured=arguments.measured,
        other=found(arguments.compare) if arguments.compare else None, other_name=Path(arguments.compare).name,
        command=["vitrail", "inspect", *words],
    )  # fmt: skip
    for note in notes:
        print(f"not read  {note}", file=sys.stderr)
    print(f"page      {page}  (open it in a browser)")
