"""The rules that read a learning rate off the curve of a range test: pure functions of arrays."""

import numpy as np

MIN_POINTS = 20
SKIP_END = 5
SLIDE_WIDTH = 15
CLEAR = 5.5  # standard errors of the running median that noise alone hardly ever moves in one sweep


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


def suggest_fall(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Twice the rate at which four fifths of the whole fall of the loss are left behind for good.

    The middle of a slope, `suggest_valley`, moves with where noise lets the slope begin: from one sweep to
    the next by a factor of two. This point moves less.

    Parameters
    ----------
    lrs : ndarray of shape (n,)
        Rising rates.
    losses : ndarray of shape (n,)
        Loss of each step, not smoothed (a running median is taken here, which has no lag).

    Returns
    -------
    float
    """
    middle, _ = running_median(losses)
    lowest = int(np.argmin(middle))
    start = first_level(middle)
    return 2 * float(lrs[_after_last(middle[:lowest] > start - 0.8 * (start - middle[lowest]))])


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
    height, error = running_median(height)
    start, peak = first_level(height), int(np.argmax(height))
    rise = height[peak] - start
    if accuracies is not None and rise <= CLEAR * error:
        return smith_bounds(lrs, losses)
    climb = height[: peak + 1]
    fallen_back = np.maximum.accumulate(climb) - climb > max(0.1 * rise, CLEAR * error)
    high = int(np.argmax((climb >= start + 0.9 * rise) | fallen_back))
    low = _after_last(climb[: high + 1] < start + 0.1 * rise)
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
    middle, error = running_median(losses)
    start, lowest = first_level(middle), float(middle[n // 5 :].min())
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


def running_median(values: np.ndarray) -> tuple[np.ndarray, float]:
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


def first_level(values: np.ndarray) -> float:
    """Where a curve starts: the median of its first fifth."""
    return float(np.median(values[: max(1, len(values) // 5)]))


def _after_last(flags: np.ndarray) -> int:
    """Where flags are left behind for good: the point after the last that is set, the first where none is."""
    return int(np.flatnonzero(flags).max(initial=-1)) + 1
