"""What happens from block to block: what the classifier would say already, how tokens grow alike, and which layers agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models import Model
from vitrail.models.base import intercept_blocks


class Passed(NamedTuple):
    """What a block took and gave. name: the block's; the tensors are as the family lays them out."""

    name: str
    given: Tensor
    made: Tensor


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside, the former mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def run_blocks(model: Model, inputs: Float[Tensor, "b c *t h w"]) -> list[Passed]:
    """What every block passes on, in the order in which they run."""
    passed: list[Passed] = []

    def around(name: str, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        made = block(x, *args)
        passed.append(Passed(name, x, made))
        return made

    with evaluating(model), torch.no_grad(), intercept_blocks(model, around):
        model.pool(model.features(inputs))
    return passed


class Lens(NamedTuple):
    """What the classifier says of the tokens after a block, the later ones left out; name "input": before the first of them."""

    name: str
    logits: Float[Tensor, "b k"]


def logit_lens(model: Model, inputs: Float[Tensor, "b c *t h w"]) -> list[Lens]:
    """The final norm, pooling and classifier applied to the tokens after every block that has the width and grid they expect.

    In a pyramid those are the blocks of the last stage, in a factorised encoder those of its last encoder ("interpreting GPT:
    the logit lens", nostalgebraist 2020, for classifiers). The last entry is the model's answer. Raises ValueError where other
    layers or a second pathway lie between the blocks and the classifier.
    """
    passed = run_blocks(model, inputs)
    shape, width = passed[-1].made.shape, model.features(inputs[:1]).tokens.shape[-1]
    if width not in (shape[1], shape[-1]):
        raise ValueError(f"what the blocks of this {model.family} model pass on is not what its classifier reads")
    first = len(passed)  # blocks from here on keep their input's shape, so that each may be left out
    while first and passed[first - 1].given.shape == passed[first - 1].made.shape == shape:
        first -= 1
    readable = [at for at in range(first - 1, len(passed)) if at < 0 or passed[at].made.shape == shape]
    lenses = []
    for last in readable:
        kept = {p.name for p in passed[: last + 1]}

        def around(name: str, block: nn.Module, x: Tensor, *args: Any, kept: set[str] = kept) -> Tensor:
            return block(x, *args) if name in kept else x

        with evaluating(model), torch.no_grad(), intercept_blocks(model, around):
            lenses.append(Lens(passed[last].name if last >= 0 else "input", model(inputs)))
    return lenses


def token_similarity(model: Model, inputs: Float[Tensor, "b c h w"], tokens: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    """Cosine similarity (b) of two tokens, by default class and distillation token, before the first block and after each.

    DeiT's authors give 0.06 at the input and 0.93 at the last layer (arXiv 2012.12877, section 4).
    """
    passed = run_blocks(model, inputs)
    states = {"input": passed[0].given} | {p.name: p.made for p in passed}
    one, other = tokens
    return {name: F.cosine_similarity(x[:, one].float(), x[:, other].float(), dim=1) for name, x in states.items()}


class CKA:
    """Linear centred kernel alignment between the layers of two models, from batches of at least four inputs.

    Unbiased HSIC per batch, averaged (Kornblith et al., arXiv 1905.00414; minibatches: Nguyen et al., arXiv 2010.15327). Layers
    are compared by all their tokens; 1 means equal up to rotation and scale. Batches are kept no longer than needed.
    """

    def __init__(self) -> None:
        self.names: tuple[list[str], list[str]] = ([], [])
        self.cross: Tensor | None = None
        self.own: tuple[Tensor, Tensor] | None = None

    def add(self, one: Iterable[Passed], other: Iterable[Passed], batch: int) -> None:
        """Blocks of both models on the same `batch` inputs. Raises ValueError for fewer than four."""
        if batch < 4:
            raise ValueError(f"CKA compares how inputs relate to each other; it needs at least 4 at once, got {batch}")
        grams = []
        for side, passed in enumerate((one, other)):
            passed = list(passed)
            self.names[side][:] = [p.name for p in passed]
            grams.append(torch.stack([_gram(p.made, batch) for p in passed]))
        cross = _hsic(grams[0][:, None], grams[1][None])
        own = (_hsic(grams[0], grams[0]), _hsic(grams[1], grams[1]))
        self.cross = cross if self.cross is None else self.cross + cross
        self.own = own if self.own is None else (self.own[0] + own[0], self.own[1] + own[1])

    def result(self) -> Float[Tensor, "n m"]:
        """CKA of every layer of the first model (rows) with every layer of the second (columns)."""
        assert self.cross is not None
        assert self.own is not None
        scale = (self.own[0].clamp_min(0)[:, None] * self.own[1].clamp_min(0)[None]).sqrt()
        return (self.cross / scale.clamp_min(1e-30)).float()


def _gram(made: Tensor, batch: int) -> Float[Tensor, "b b"]:
    """Inner products of the inputs' states, the diagonal left out."""
    flat = made.detach().double().reshape(batch, -1)
    gram = flat @ flat.T
    return gram.fill_diagonal_(0).cpu()


def _hsic(a: Float[Tensor, "*#n b b"], b: Float[Tensor, "*#n b b"]) -> Float[Tensor, " *n"]:
    """Unbiased HSIC of Gram matrices without diagonals (Song et al. 2012, equation 5)."""
    n = a.shape[-1]
    trace = (a * b).sum((-2, -1))
    sums = a.sum((-2, -1)) * b.sum((-2, -1)) / ((n - 1) * (n - 2))
    mixed = (a.sum(-2) * b.sum(-2)).sum(-1) * 2 / (n - 2)
    return (trace + sums - mixed) / (n * (n - 3))
