"""Whether what was written is what was read: through our own reader, and through the peer's code where it is installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.models import Model

from .io import read_state
from .mapping import CheckpointError
from .store import SOURCES, load_model

_OF_TRAINING = ("dropout", "drop_path", "init")
TOLERANCE = 1e-4  # of the largest answer; float32 sums in another order differ by about 1e-6


@dataclass(frozen=True)
class Parity:
    """What a written checkpoint holds and how far its answers to a fixed input lie from the model's."""

    tensors: int
    renamed: int
    scale: float  # the largest answer
    difference: float  # read back by us
    peer: str = ""  # name and version, "" where none was asked
    peer_difference: float | None = None
    remark: str = ""  # why no peer was asked, or what it says
    guessed: tuple[str, ...] = ()  # settings that the format does not say and that were read back as others

    @property
    def agrees(self) -> bool:
        """Whether all differences are rounding."""
        worst = max(self.difference, self.peer_difference or 0.0)
        return worst <= TOLERANCE * max(self.scale, 1e-30)

    def lines(self) -> list[str]:
        """The report, one line per fact."""
        found = [
            f"tensors      {self.tensors}, {self.renamed} renamed",
            f"read back    largest difference {self.difference:.1e} of {self.scale:.3g} on a fixed input",
        ]
        if self.peer_difference is not None:
            found.append(f"{self.peer:<12} loads it strictly; largest difference {self.peer_difference:.1e}")
        if self.guessed and not self.agrees:
            found.append(f"differs      the format does not say {'; '.join(self.guessed)}: give them to whoever reads it")
        return found + ([f"peer         {self.remark}"] if self.remark else [])


@torch.inference_mode()
def check_written(model: Model, path: Path, format: str) -> Parity:
    """Load what `save_model` wrote at `path` and compare answers with the model's.

    Raises CheckpointError where the peer's own loader misses tensors or finds more than it knows.
    """
    state, _ = read_state(path)
    x = torch.randn(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    was_training = model.training
    want = _answer(model.eval(), x)
    hints = {"heads": model.config.heads} if format != "vitrail" and isinstance(_heads(model), int) else {}
    back = load_model(path, quiet=True, **hints)
    own = set(model.state_dict())
    difference = float((_answer(back, x) - want).abs().max())
    renamed, guessed = sum(name not in own for name in state), _guessed(model.config, back.config)
    parity = Parity(len(state), renamed, float(want.abs().max()), difference, guessed=guessed)
    try:
        peer, name, remark = _peer(model, path, format)
        theirs = (
            None if peer is None else _plain(peer.eval()(x.transpose(1, 2) if model.takes_clips else x))
        )  # transformers: time first
    finally:
        model.train(was_training)
    if theirs is None or theirs.shape != want.shape:
        return dataclasses.replace(parity, remark=remark if theirs is None else f"{name} answers in another form")
    return dataclasses.replace(parity, peer=name, peer_difference=float((theirs - want).abs().max()))


def _guessed(config: Any, read: Any) -> tuple[str, ...]:
    """Settings of the architecture that were read back as others: "name=value (read as other)"."""
    before, after = vars(config), vars(read)
    differ = [name for name in before if name in after and before[name] != after[name] and name not in _OF_TRAINING]
    return tuple(f"{name}={before[name]} (read as {after[name]})" for name in differ)


def _heads(model: Model) -> Any:
    return vars(model.config).get("heads")


def _answer(model: Model, x: Tensor) -> Tensor:
    """Logits, or the embedding of a model without a head."""
    return model(x) if model.config.num_classes else model.pool(model.features(x))


def _plain(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.logits if "logits" in answer else answer.pooler_output


def _peer(model: Model, path: Path, format: str) -> tuple[nn.Module | None, str, str]:
    """(the peer's model with the written weights, its name and version, why there is none)."""
    if format not in ("timm", "transformers", "torchvision"):
        return None, format, "" if format == "vitrail" else f"{format} has no loader to ask here"
    if find_spec(format) is None:
        return None, format, f"{format} is not installed, so it was not asked"
    name = f"{format} {importlib.metadata.version(format)}"
    library = importlib.import_module(format)
    if format == "timm":
        return library.create_model(f"local-dir:{path.parent}", pretrained=True), name, ""
    if format == "transformers":
        heads = (library.AutoModelForImageClassification, library.AutoModelForVideoClassification)
        kind = heads[model.takes_clips] if model.config.num_classes else library.AutoModel
        peer, report = kind.from_pretrained(path.parent, output_loading_info=True)
        wrong = [key for part in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[part]]
        if wrong and model.config.num_classes:
            raise CheckpointError(f"{name} does not load {path.parent} strictly: {', '.join(map(str, wrong[:4]))}")
        return peer, name, ""
    source = next(s for s in SOURCES if (s.name, s.family) == (format, model.family))
    if source.peer is None:
        return None, name, f"{name} was not asked: it has no loader for folders"
    peer = source.peer(model.config)
    peer.load_state_dict(read_state(path)[0], strict=True)
    return peer, name, ""
