"""`vitrail convert`: any checkpoint in, another format out, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.parse import parse
from vitrail.cli.preprocess import reading

EXAMPLES = """\
vitrail convert ViT-B_16.npz vit_base/                       the original JAX weights, labels and preprocessing beside them
vitrail convert runs/photos-resnet50 out/ --to timm          a folder that timm's own loader reads
vitrail convert timm/vit_tiny_patch16_224.augreg_in21k ti/   from the hub
vitrail convert weights.pth out/ --preprocess imagenet       what the weights do not tell
vitrail convert deit.pth deit_384/ --image-size 384          position embeddings resized"""


@dataclass(frozen=True)
class Arguments:
    """Read weights of any known naming and write them in another."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .safetensors, .npz, .pth or .bin file, a folder, a run directory, a repository of the hub or a URL."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to write; it must not exist yet (vitrail format: also a file ending in .safetensors)."""
    to: Literal[
        "vitrail", "dinov2", "google", "microsoft", "pyslowfast", "pytorchvideo", "scenic", "timesformer", "timm",
        "torchvision", "transformers",
    ] = "vitrail"  # fmt: skip
    """The naming to write."""
    image_size: tuple[int, int] | None = None  # height,width in pixels to resize position embeddings for
    num_classes: int | None = None  # another number gives a new head, initialised to zero
    preprocess: tuple[str, ...] = ()  # imagenet, half, the name of published weights, and fields: crop_fraction=0.9 mean=0.5
    check: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: it is)")] = True
    """Whether what was written is read back, by the peer too where it is installed, and its answers compared."""
    overrides: Annotated[Mapping[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """What the weights' shapes cannot tell, such as heads=12."""


def run(words: Sequence[str]) -> int:
    """Convert, check, and say where the weights are; 1 if the answers differ."""
    arguments = parse(Arguments, words, prog="vitrail convert", examples=EXAMPLES)
    from vitrail.checkpoints import load_model, save_model
    from vitrail.checkpoints.parity import check_written

    changes = dict(arguments.overrides)
    for name in ("image_size", "num_classes"):
        if getattr(arguments, name) is not None:
            changes[name] = getattr(arguments, name)
    model = load_model(arguments.source, preprocess=reading(arguments.preprocess), **changes)
    written = save_model(model, arguments.target, format=arguments.to)
    size = sum(p.numel() for p in model.parameters())
    print(f"{written}: {model.name or model.family}, {size:,} parameters, {arguments.to} format")
    if not arguments.check:
        return 0
    parity = check_written(model, written, arguments.to)
    print("\n".join(f"  {line}" for line in parity.lines()))
    return 0 if parity.agrees else 1
