"""How many threads a training is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from embedkit.learning.training import Trainer

# Multiplications of a step's forward pass, below which threads wait for one another longer than they work.
SMALL_STEP = 1 << 26


@contextmanager
def threads_for(trainer: Trainer) -> Iterator[None]:
    """One thread for a training of small steps, those that torch has for one of large steps.

    A small step is over in two milliseconds and many pieces. A second thread makes it faster by a fifth at
    best, and many times slower where another process wants its core.
    """
    before = torch.get_num_threads()
    if trainer.batch_size * trainer.network.shape.n_weights < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
