"""Learning-rate schedules: pure functions of the training step.

Every schedule takes the step first (a number, or an array of them, counted from 0) and returns the
rate of that step: a float for a number, an array for an array. Nothing is remembered between calls,
so a training that was interrupted goes on by asking for the next step.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from embedkit.errors import InputError

MIN_CYCLES = 3
MAX_EPOCHS_PER_STEP_SIZE = 10


def constant(step: ArrayLike, max_lr: float) -> float | np.ndarray:
    """The same rate at every step.

    Parameters
    ----------
    step : float or array of shape (n_steps,)
        Training step, from 0.
    max_lr : float
        The rate.

    Returns
    -------
    float or ndarray of shape (n_steps,)
    """
    return _shaped_as(step, np.full(np.shape(step), float(max_lr)))


def one_cycle(
    step: ArrayLike,
    max_lr: float,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> float | np.ndarray:
    """Up from a low rate to `max_lr` and down to almost nothing, both along half a cosine.

    The same numbers as ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults. Steps after the
    last keep the last rate.

    Parameters
    ----------
    step : float or array of shape (n_steps,)
        Training step, from 0 to ``total_steps - 1``.
    max_lr : float
        The peak rate.
    total_steps : int
        Length of the whole training, in steps.
    pct_start : float, default=0.3
        Where the peak is, as a fraction of all steps.
    div_factor : float, default=25
        The first rate is ``max_lr / div_factor``.
    final_div_factor : float, default=1e4
        The last rate is the first divided by this.

    Returns
    -------
    float or ndarray of shape (n_steps,)

    References
    ----------
    Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
    Rates", arXiv 1708.07120.
    """
    first, last = max_lr / div_factor, max_lr / div_factor / final_div_factor
    last_step = total_steps - 1
    peak_step = pct_start * total_steps - 1
    x = np.asarray(step, dtype=float)
    up = _cosine(first, max_lr, _fraction(x, 0, peak_step))
    down = _cosine(max_lr, last, _fraction(x, peak_step, last_step))
    return _shaped_as(step, np.where(x < peak_step, up, down))


def triangular(step: ArrayLike, max_lr: float, base_lr: float, step_size: float) -> float | np.ndarray:
    """Straight up from `base_lr` to `max_lr` and straight down again, over and over.

    Parameters
    ----------
    step : float or array of shape (n_steps,)
        Training step, from 0.
    max_lr, base_lr : float
        The upper and the lower bound of the rate.
    step_size : float
        Half a cycle, in steps.

    Returns
    -------
    float or ndarray of shape (n_steps,)

    References
    ----------
    Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.1.
    """
    height, _ = _triangle(step, step_size)
    return _shaped_as(step, base_lr + (max_lr - base_lr) * height)


def triangular2(step: ArrayLike, max_lr: float, base_lr: float, step_size: float) -> float | np.ndarray:
    """As `triangular`, with the height of the triangles halved after every cycle.

    Parameters and source: see `triangular`.
    """
    height, cycle = _triangle(step, step_size)
    return _shaped_as(step, base_lr + (max_lr - base_lr) * height * 0.5**cycle)


def exp_range(
    step: ArrayLike, max_lr: float, base_lr: float, step_size: float, gamma: float
) -> float | np.ndarray:
    """As `triangular`, with the height of the triangles shrinking by ``gamma`` at every step.

    Parameters
    ----------
    step, max_lr, base_lr, step_size
        See `triangular`.
    gamma : float
        Factor per step, a little under 1.

    Returns
    -------
    float or ndarray of shape (n_steps,)
    """
    height, _ = _triangle(step, step_size)
    return _shaped_as(step, base_lr + (max_lr - base_lr) * height * gamma ** np.asarray(step, dtype=float))


def cosine_restarts(
    step: ArrayLike, max_lr: float, T_0: float, T_mult: float = 2, eta_min: float = 0.0
) -> float | np.ndarray:
    """Down from `max_lr` to `eta_min` along half a cosine, then a warm restart, each period longer.

    The same numbers as ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``.

    Parameters
    ----------
    step : float or array of shape (n_steps,)
        Training step, from 0.
    max_lr : float
        The rate at every restart.
    T_0 : float
        Length of the first period, in steps, at least 1.
    T_mult : float, default=2
        Each period is this many times as long as the one before, at least 1.
    eta_min : float, default=0
        The rate that a period falls to.

    Returns
    -------
    float or ndarray of shape (n_steps,)

    References
    ----------
    Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983.
    """
    since_restart = np.asarray(step, dtype=float)
    period = np.full_like(since_restart, T_0)
    if T_mult == 1:
        since_restart = since_restart % T_0
    else:
        # Subtraction is exact at the restarts, where the closed form with its logarithm is not.
        while np.any(passed := since_restart >= period):
            since_restart = np.where(passed, since_restart - period, since_restart)
            period = np.where(passed, period * T_mult, period)
    return _shaped_as(step, _cosine(max_lr, eta_min, since_restart / period))


SCHEDULES: dict[str, Callable[..., Any]] = {
    "one_cycle": one_cycle,
    "triangular": triangular,
    "triangular2": triangular2,
    "exp_range": exp_range,
    "cosine_restarts": cosine_restarts,
    "constant": constant,
}


def make_schedule(
    name: str, *, max_lr: float, total_steps: int, steps_per_epoch: int, **options: float
) -> Callable[[int], float]:
    """A schedule by name, fitted to the length of the training.

    Cycles and periods are laid out so that the training stops at the end of one. Cyclical rates get
    three cycles, or more where half a cycle would be longer than 10 epochs; Smith's lower bound of 2
    epochs gives way to the three cycles in a short training, as his results hardly depend on it.

    Parameters
    ----------
    name : {"one_cycle", "triangular", "triangular2", "exp_range", "cosine_restarts", "constant"}
        Which schedule.
    max_lr : float
        The peak rate.
    total_steps : int
        Length of the whole training, in steps.
    steps_per_epoch : int
        Steps in one pass over the data.
    **options : float
        What the named function takes besides. Where it is not given: ``base_lr = max_lr / 4``,
        ``step_size`` and ``T_0`` as told above (``T_0`` for three periods), ``T_mult = 2``, and
        ``gamma`` such that the triangles shrink tenfold over the training.

    Returns
    -------
    callable
        The step, counted from 0, to its rate.

    Raises
    ------
    InputError
        An unknown name or option, or a number out of range.

    References
    ----------
    Smith, arXiv 1506.01186, sections 3.2 (length of a cycle) and 3.3 (bounds).
    """
    if name not in SCHEDULES:
        raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if not (np.isfinite(max_lr) and max_lr > 0):
        raise InputError(f"max_lr must be a positive number, got {max_lr=}")
    for what, length in (("total_steps", total_steps), ("steps_per_epoch", steps_per_epoch)):
        if length < 1:
            raise InputError(f"{what} must be at least 1, got {length}")
    defaults = _default_options(name, max_lr, total_steps, steps_per_epoch, options)
    if unknown := sorted(options.keys() - defaults.keys()):
        known = ", ".join(defaults) or "no options"
        raise InputError(f"schedule {name!r} takes {known}; it was given {', '.join(unknown)}")
    settings = {**defaults, **options}
    _check_options(settings)
    for option in ("base_lr", "eta_min"):
        if settings.get(option, 0) > max_lr:
            raise InputError(f"{option} must be at most the peak rate {max_lr:g}, got {settings[option]:g}")
    return partial(SCHEDULES[name], max_lr=max_lr, **settings)


def _default_options(
    name: str, max_lr: float, total_steps: int, steps_per_epoch: int, options: Mapping[str, float]
) -> dict[str, float]:
    """Every option that the named schedule takes, with the value that suits this training."""
    if name == "one_cycle":
        return {"total_steps": total_steps, "pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4}
    if name == "cosine_restarts":
        T_mult = options.get("T_mult", 2)
        return {"T_0": max(total_steps / (1 + T_mult + T_mult**2), 1), "T_mult": T_mult, "eta_min": 0.0}
    if name == "constant":
        return {}
    epochs = total_steps / steps_per_epoch
    cycles = max(MIN_CYCLES, int(np.ceil(epochs / (2 * MAX_EPOCHS_PER_STEP_SIZE))))
    # Half a cycle of less than one step would only ever be sampled at its foot.
    cycles = max(1, min(cycles, total_steps // 2))
    cyclical = {"base_lr": max_lr / 4, "step_size": total_steps / (2 * cycles)}
    return {**cyclical, "gamma": 0.1 ** (1 / total_steps)} if name == "exp_range" else cyclical


def _check_options(settings: Mapping[str, float]) -> None:
    lowest = {"pct_start": 0, "eta_min": 0, "base_lr": 0, "T_0": 1, "T_mult": 1}
    highest = {"pct_start": 1, "gamma": 1}
    for option, value in settings.items():
        if not np.isfinite(value) or value > highest.get(option, np.inf):
            limit = f"at most {highest[option]}" if option in highest else "finite"
            raise InputError(f"{option} must be {limit}, got {value}")
        if option in lowest and value < lowest[option]:
            raise InputError(f"{option} must be at least {lowest[option]}, got {value}")
        if option not in lowest and value <= 0:
            raise InputError(f"{option} must be positive, got {value}")


def _triangle(step: ArrayLike, step_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Height in the cycle (0 at its ends, 1 in its middle) and the number of cycles completed."""
    halves = np.asarray(step, dtype=float) / step_size
    cycle = np.floor(halves / 2)
    return 1 - np.abs(halves - 2 * cycle - 1), cycle


def _fraction(x: np.ndarray, start: float, end: float) -> np.ndarray:
    """How far `x` is on the way from `start` to `end`, within 0 and 1; a way of no length is at its start."""
    return np.clip((x - start) / (end - start), 0, 1) if end > start else np.zeros_like(x)


def _cosine(start: float, end: float, fraction: np.ndarray) -> np.ndarray:
    return end + (start - end) * (1 + np.cos(np.pi * fraction)) / 2


def _shaped_as(step: ArrayLike, rates: np.ndarray) -> float | np.ndarray:
    return rates if np.ndim(step) else float(rates)
