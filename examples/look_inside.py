"""What does a trained ViT look at? Writes one picture per input: where the last layer attends, and the rollout.

python examples/look_inside.py runs/photos holiday/1.jpg holiday/2.jpg
"""

from __future__ import annotations

from pathlib import Path

import tyro
from PIL import Image

import vitrail
from vitrail.data.transforms import Normalise, decode_for_eval
from vitrail.inspection.attention import look
from vitrail.inspection.draw import overlay


def main(model: Path, pictures: tuple[Path, ...], /, out: Path = Path("attention")) -> None:
    """Draw the attention of `model` over each picture, side by side: last layer, all layers combined."""
    net = vitrail.load_model(model)
    assert net.card is not None
    out.mkdir(parents=True, exist_ok=True)
    for path in pictures:
        pixels = decode_for_eval(str(path), net.card.preprocess)
        view = look(net, Normalise(net.card.preprocess)(pixels[None]))
        if view is None:
            raise SystemExit(f"{model} has no attention to look at")
        left, right = (overlay(pixels, placed.over(*pixels.shape[1:])[0].mean(0)) for placed in (view.last, view.rollout))
        side_by_side = Image.new("RGB", (left.width + right.width, left.height))
        side_by_side.paste(left, (0, 0))
        side_by_side.paste(right, (left.width, 0))
        side_by_side.save(out / f"{path.stem}.png")
        layers = ", ".join(f"{distance.mean():.1f}" for distance in view.distances.values())
        print(f"{out / path.stem}.png: asked by {view.asking}; mean attention distance per layer in pixels: {layers}")


if __name__ == "__main__":
    tyro.cli(main)
