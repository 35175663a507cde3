"""Processes that learn together, one to a GPU or a share of the cores, as torchrun starts them.

All of them read the same data and draw the same random numbers, so that each knows the rows of every batch.
Each works on its own share of a batch; what they add up is the same as what one process would make of the
whole batch: batch norm's moments, the gradients of the layers, those of the vectors that were looked up.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from embedkit.errors import InputError
from embedkit.learning.data import Rows
from embedkit.learning.gradients import LayerGradients
from embedkit.learning.network import EntityEmbeddingNetwork


class Group:
    """The processes, and which of them this one is.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0 on, and how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, in place, as the sum over all processes."""
        distributed.all_reduce(tensor)
        return tensor

    def side_by_side(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, which have equally many, in the order of their ranks."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def share(self, batch: Rows) -> Rows:
        """The rows of a batch that are this process' own."""
        each = len(batch) // self.size
        return batch.take(slice(self.rank * each, (self.rank + 1) * each))

    @contextmanager
    def own_draws(self, device: torch.device) -> Iterator[None]:
        """Random numbers of this process' own; after it all processes are at the same place again."""
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield

    def check_same(self, value: int, what: str) -> None:
        """Raise InputError in all processes where they differ in a number."""
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise InputError(f"the processes differ in {what}: {values}; give all of them the same")


def join_group(device: str) -> Group | None:
    """The group that torchrun started this process in; None for a process by itself.

    Parameters
    ----------
    device : str
        As in `Settings`: gloo connects processes on CPUs, nccl those on GPUs.
    """
    if not distributed.is_available():
        return None
    if not distributed.is_initialized():
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            return None
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(_leave_group)
    return Group() if distributed.get_world_size() > 1 else None


class SharedGradients(LayerGradients):
    """Gradients from a share of a batch, where batch norm sees all of it.

    Parameters
    ----------
    network : EntityEmbeddingNetwork
    precision : {"float32", "bfloat16"}
    group : Group
    """

    def __init__(self, network: EntityEmbeddingNetwork, precision: str, group: Group) -> None:
        super().__init__(network, precision)
        self.group, self.n_shares = group, group.size

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of all processes."""
        return self.group.add(sums)


def _leave_group() -> None:
    """End the group's threads while there is still an interpreter: left to themselves, they may abort it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
