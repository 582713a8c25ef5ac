"""Models as they are after some training, as far as nothing in them is zero."""

from __future__ import annotations

import torch

from vitrail.models import Model


def awake(model: Model) -> Model:
    """The model with values in place of parameters that are all zero: a branch that starts at zero hides its errors."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model
