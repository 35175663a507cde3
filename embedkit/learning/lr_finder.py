"""The learning-rate range test: which rate should the training use?

`find_lr` raises the rate from step to step, records the loss, and puts everything back as it was.
The rules that read a rate off the curve are pure functions of arrays. Neither torch nor matplotlib
is needed here: the finder knows its trainer by the `Trainable` protocol only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from embedkit.errors import InputError

RULES = ("minimum", "steepest", "valley", "slide", "balanced", "smith_base", "smith_max")
FALLBACK_LR = 1e-3  # Adam's own default (Kingma & Ba, arXiv 1412.6980, algorithm 1)
MIN_POINTS = 20
SKIP_END = 5
SLIDE_WIDTH = 15
CLEAR = 5.5  # standard errors of the running median that noise alone hardly ever moves in one sweep


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
        return _running_median(self.losses)[0]


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
    rule : {"minimum", "steepest", "valley", "slide", "balanced", "smith_base", "smith_max"}
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


def suggest_minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate of the lowest loss, back one order of magnitude. Source: ``minimum`` in fastai 2.8.

    Parameters
    ----------
    lrs, losses : ndarray of shape (n,)
        Rising rates and the (smoothed) losses at them.

    Returns
    -------
    float
    """
    return float(lrs[np.argmin(losses)] / 10)


def suggest_steepest(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate at which the loss falls fastest against the logarithm of the rate.

    Parameters and result: see `suggest_minimum`; at least 2 points. Source: ``steep`` in fastai 2.8.
    """
    return float(lrs[np.argmin(np.diff(losses) / np.diff(np.log(lrs)))])


def suggest_valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate in the middle of the longest decreasing run of losses.

    The run is the longest decreasing subsequence, so that small bumps do not cut it in two.

    Parameters and result: see `suggest_minimum`. Source: ``valley`` in fastai 2.8.
    """
    lengths = np.ones(len(losses), dtype=int)  # of the longest decreasing run that ends at each point
    for i in range(1, len(losses)):
        lengths[i] += np.max(lengths[:i], where=losses[:i] > losses[i], initial=0)
    end = int(np.argmax(lengths))
    length = int(lengths[end])
    # NOTE[fastai] `valley` starts one point earlier, which is before the first where all points fall.
    start = end - length + 1
    return float(lrs[start + (length - 1) // 2])


def suggest_slide(
    lrs: np.ndarray, losses: np.ndarray, width: int = SLIDE_WIDTH, threshold: float = 0.005
) -> float:
    """Slide an interval down from the highest rates until the slope is the same at both its ends.

    Source: ``slide`` in fastai 2.8.

    Parameters
    ----------
    lrs, losses : ndarray of shape (n,), n more than `width`
        Rising rates and the (smoothed) losses at them.
    width : int, default=15
        Width of the interval, in points.
    threshold : float, default=0.005
        Slopes (change of loss per point, as a fraction of the first loss) that differ by no more
        than this are the same.

    Returns
    -------
    float
        The rate at the low end of the last interval whose slopes differ.
    """
    # NOTE[fastai] takes the slope of the loss itself; relative to the first loss, units do not matter.
    slopes = np.gradient(losses) / (abs(losses[0]) or 1.0)
    same = np.abs(slopes[width:] - slopes[:-width]) <= threshold  # by the low end of the interval
    # With no interval of equal slopes at all, it slides to the first point.
    low = int(np.flatnonzero(same)[-1]) + 1 if same.any() else 0
    return float(lrs[min(low, len(lrs) - 1 - width)])


def suggest_balanced(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Half way, on the logarithmic axis, between `suggest_valley` and `suggest_minimum`.

    The one tends to be too low and the other too high, and both move with the smoothing and with
    the length of the sweep; their mean moves less. Parameters and result: see `suggest_minimum`.
    """
    return float(np.sqrt(suggest_valley(lrs, losses) * suggest_minimum(lrs, losses)))


def smith_bounds(
    lrs: np.ndarray, losses: np.ndarray, accuracies: np.ndarray | None = None
) -> tuple[float, float]:
    """Smith's two bounds for a cyclical rate, from accuracy where there is one, else from the loss.

    `base_lr` is where the accuracy starts to rise: where it has left 10 % of its whole rise behind
    for good. `max_lr` is where it slows, turns ragged or falls: where it first has 90 % of its rise,
    or has given back a tenth of it. A loss is read upside down, and it is read too where accuracy
    does not rise by more than its noise (as where one class is rare). Where no start is seen below
    `max_lr`, `base_lr` is a quarter of it, Smith's other rule.

    Parameters
    ----------
    lrs : ndarray of shape (n,)
        Rising rates.
    losses : ndarray of shape (n,)
        Loss of each step, not smoothed (a running median is taken here, which has no lag).
    accuracies : ndarray of shape (n,), optional
        Accuracy of each step.

    Returns
    -------
    base_lr, max_lr : float

    References
    ----------
    Smith, arXiv 1506.01186, section 3.3.
    """
    height = -losses if accuracies is None else accuracies
    height, error = _running_median(height)
    start, peak = _first_level(height), int(np.argmax(height))
    rise = height[peak] - start
    if accuracies is not None and rise <= CLEAR * error:
        return smith_bounds(lrs, losses)
    climb = height[: peak + 1]
    fallen_back = np.maximum.accumulate(climb) - climb > max(0.1 * rise, CLEAR * error)
    high = int(np.argmax((climb >= start + 0.9 * rise) | fallen_back))
    under = np.flatnonzero(climb[: high + 1] < start + 0.1 * rise)
    low = int(under[-1]) + 1 if len(under) else 0
    max_lr = float(lrs[high])
    return (float(lrs[low]) if 0 < low < high else max_lr / 4), max_lr


def judge_curve(losses: np.ndarray, diverged: bool) -> tuple[bool, str]:
    """Whether the curve of a range test says anything about the rate.

    A good curve is long enough, falls by more than 1 % of its start and by more than its noise can
    explain (noise alone does it in fewer than one sweep of a hundred), and has a lowest point before
    the end of the sweep.

    Parameters
    ----------
    losses : ndarray of shape (n,)
        Loss of each step, not smoothed; all finite.
    diverged : bool
        Whether the sweep was cut short because the loss grew or was not finite.

    Returns
    -------
    reliable : bool
    reason : str
        One line: what was seen, and what to do when it is no good.
    """
    n = len(losses)
    if n < MIN_POINTS and diverged:
        return False, f"the loss diverges after {n} steps: lower start_lr or raise num_iter"
    if n < MIN_POINTS:
        return False, f"only {n} steps, too few to read: take at least {MIN_POINTS} (num_iter)"
    middle, error = _running_median(losses)
    start, lowest = _first_level(middle), float(middle[n // 5 :].min())
    clear = max(CLEAR * error, 0.01 * abs(start))
    seen = f"the loss starts at {start:.4g}, its lowest is {lowest:.4g}"
    if start - lowest <= clear:
        if middle[n // 2] - start > clear:
            return False, f"{seen}: it diverges at once, lower start_lr"
        if CLEAR * error >= clear:
            return False, f"{seen}, which its noise can explain: raise num_iter or batch_size"
        return False, f"{seen}: a flat curve, raise end_lr or check that the inputs say anything"
    if not diverged and np.argmin(middle) >= n - SKIP_END:
        return False, f"{seen}, at the highest rate: it still falls, raise end_lr"
    return True, f"{seen}, and then it grows"


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


def _running_median(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Median of the points around each point (an eighth of the curve, 9 at least) and its standard error.

    The ends are mirrored: repeated, one noisy last point would become its own median.
    """
    half = max(4, len(values) // 16)
    padded = np.pad(values, half, mode="reflect")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    # Second differences of independent noise have 6 times its variance, and a straight line has none;
    # 0.6745 is the median size of a standard normal variable, unmoved by the explosion at the end.
    noise = np.median(np.abs(np.diff(values, 2))) / 0.6745 / np.sqrt(6)
    return medians, float(noise * np.sqrt(np.pi / 2 / (2 * half + 1)))


def _first_level(values: np.ndarray) -> float:
    """Where a curve starts: the median of its first fifth."""
    return float(np.median(values[: max(1, len(values) // 5)]))
