"""`vitrail convert`: any checkpoint in, another format out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.parse import parse

EXAMPLES = """\
vitrail convert ViT-B_16.npz vit_base/                       the original JAX weights, labels and preprocessing beside them
vitrail convert runs/photos-resnet50 out/ --format timm      a folder that timm's own loader reads
vitrail convert deit.pth deit_384/ --image-size 384          position embeddings resized"""


@dataclass(frozen=True)
class Arguments:
    """Read weights of any known naming and write them in another: vitrail, timm, transformers, torchvision or google."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .safetensors, .npz, .pth or .bin file, a folder or a run directory."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to write; it must not exist yet (vitrail format: also a file ending in .safetensors)."""
    format: Literal["vitrail", "timm", "transformers", "torchvision", "google"] = "vitrail"  # naming to write
    image_size: tuple[int, int] | None = None  # height,width in pixels to resize position embeddings for
    num_classes: int | None = None  # another number gives a new head, initialised to zero
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """What the weights' shapes cannot tell, such as heads=12."""


def run(words: Sequence[str]) -> None:
    """Convert, and say where the weights are."""
    arguments = parse(Arguments, words, prog="vitrail convert", examples=EXAMPLES)
    from vitrail.checkpoints import load_model, save_model

    changes = dict(arguments.overrides)
    for name in ("image_size", "num_classes"):
        if getattr(arguments, name) is not None:
            changes[name] = getattr(arguments, name)
    model = load_model(arguments.source, **changes)
    written = save_model(model, arguments.target, format=arguments.format)
    size = sum(p.numel() for p in model.parameters())
    print(f"{written}: {model.name or model.family}, {size:,} parameters, {arguments.format} format")
