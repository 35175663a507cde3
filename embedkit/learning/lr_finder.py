"""The learning-rate range test: which rate should the training use?

`find_lr` raises the rate from step to step, records the loss, and puts everything back as it was. Neither
torch nor matplotlib is needed here: the finder knows its trainer by the `Trainable` protocol only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from embedkit.errors import InputError
from embedkit.learning.lr_rules import (
    SKIP_END,
    SLIDE_WIDTH,
    judge_curve,
    running_median,
    smith_bounds,
    suggest_balanced,
    suggest_fall,
    suggest_minimum,
    suggest_slide,
    suggest_steepest,
    suggest_valley,
)

RULES = ("minimum", "steepest", "valley", "slide", "balanced", "fall", "smith_base", "smith_max")
FALLBACK_LR = 1e-3  # Adam's own default (Kingma & Ba, arXiv 1412.6980, algorithm 1)


class Trainable(Protocol):
    """What the finder asks of a training."""

    def snapshot(self) -> object:
        """Copy all a step changes: model, optimizer, batch-norm statistics, random states, data position."""

    def restore(self, snapshot: object) -> None:
        """Put everything back, bit for bit."""

    def step(self, lr: float) -> tuple[float, float | None]:
        """Train on one batch at this rate; return its loss and, where there is one, its accuracy."""


@dataclass(frozen=True, eq=False)
class LRFinderResult:
    """The curve of a range test and what can be read off it.

    Attributes
    ----------
    lrs : ndarray of shape (n_iterations,)
        The rates tried, rising.
    losses : ndarray of shape (n_iterations,)
        Training loss of each step, as it was.
    smoothed_losses : ndarray of shape (n_iterations,)
        Exponentially weighted mean of the losses, bias-corrected.
    accuracies : ndarray of shape (n_iterations,) or None
        Accuracy of each step, where the task has one.
    suggestions : dict of str to float
        The rate that each of `RULES` suggests. Empty when the curve is too short to read.
    suggestion : float
        The rate to use: the chosen rule's, within the bounds; the fallback when the curve is not reliable.
    reliable : bool
        Whether the curve can be trusted.
    reason : str
        Why it can, or why not and what to do, in one line.
    """

    lrs: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    accuracies: np.ndarray | None
    suggestions: dict[str, float]
    suggestion: float
    reliable: bool
    reason: str

    @property
    def median_losses(self) -> np.ndarray:
        """Running median of the losses, of shape (n_iterations,), by which the curve is judged."""
        return running_median(self.losses)[0]


def find_lr(
    trainable: Trainable,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10.0,
    num_iter: int = 100,
    stop_factor: float = 4.0,
    smoothing: float = 0.98,
    rule: str = "valley",
    fallback: float = FALLBACK_LR,
    bounds: tuple[float, float] = (0.0, np.inf),
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> LRFinderResult:
    """Raise the rate exponentially from step to step, record the loss, restore everything.

    The sweep ends early at a loss that is not finite, or when the smoothed loss has grown to
    `stop_factor` times its lowest. The trainable is restored whatever happens: at the end, after an
    error in a step and after Ctrl-C (both are raised on).

    Parameters
    ----------
    trainable : Trainable
        The training to test; see the protocol.
    start_lr, end_lr : float, default=1e-7 and 10
        The first and the last rate.
    num_iter : int, default=100
        Steps in the sweep.
    stop_factor : float, default=4
        Growth of the smoothed loss at which the sweep ends.
    smoothing : float, default=0.98
        Weight of the past in the smoothed loss, from 0 (none) to under 1.
    rule : {"minimum", "steepest", "valley", "slide", "balanced", "fall", "smith_base", "smith_max"}
        Whose rate is the suggestion, "valley" by default.
    fallback : float, default=1e-3
        What `LRFinderResult.suggestion` is when the curve is not reliable.
    bounds : (float, float), default=no bounds
        The suggestion is held within them; `LRFinderResult.reason` says so where it had to be.
    progress : callable, optional
        Wraps the iterable of iterations, as ``tqdm`` does.

    Returns
    -------
    LRFinderResult

    Raises
    ------
    InputError
        A number out of range, or an unknown rule.

    References
    ----------
    Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3.
    The numbers (1e-7 to 10, 100 steps, 4 times the lowest, 0.98, first tenth and last 5 points not
    read) are those of fastai 2.8, ``callback/schedule.py``.
    """
    _check_arguments(start_lr, end_lr, num_iter, stop_factor, smoothing, fallback)
    if rule not in RULES:
        raise InputError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    rates = np.geomspace(start_lr, end_lr, num_iter)
    losses, smoothed, accuracies = [], [], []
    average, best, diverged = 0.0, np.inf, False
    iterations = range(num_iter) if progress is None else progress(range(num_iter))
    snapshot = trainable.snapshot()
    try:
        for i in iterations:
            loss, accuracy = trainable.step(float(rates[i]))
            if diverged := not np.isfinite(loss):
                break
            average = smoothing * average + (1 - smoothing) * loss
            losses.append(float(loss))
            accuracies.append(accuracy)
            smoothed.append(average / (1 - smoothing ** (i + 1)))
            best = min(best, smoothed[-1])
            # The same as `smoothed > stop_factor * best`, but it holds for negative losses too.
            if diverged := smoothed[-1] > best + (stop_factor - 1) * abs(best):
                break
    finally:
        trainable.restore(snapshot)

    curve = np.array(losses)
    has_accuracy = bool(accuracies) and all(accuracy is not None for accuracy in accuracies)
    return _read_curve(
        rates[: len(curve)],
        curve,
        np.array(smoothed),
        np.array(accuracies, dtype=float) if has_accuracy else None,
        skip_start=num_iter // 10,
        diverged=diverged,
        rule=rule,
        fallback=fallback,
        bounds=bounds,
    )


def _read_curve(
    lrs: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    accuracies: np.ndarray | None,
    *,
    skip_start: int,
    diverged: bool,
    rule: str,
    fallback: float,
    bounds: tuple[float, float],
) -> LRFinderResult:
    reliable, reason = judge_curve(losses, diverged)
    suggestions = {}
    part = slice(skip_start, -SKIP_END)
    if len(lrs[part]) > SLIDE_WIDTH:
        base_lr, max_lr = smith_bounds(lrs, losses, accuracies)
        suggestions = {
            "minimum": suggest_minimum(lrs[part], smoothed[part]),
            "steepest": suggest_steepest(lrs[part], smoothed[part]),
            "valley": suggest_valley(lrs[part], smoothed[part]),
            "slide": suggest_slide(lrs[part], smoothed[part]),
            "balanced": suggest_balanced(lrs[part], smoothed[part]),
            "fall": suggest_fall(lrs, losses),
            "smith_base": base_lr,
            "smith_max": max_lr,
        }
    elif reliable:
        reliable, reason = False, f"only {len(lrs)} steps before the loss diverges: raise num_iter"
    found = suggestions[rule] if reliable else fallback
    suggestion = float(np.clip(found, *bounds))
    if suggestion != found:
        name = rule if reliable else "the fallback"
        reason += f"; {name} is at {found:.2g}, held to {suggestion:.2g}"
    return LRFinderResult(lrs, losses, smoothed, accuracies, suggestions, suggestion, reliable, reason)


def _check_arguments(
    start_lr: float, end_lr: float, num_iter: int, stop_factor: float, smoothing: float, fallback: float
) -> None:
    if not 0 < start_lr < end_lr < np.inf:
        raise InputError(f"rates must satisfy 0 < start_lr < end_lr, got {start_lr=}, {end_lr=}")
    if num_iter < 1:
        raise InputError(f"num_iter must be at least 1, got {num_iter=}")
    if not stop_factor > 1:
        raise InputError(f"stop_factor must be more than 1, got {stop_factor=}")
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing must be at least 0 and under 1, got {smoothing=}")
    if not 0 < fallback < np.inf:
        raise InputError(f"fallback must be a positive rate, got {fallback=}")
