"""Schedules: against torch's own, against numbers worked out by hand, and the laying out of cycles."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from embedkit.errors import InputError
from embedkit.learning.schedules import (
    SCHEDULES,
    constant,
    cosine_restarts,
    exp_range,
    make_schedule,
    one_cycle,
    triangular,
    triangular2,
)


def rates_of_torch(scheduler_class: type, n_steps: int, lr: float = 0.1, **options: object) -> np.ndarray:
    """The rates that a torch scheduler sets, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for _ in range(n_steps):
        rates.append(scheduler.get_last_lr()[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer step is taken here, and torch says so
            if len(rates) < n_steps:
                scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("pct_start", [0.0, 0.1, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("total_steps", [3, 7, 100])
def test_one_cycle_is_torchs(total_steps: int, pct_start: float) -> None:
    options = {"pct_start": pct_start, "div_factor": 20.0, "final_div_factor": 300.0}
    expected = rates_of_torch(
        lr_scheduler.OneCycleLR, total_steps, max_lr=0.4, total_steps=total_steps, **options
    )
    ours = one_cycle(np.arange(total_steps), 0.4, total_steps, **options)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_one_cycle_defaults_are_torchs() -> None:
    expected = rates_of_torch(lr_scheduler.OneCycleLR, 50, max_lr=0.01, total_steps=50)
    np.testing.assert_allclose(one_cycle(np.arange(50), 0.01, 50), expected, rtol=1e-9)


def test_one_cycle_by_hand() -> None:
    # 11 steps, the peak at 0.5 * 12 - 1 = step 5 of a training of 12.
    rates = one_cycle(np.arange(12), 1.0, 12, pct_start=0.5, div_factor=5, final_div_factor=2)
    assert rates[0] == pytest.approx(0.2)
    assert rates[5] == pytest.approx(1.0)
    assert rates[8] == pytest.approx((1.0 + 0.1) / 2)  # half way down
    assert rates[11] == pytest.approx(0.1)
    assert one_cycle(99, 1.0, 12, div_factor=5, final_div_factor=2) == pytest.approx(0.1)


@pytest.mark.parametrize(("total_steps", "pct_start"), [(10, 0.1), (10, 1.0), (1, 0.3)])
def test_one_cycle_survives_a_way_up_or_down_of_no_length(total_steps: int, pct_start: float) -> None:
    rates = one_cycle(np.arange(total_steps), 0.4, total_steps, pct_start=pct_start)
    assert (rates > 0).all()
    assert rates.max() <= 0.4
    if total_steps > 1:
        assert rates[round(pct_start * total_steps) - 1] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("mode", "function", "options"),
    [
        ("triangular", triangular, {}),
        ("triangular2", triangular2, {}),
        ("exp_range", exp_range, {"gamma": 0.97}),
    ],
)
def test_cyclical_rates_are_torchs(mode: str, function: object, options: dict) -> None:
    expected = rates_of_torch(
        lr_scheduler.CyclicLR, 60, base_lr=0.1, max_lr=0.7, step_size_up=7, mode=mode, **options
    )
    ours = function(np.arange(60), max_lr=0.7, base_lr=0.1, step_size=7, **options)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_cyclical_rates_by_hand() -> None:
    steps = np.arange(9)
    # base 1, max 5, two steps up and two down
    assert triangular(steps, 5, 1, 2).tolist() == [1, 3, 5, 3, 1, 3, 5, 3, 1]
    assert triangular2(steps, 5, 1, 2).tolist() == [1, 3, 5, 3, 1, 2, 3, 2, 1]
    assert exp_range(steps, 5, 1, 2, gamma=0.5).tolist() == [
        *(1, 1 + 2 / 2, 1 + 4 / 4, 1 + 2 / 8, 1),
        *(1 + 2 / 32, 1 + 4 / 64, 1 + 2 / 128, 1),
    ]


@pytest.mark.parametrize(("T_0", "T_mult"), [(5, 1), (5, 2), (3, 3), (1, 2)])
def test_cosine_restarts_is_torchs(T_0: int, T_mult: int) -> None:
    expected = rates_of_torch(
        lr_scheduler.CosineAnnealingWarmRestarts, 60, T_0=T_0, T_mult=T_mult, eta_min=0.01
    )
    ours = cosine_restarts(np.arange(60), 0.1, T_0, T_mult, eta_min=0.01)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_cosine_restarts_by_hand() -> None:
    # periods of 2 and 4 steps: restarts at steps 0, 2 and 6
    rates = cosine_restarts(np.arange(7), 4.0, T_0=2, T_mult=2)
    half_root = np.sqrt(0.5)
    expected = [4, 2, 4, 2 * (1 + half_root), 2, 2 * (1 - half_root), 4]
    np.testing.assert_allclose(rates, expected)
    assert cosine_restarts(2 * (2**40 - 1), 4.0, T_0=2, T_mult=2) == 4.0  # the 41st restart, exactly


def test_constant() -> None:
    assert constant(3, 0.2) == 0.2
    assert constant(np.arange(3), 0.2).tolist() == [0.2, 0.2, 0.2]


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    total_steps=st.integers(1, 500),
    steps_per_epoch=st.integers(1, 50),
    max_lr=st.floats(1e-6, 10),
)
def test_every_schedule_stays_within_bounds(
    name: str, total_steps: int, steps_per_epoch: int, max_lr: float
) -> None:
    schedule = make_schedule(name, max_lr=max_lr, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    together = schedule(np.arange(total_steps))
    assert together.shape == (total_steps,)
    assert (together >= 0).all()
    assert (together <= max_lr * (1 + 1e-12)).all()
    last = schedule(total_steps - 1)
    assert type(last) is float
    assert last == together[-1]


@pytest.mark.parametrize("epochs", [3, 12, 60, 200])
@pytest.mark.parametrize("name", ["triangular", "triangular2", "exp_range"])
def test_cycles_are_smiths(name: str, epochs: int) -> None:
    steps_per_epoch = 20
    total_steps = epochs * steps_per_epoch
    schedule = make_schedule(name, max_lr=0.4, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    rates = schedule(np.arange(total_steps + 1))
    base = 0.1
    feet = np.flatnonzero(np.isclose(rates, base))
    cycles = len(feet) - 1
    assert feet[0] == 0
    assert feet[-1] == total_steps  # it stops where a cycle ends
    assert cycles >= 3
    half_in_epochs = epochs / (2 * cycles)
    assert half_in_epochs <= 10
    if epochs >= 12:
        assert half_in_epochs >= 2


def test_restarts_end_with_the_training() -> None:
    schedule = make_schedule("cosine_restarts", max_lr=1.0, total_steps=70, steps_per_epoch=10)
    rates = schedule(np.arange(71))
    assert np.flatnonzero(rates == 1.0).tolist() == [0, 10, 30, 70]
    even = make_schedule("cosine_restarts", max_lr=1.0, total_steps=60, steps_per_epoch=10, T_mult=1)
    assert np.flatnonzero(even(np.arange(61)) == 1.0).tolist() == [0, 20, 40, 60]


def test_options_reach_the_schedule() -> None:
    schedule = make_schedule(
        "one_cycle", max_lr=1.0, total_steps=10, steps_per_epoch=5, pct_start=0.5, div_factor=4
    )
    assert schedule(0) == pytest.approx(0.25)
    assert schedule(4) == pytest.approx(1.0)
    fixed = make_schedule("triangular", max_lr=1.0, total_steps=10, steps_per_epoch=5, base_lr=0, step_size=2)
    assert fixed(np.arange(5)).tolist() == [0, 0.5, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "linear"}, "schedule must be one of one_cycle, .*, got 'linear'"),
        ({"max_lr": 0.0}, "max_lr must be a positive number, got max_lr=0.0"),
        ({"max_lr": float("nan")}, "max_lr must be a positive number"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        ({"gamma": 0.9}, "schedule 'one_cycle' takes total_steps, pct_start, .*; it was given gamma"),
        ({"name": "constant", "gamma": 0.9}, "schedule 'constant' takes no options; it was given gamma"),
        ({"pct_start": 1.5}, "pct_start must be at most 1, got 1.5"),
        ({"name": "triangular", "step_size": 0}, "step_size must be positive, got 0"),
        ({"div_factor": float("inf")}, "div_factor must be finite, got inf"),
        ({"name": "cosine_restarts", "T_mult": 0.5}, "T_mult must be at least 1, got 0.5"),
        ({"name": "triangular", "base_lr": 0.5}, "base_lr must be at most the peak rate 0.1, got 0.5"),
        ({"name": "cosine_restarts", "eta_min": 0.2}, "eta_min must be at most the peak rate 0.1, got 0.2"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    settings = {"name": "one_cycle", "max_lr": 0.1, "total_steps": 10, "steps_per_epoch": 5, **changes}
    with pytest.raises(InputError, match=message):
        make_schedule(settings.pop("name"), **settings)
