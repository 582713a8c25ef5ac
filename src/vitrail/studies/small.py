"""Small models of every family for studies, for pictures of 32 to 96 pixels; at scale 1 about half a million parameters."""

from __future__ import annotations

from typing import Any

from vitrail.config import ConfigError, unknown

FAMILIES = ("resnet", "hybrid", "cvt", "swin", "vit")


def vit(image_size: tuple[int, int], scale: float = 1.0) -> dict[str, Any]:
    """Settings of a small plain ViT: patches of 8 pixels from 48 pixels on, of 4 below."""
    patch = 8 if min(image_size) >= 48 else 4
    width = _width(96, scale, 3)
    return {
        "width": width, "depth": 6, "heads": 3, "mlp_dim": 4 * width, "patch": [patch, patch], "pool": "mean",
        "class_token": False, "position.kind": "1d",
    }  # fmt: skip


def family(name: str, image_size: tuple[int, int], scale: float = 1.0) -> dict[str, Any]:
    """A family's small model as settings of a run: "model" (a name of the registry) and "overrides".

    scale multiplies every width: cost and parameters grow with its square. Raises ConfigError for an unknown family, and for
    sides that are not multiples of 16.
    """
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    if any(side % 16 for side in image_size):
        near = ",".join(str(max(16, round(side / 16) * 16)) for side in image_size)
        raise ConfigError(
            f"image_size {image_size[0]},{image_size[1]}: families with stages take multiples of 16; nearest: {near}"
        )
    side = min(image_size)
    if name == "resnet":
        return {"model": "resnet18", "overrides": {"width": _width(16, scale)}}
    if name == "hybrid":  # one residual stage of stride 4, then a ViT of the same grid as the plain one
        cell = 2 if side >= 48 else 1
        inside = {key: value for key, value in vit(image_size, scale).items() if key != "patch"}
        trunk = {
            "trunk.depths": [1],
            "trunk.widths": [_width(64, scale, 32)],
            "trunk.stem_width": _width(32, scale, 8),
            "trunk.groups": 8,
        }
        return {"model": "hybrid_micro", "overrides": {**inside, **trunk, "patch": [cell, cell], "depth": 5}}
    if name == "cvt":
        widths = [_width(width, scale, heads) for width, heads in ((32, 1), (64, 2), (128, 4))]
        return {
            "model": "cvt_13",
            "overrides": {"widths": widths, "depths": [1, 1, 2], "heads": [1, 2, 4], "class_token": False, "init": "xavier"},
        }
    if name == "swin":  # the window is as large as the last stage's map, so that no stage is padded
        window = side // 16 if side >= 48 else 4
        return {
            "model": "swin_tiny_patch4_window7_224",
            "overrides": {
                "width": _width(32, scale), "depths": [2, 2, 2], "heads": [1, 2, 4], "window": [window, window],
                "init": "xavier",
            },
        }  # fmt: skip
    return {"model": "vit_tiny_patch16_224", "overrides": vit(image_size, scale)}


def _width(full: int, scale: float, multiple: int = 1) -> int:
    """A scaled width that its heads or groups divide."""
    return max(round(full * scale / multiple), 1) * multiple
