"""What happens when memory runs out: fewer rows at a time, down to a few, then an error with a name."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from embedkit.errors import EmbedkitError

MIN_ROWS = 16

Result = TypeVar("Result")


class OutOfMemoryError(EmbedkitError, MemoryError):
    """Memory ran out, also with few rows at a time."""


class TornStepError(OutOfMemoryError):
    """Memory ran out when a step had changed some of the weights: only a state from before is sound."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, EmbedkitError)
    text = str(error).lower()
    return "allocate memory" in text or "not enough memory" in text or "out of memory" in text


def halved(rows: int, what: str) -> int:
    """Half of the rows at a time, with a warning.

    Parameters
    ----------
    rows : int
        How many there were when memory ran out.
    what : str
        What they are for, as in "a training step".

    Raises
    ------
    OutOfMemoryError
        If there are few enough already.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rows <= MIN_ROWS:
        raise OutOfMemoryError(
            f"out of memory in {what} with {rows} rows at a time: set a smaller embedding_dim or "
            "hidden_layer_sizes, fold rare categories (min_frequency), or use a larger machine"
        )
    fewer = max(-(-rows // 2), MIN_ROWS)
    warnings.warn(
        f"out of memory in {what} with {rows} rows at a time: going on with {fewer}",
        RuntimeWarning,
        stacklevel=4,
    )
    return fewer


def attempt(call: Callable[[], Result]) -> tuple[Result | None, bool]:
    """The result of a call, and whether it had enough memory; what the call held is free after."""
    try:
        return call(), True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    return None, False
