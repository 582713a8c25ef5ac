"""Parameters and FLOPs of several models, counted in one process without the typing hook, which would take most of the time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

_COUNT = """
import json, sys
from vitrail.cost import count_flops, count_parameters
from vitrail.models import ShapesOnly, create_model

found = {}
for name, shape in json.loads(sys.argv[1]).items():
    with ShapesOnly():
        model = create_model(name)
    found[name] = count_parameters(model), count_flops(model, shape and tuple(shape)) if sys.argv[2] == "flops" else 0
print(json.dumps(found))
"""


def measured(
    run_python: Callable[..., str], shapes: Mapping[str, tuple[int, ...] | None], flops: bool = True
) -> dict[str, list[int]]:
    """{name: [parameters, FLOPs of one input of the shape, or of the model's own where it is None]}."""
    return json.loads(run_python(_COUNT, json.dumps(shapes), "flops" if flops else ""))
