"""One process of a run, or one of several that torchrun started: who am I, and what do all of us say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitrail.cost import pick_device


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run. With one process every method answers at once."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum over all processes, number by number."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, value: Any) -> Any:
        """The main process's value, on all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value in the order of ranks, on the main process; empty on the others."""
        if self.world == 1:
            return [value]
        box = [None] * self.world if self.main else None
        dist.gather_object(value, box)
        return box or []

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over all processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)


def unsynchronised(model: nn.Module, on: bool) -> AbstractContextManager[Any]:
    """Where `on`, gradients stay in this process: for all but the last micro-step of an optimiser step."""
    return model.no_sync() if on and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """The processes of this run: those that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or this one alone.

    Under torchrun "auto" and "cuda" mean the accelerator of the local rank. The process group is closed at the end. Raises
    ValueError for a device that is not there.
    """
    # In a forked process the first call renews a pool of torch's; were it left to the threads of augmentation and autograd,
    # two at once would end the process ("Invalid thread pool", torch 2.15).
    torch.set_num_threads(torch.get_num_threads())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Ranks(chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(chosen, dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
