"""k nearest neighbours by cosine similarity: no training at all (Wu et al., arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

K_SWEEP = (1, 3, 5, 10, 20, 50)
TEMPERATURE = 0.07
_ROWS = 2048  # queries compared at once


def knn_scores(
    train: Float[Tensor, "n c"],
    targets: Int[Tensor, " n"],
    queries: Float[Tensor, "m c"],
    classes: int,
    ks: Sequence[int] = K_SWEEP,
    temperature: float = TEMPERATURE,
) -> Iterator[Float[Tensor, "m k"]]:
    """For every k the summed votes of the k nearest training samples, each exp(cosine / temperature), per class.

    A k above the number of training samples takes all of them.
    """
    train, most = F.normalize(train, dim=1), min(max(ks), len(train))
    nearest = [(F.normalize(part, dim=1) @ train.T).topk(most) for part in queries.split(_ROWS)]
    votes = torch.cat([((part.values - 1) / temperature).exp() for part in nearest])
    labels = targets[torch.cat([part.indices for part in nearest])]
    for k in ks:
        yield votes.new_zeros(len(queries), classes).scatter_add_(1, labels[:, :k], votes[:, :k])
