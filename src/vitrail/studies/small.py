"""Small models of every family for studies: a few hundred thousand parameters each, for pictures of 32 to 96 pixels."""

from __future__ import annotations

from typing import Any

VIT: dict[str, Any] = {
    "width": 96, "depth": 6, "heads": 3, "mlp_dim": 384, "patch": [8, 8], "pool": "mean", "class_token": False,
    "position.kind": "1d",
}  # fmt: skip
