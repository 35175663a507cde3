"""The range test: what it suggests, what it distrusts, and that it leaves nothing behind."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from embedkit.errors import InputError
from embedkit.learning.lr_finder import RULES, LRFinderResult, find_lr
from embedkit.learning.lr_rules import (
    judge_curve,
    smith_bounds,
    suggest_balanced,
    suggest_fall,
    suggest_minimum,
    suggest_slide,
    suggest_steepest,
    suggest_valley,
)

curves = npst.arrays(float, st.integers(20, 60), elements=st.floats(0.01, 100).map(lambda x: round(x, 3)))


def rates_for(losses: np.ndarray) -> np.ndarray:
    return np.geomspace(1e-7, 10, len(losses))


class Scripted:
    """A trainable whose loss (and accuracy) is a function of the rate."""

    def __init__(
        self, loss: Callable[[float], float], accuracy: Callable[[float], float] | None = None
    ) -> None:
        self.loss, self.accuracy = loss, accuracy
        self.rates: list[float] = []
        self.restored: list[object] = []

    def snapshot(self) -> object:
        return "as it was"

    def restore(self, snapshot: object) -> None:
        self.restored.append(snapshot)

    def step(self, lr: float) -> tuple[float, float | None]:
        self.rates.append(lr)
        return self.loss(lr), None if self.accuracy is None else self.accuracy(lr)


def good_loss(lr: float) -> float:
    """1 until 1e-4, down to 0.2 at 1e-1, exploding above."""
    fall = np.interp(math.log10(lr), [-4, -1], [1.0, 0.2])
    return float(fall + max(0.0, lr - 0.1) * 5)


class Network:
    """A real training: batch norm, dropout, Adam, batches drawn from both random states."""

    def __init__(self, fails_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 1),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.X = torch.randn(256, 4)
        self.y = (self.X[:, :1] > 0).float()
        self.steps, self.fails_at, self.error = 0, fails_at, error
        for _ in range(3):  # so that there are moments and running statistics to lose
            self.step(0.05)
        self.steps = 0

    def snapshot(self) -> object:
        states = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        return *states, torch.get_rng_state(), np.random.get_state()

    def restore(self, snapshot: object) -> None:
        model, optimizer, torch_state, numpy_state = snapshot
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)

    def step(self, lr: float) -> tuple[float, float | None]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise self.error("in the middle")
        rows = torch.from_numpy(np.random.permutation(256)[:64])
        logits = self.model(self.X[rows])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, self.y[rows])
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        accuracy = ((logits > 0) == (self.y[rows] > 0.5)).float().mean()
        return loss.item(), accuracy.item()


def everything(network: Network) -> list[np.ndarray]:
    """All that a step changes, as arrays of bytes and numbers."""
    moments = network.optimizer.state_dict()
    arrays = [value.numpy().copy() for value in network.model.state_dict().values()]
    arrays += [np.asarray(v).copy() for state in moments["state"].values() for v in state.values()]
    arrays += [np.array(moments["param_groups"][0]["lr"]), torch.get_rng_state().numpy().copy()]
    _, keys, *rest = np.random.get_state()
    return [*arrays, keys.copy(), np.array(rest)]


def test_a_run_leaves_the_training_as_it_was() -> None:
    network = Network()
    before = everything(network)
    result = find_lr(network)
    assert network.steps > 20
    assert len(result.lrs) == len(result.losses) == len(result.accuracies) == network.steps
    for was, now in zip(before, everything(network), strict=True):
        assert was.tobytes() == now.tobytes()


def test_training_after_the_finder_is_training_without_it() -> None:
    with_finder, without = Network(), Network()
    find_lr(with_finder, num_iter=30)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    losses = [with_finder.step(0.01) for _ in range(5)]
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    assert losses == [without.step(0.01) for _ in range(5)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_the_training_as_it_was(error: type[BaseException]) -> None:
    network = Network(fails_at=17, error=error)
    before = everything(network)
    with pytest.raises(error, match="in the middle"):
        find_lr(network)
    assert network.steps == 17
    for was, now in zip(before, everything(network), strict=True):
        assert was.tobytes() == now.tobytes()


def test_an_interrupted_progress_bar_restores_too() -> None:
    def broken_bar(iterations: range) -> object:
        yield next(iter(iterations))
        raise KeyboardInterrupt

    trainable = Scripted(good_loss)
    with pytest.raises(KeyboardInterrupt):
        find_lr(trainable, progress=broken_bar)
    assert trainable.restored == ["as it was"]


def test_the_sweep_is_exponential_and_shows_its_progress() -> None:
    seen = []
    trainable = Scripted(lambda lr: 1.0)

    def bar(iterations: range) -> object:
        seen.append(len(iterations))
        return iterations

    result = find_lr(trainable, start_lr=1e-3, end_lr=1e3, num_iter=7, progress=bar)
    np.testing.assert_allclose(trainable.rates, [1e-3, 1e-2, 1e-1, 1, 1e1, 1e2, 1e3])
    np.testing.assert_array_equal(result.lrs, trainable.rates)
    assert seen == [7]
    assert trainable.restored == ["as it was"]


def test_smoothing_by_hand() -> None:
    losses = iter([4.0, 2.0, 2.0])
    result = find_lr(Scripted(lambda lr: next(losses)), num_iter=3, smoothing=0.5)
    # weights of the losses so far: 1; 1/3, 2/3; 1/7, 2/7, 4/7
    np.testing.assert_allclose(result.smoothed_losses, [4, 8 / 3, 16 / 7])
    np.testing.assert_array_equal(result.losses, [4, 2, 2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_sweep(value: float) -> None:
    trainable = Scripted(lambda lr: good_loss(lr) if lr < 0.5 else value)
    result = find_lr(trainable)
    assert np.isfinite(result.losses).all()
    assert len(trainable.rates) == len(result.losses) + 1 < 100
    assert trainable.restored == ["as it was"]
    assert result.reliable


def test_four_times_the_lowest_loss_ends_the_sweep() -> None:
    trainable = Scripted(lambda lr: 1.0 if lr < 0.1 else 3.9 if lr < 1 else 4.1)
    result = find_lr(trainable, smoothing=0)
    assert result.losses[-1] == 4.1
    assert np.count_nonzero(result.losses == 4.1) == 1


def test_negative_losses_do_not_end_the_sweep() -> None:
    assert len(find_lr(Scripted(lambda lr: good_loss(min(lr, 0.1)) - 3)).losses) == 100


def valley_naive(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The longest decreasing subsequence, pair by pair."""
    length = [1] * len(losses)
    for i in range(len(losses)):
        for j in range(i):
            if losses[j] > losses[i]:
                length[i] = max(length[i], length[j] + 1)
    longest = max(length)
    end = length.index(longest)
    run = list(range(end - longest + 1, end + 1))
    return lrs[run[(len(run) - 1) // 2]]


def slide_naive(lrs: np.ndarray, losses: np.ndarray, width: int, threshold: float) -> float:
    """fastai's loop from the right end, on losses divided by the first."""
    slopes = np.gradient(losses / losses[0])
    right, left = -1, -1 - width
    suggestion = lrs[left]
    while left >= -len(losses) and abs(slopes[right] - slopes[left]) > threshold:
        suggestion = lrs[left]
        right, left = right - 1, left - 1
    return suggestion


def steepest_naive(lrs: np.ndarray, losses: np.ndarray) -> float:
    best, best_slope = 0, math.inf
    for i in range(len(lrs) - 1):
        slope = (losses[i + 1] - losses[i]) / (math.log(lrs[i + 1]) - math.log(lrs[i]))
        if slope < best_slope - 1e-9:
            best, best_slope = i, slope
    return lrs[best]


@given(losses=curves)
def test_suggestions_are_the_naive_ones(losses: np.ndarray) -> None:
    lrs = rates_for(losses)
    assert suggest_minimum(lrs, losses) == lrs[list(losses).index(min(losses))] / 10
    assert suggest_valley(lrs, losses) == valley_naive(lrs, losses)
    assert suggest_slide(lrs, losses, 15, 0.005) == slide_naive(lrs, losses, 15, 0.005)
    drops = np.diff(losses)
    if np.count_nonzero(drops <= drops.min() + 1e-6) == 1:  # no tie that rounding could decide
        assert suggest_steepest(lrs, losses) == steepest_naive(lrs, losses)


def test_suggestions_by_hand() -> None:
    lrs = np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0])
    losses = np.array([5.0, 4.9, 4.0, 2.0, 1.0, 9.0])
    assert suggest_minimum(lrs, losses) == pytest.approx(0.1)  # lowest at 1
    assert suggest_steepest(lrs, losses) == 1e-2  # from 4 to 2
    assert suggest_balanced(lrs, losses) == pytest.approx(10**-1.5)  # between 0.1 and 0.01
    assert suggest_valley(lrs, losses) == 1e-2  # middle of the first five
    assert suggest_valley(lrs, np.sort(losses)[::-1]) == 1e-2  # all six fall
    assert suggest_valley(lrs, np.sort(losses)) == 1e-4  # none falls


def test_steepest_is_on_the_log_axis() -> None:
    # Uneven rates: 1e-6 -> 1e-5 loses 0.1 over one decade, 1e-2 -> 1e-1 loses 0.5 over one decade.
    # Against the raw rate the first would win by a factor of 2,000.
    lrs = np.array([1e-6, 1e-5, 1e-2, 1e-1])
    assert suggest_steepest(lrs, np.array([1.0, 0.9, 0.9, 0.4])) == 1e-2


def test_slide_by_hand() -> None:
    losses = np.r_[np.full(20, 1.0), 1.0 + 0.1 * np.arange(1, 11)]  # flat for 20 points, then up
    lrs = rates_for(losses)
    # Slopes: 0 to point 18, 0.05 at 19, then 0.1. With a width of 5 an interval begins to differ when
    # its upper end reaches 19, so the lowest low end that differs from its upper end is 14.
    assert suggest_slide(lrs, losses, width=5) == lrs[24]  # the last interval: 24 to 29, both 0.1
    assert suggest_slide(lrs[:22], losses[:22], width=5) == lrs[14]


@given(losses=curves, scale=st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_units_of_the_loss_do_not_matter(losses: np.ndarray, scale: float) -> None:
    lrs = rates_for(losses)
    for suggest in (
        suggest_minimum,
        suggest_steepest,
        suggest_valley,
        suggest_slide,
        suggest_balanced,
        suggest_fall,
        smith_bounds,
    ):
        assert suggest(lrs, losses * scale) == suggest(lrs, losses)
    assert judge_curve(losses * scale, False)[0] == judge_curve(losses, False)[0]


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_fall_is_twice_the_rate_at_four_fifths_of_the_way_down(noise: float) -> None:
    lrs = np.geomspace(1e-6, 10, 141)  # 20 points a decade
    losses = np.interp(np.log10(lrs), [-6, -4, -2, 0, 1], [2.0, 2.0, 1.0, 1.0, 90])
    losses += np.random.default_rng(0).normal(scale=noise, size=141)
    # 80 % of the fall is at 10**-2.4
    assert math.log10(suggest_fall(lrs, losses) / 2) == pytest.approx(-2.4, abs=0.06 if noise == 0 else 0.2)


def test_fall_is_where_the_loss_comes_down_for_good() -> None:
    lrs = np.geomspace(1e-6, 10, 141)
    points = [-6, -5, -4.5, -4, -3, -2, 0, 1], [2.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0, 90]
    losses = np.interp(np.log10(lrs), *points)
    assert suggest_fall(lrs, losses) > 2 * 10**-2.4


def test_fall_of_a_loss_that_only_grows_is_at_its_start() -> None:
    lrs = np.geomspace(1e-3, 1, 31)
    assert suggest_fall(lrs, np.linspace(1, 2, 31)) == 2e-3


@given(losses=curves)
@settings(max_examples=50)
def test_smith_bounds_are_a_range(losses: np.ndarray) -> None:
    lrs = rates_for(losses)
    base_lr, max_lr = smith_bounds(lrs, losses)
    assert 0 < base_lr < max_lr
    assert max_lr in lrs


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_smith_bounds_from_accuracy(noise: float) -> None:
    lrs = np.geomspace(1e-6, 10, 141)  # 20 points a decade
    level = np.interp(np.log10(lrs), [-6, -4, -2, 0, 1], [0.5, 0.5, 0.9, 0.9, 0.4])
    accuracy = level + np.random.default_rng(0).normal(scale=noise, size=141)
    base_lr, max_lr = smith_bounds(lrs, np.ones(141), accuracy)
    # 10 % of the rise is at 10**-3.8, 90 % at 10**-2.2
    assert math.log10(base_lr) == pytest.approx(-3.8, abs=0.11 if noise == 0 else 0.5)
    assert math.log10(max_lr) == pytest.approx(-2.2, abs=0.11 if noise == 0 else 0.5)


def test_smith_bounds_from_loss() -> None:
    lrs = np.geomspace(1e-6, 10, 141)
    losses = np.interp(np.log10(lrs), [-6, -4, -2, 0, 1], [2.0, 2.0, 0.4, 0.4, 90])
    base_lr, max_lr = smith_bounds(lrs, losses)
    assert math.log10(base_lr) == pytest.approx(-3.8, abs=0.11)
    assert math.log10(max_lr) == pytest.approx(-2.2, abs=0.11)


def test_smith_bounds_stop_where_the_accuracy_turns_ragged() -> None:
    lrs = np.geomspace(1e-6, 10, 141)
    level = np.interp(np.log10(lrs), [-6, -4, -3, -2.5, -2, 0, 1], [0.5, 0.5, 0.7, 0.6, 0.6, 0.9, 0.9])
    _, max_lr = smith_bounds(lrs, np.ones(141), level)
    assert 1e-3 < max_lr < 10**-2.5


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_does_not_make_an_accuracy_ragged(seed: int) -> None:
    lrs = np.geomspace(1e-6, 10, 141)
    level = np.interp(np.log10(lrs), [-6, -3, -1, 0, 1], [0.5, 0.5, 0.9, 0.9, 0.4])
    accuracy = level + np.random.default_rng(seed).normal(scale=0.08, size=141)
    _, max_lr = smith_bounds(lrs, np.ones(141), accuracy)
    assert 10**-2.2 < max_lr <= 1


def test_smith_bounds_of_an_accuracy_that_never_rises_are_those_of_the_loss() -> None:
    lrs = np.geomspace(1e-6, 10, 141)
    losses = np.interp(np.log10(lrs), [-6, -4, -2, 0, 1], [2.0, 2.0, 0.4, 0.4, 90])
    accuracy = 0.8 + np.random.default_rng(0).normal(scale=0.02, size=141)
    assert smith_bounds(lrs, losses, accuracy) == smith_bounds(lrs, losses)


def test_smith_bounds_without_a_start_take_a_quarter() -> None:
    lrs = np.geomspace(1e-3, 1, 31)
    base_lr, max_lr = smith_bounds(lrs, np.linspace(1, 2, 31))  # worse from the first rate on
    assert base_lr == max_lr / 4


def test_a_good_curve_is_used() -> None:
    result = find_lr(Scripted(good_loss, accuracy=lambda lr: 1 - min(good_loss(lr), 1.0)))
    assert result.reliable
    assert (
        result.reason == "the loss starts at 1, its lowest is 0.2916, and then it grows"
    )  # running median of 13 points
    assert set(result.suggestions) == set(RULES)
    assert result.suggestion == result.suggestions["valley"]
    for rule in ("steepest", "valley", "smith_base", "smith_max"):
        assert 1e-5 < result.suggestions[rule] < 1


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_the_callers_choice(rule: str) -> None:
    result = find_lr(Scripted(good_loss), rule=rule)
    assert result.suggestion == result.suggestions[rule]


def test_the_suggestion_is_held_within_bounds() -> None:
    free = find_lr(Scripted(good_loss)).suggestion
    low, high = free * 2, free / 2
    assert find_lr(Scripted(good_loss), bounds=(low, 10.0)).suggestion == low
    held = find_lr(Scripted(good_loss), bounds=(0.0, high))
    assert held.suggestion == high
    assert f"valley is at {free:.2g}, held to {high:.2g}" in held.reason
    assert "held" not in find_lr(Scripted(good_loss), bounds=(high, low)).reason


def test_a_fallback_is_held_within_bounds_under_its_own_name() -> None:
    result = find_lr(Scripted(lambda lr: 1.0), fallback=1e-3, bounds=(1e-2, 1e-2))
    assert not result.reliable
    assert result.suggestion == 1e-2
    assert result.reason.endswith("; the fallback is at 0.001, held to 0.01")


def noisy(lr_to_loss: Callable[[float], float], scale: float, seed: int = 0) -> Callable[[float], float]:
    rng = np.random.default_rng(seed)
    return lambda lr: lr_to_loss(lr) + float(rng.normal(scale=scale))


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_curve_that_falls_is_used(seed: int) -> None:
    assert find_lr(Scripted(noisy(good_loss, 0.1, seed))).reliable


@pytest.mark.parametrize(
    ("loss", "options", "reason"),
    [
        (lambda lr: 0.7, {}, "a flat curve, raise end_lr"),
        (lambda lr: 0.7 - 0.006 * (lr > 1e-4) * (lr < 1), {}, "a flat curve"),
        (noisy(lambda lr: 0.7, 0.1), {}, "which its noise can explain: raise num_iter or batch_size"),
        (noisy(good_loss, 2.0), {"stop_factor": 1e9, "end_lr": 0.1}, "which its noise can explain"),
        (good_loss, {"end_lr": 1e-2}, "at the highest rate: it still falls, raise end_lr"),
        (lambda lr: 1 + lr, {"start_lr": 0.1}, "it diverges at once, lower start_lr"),
        (lambda lr: 10**lr, {"start_lr": 1.0}, "starts at 11.*: it diverges at once, lower start_lr"),
        (
            lambda lr: math.nan,
            {},
            "diverges after 0 steps: lower start_lr or raise num_iter",
        ),
        (good_loss, {"num_iter": 19, "end_lr": 0.1}, "only 19 steps, too few to read: take at least 20"),
        (good_loss, {"num_iter": 20}, "only 20 steps .*: raise num_iter"),
    ],
)
def test_a_bad_curve_is_not_used(loss: Callable[[float], float], options: dict, reason: str) -> None:
    result = find_lr(Scripted(loss), fallback=0.007, **options)
    assert isinstance(result, LRFinderResult)
    assert not result.reliable
    assert result.suggestion == 0.007
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(result.reason)


def test_noise_alone_is_seldom_trusted() -> None:
    rng = np.random.default_rng(0)
    trusted = [judge_curve(1 + rng.normal(scale=0.1, size=100), False)[0] for _ in range(500)]
    assert sum(trusted) <= 5


def test_a_real_network_gets_a_usable_rate() -> None:
    network = Network()
    torch.manual_seed(1)
    for layer in network.model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    result = find_lr(network)
    assert result.reliable, result.reason
    assert 1e-4 < result.suggestion < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_lr": 0.0}, "rates must satisfy 0 < start_lr < end_lr, got start_lr=0.0, end_lr=10.0"),
        ({"start_lr": 1.0, "end_lr": 0.1}, "rates must satisfy"),
        ({"end_lr": math.inf}, "rates must satisfy"),
        ({"num_iter": 0}, "num_iter must be at least 1, got num_iter=0"),
        ({"stop_factor": 1.0}, "stop_factor must be more than 1"),
        ({"smoothing": 1.0}, "smoothing must be at least 0 and under 1"),
        ({"rule": "best"}, "rule must be one of minimum, .*, got 'best'"),
        ({"fallback": 0.0}, "fallback must be a positive rate"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    trainable = Scripted(good_loss)
    with pytest.raises(InputError, match=message):
        find_lr(trainable, **options)
    assert trainable.rates == []
