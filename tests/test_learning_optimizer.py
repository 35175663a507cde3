"""The optimizer of the tables against a dense reference, and by hand."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedkit.learning.optimizer import AdamW, TableOptimizer


class DenseOptimizer:
    """The same in float64 and in words: every step touches every row of every table."""

    def __init__(self, tables, priors, beta=0.99):
        self.tables, self.priors, self.beta = tables, priors, beta
        self.second_moments, self.num_steps = [0.0] * len(tables), 0

    def step(self, codes, gradients, lr):
        self.num_steps += 1
        for i, table in enumerate(self.tables):
            gradient = np.zeros_like(table)
            for code, part in zip(codes[:, i], gradients[i], strict=True):
                gradient[code] += part
            seen = sorted(set(codes[:, i].tolist()))
            moment = np.mean([np.mean(gradient[code] ** 2) for code in seen])
            self.second_moments[i] = self.beta * self.second_moments[i] + (1 - self.beta) * moment
            rate = lr / (np.sqrt(self.second_moments[i] / (1 - self.beta**self.num_steps)) + 1e-12)
            table *= 1 - min(rate * self.priors[i], 0.5)
            table -= rate * gradient


def optimizers(seed, sizes=((4, 2), (3, 3)), priors=(0.02, 0.5)):
    rng = np.random.default_rng(seed)
    starts = [rng.normal(size=size) for size in sizes]
    lazy = TableOptimizer([torch.tensor(start, dtype=torch.float32) for start in starts], priors)
    return lazy, DenseOptimizer(starts, priors), rng


def steps(rng, lrs, batch=5):
    for lr in lrs:
        codes = np.column_stack([rng.integers(0, 4, batch), rng.integers(0, 3, batch)])
        yield codes, [rng.normal(size=(batch, 2)), rng.normal(size=(batch, 3))], lr


def take(lazy, codes, gradients, lr):
    parts = [torch.tensor(part, dtype=torch.float32) for part in gradients]
    lazy.step(torch.tensor(codes, dtype=torch.int32), parts, lr)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([1e-3, 0.1, 1.0]), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_lazy_shrinkage_is_dense_shrinkage(seed, lrs, batch):
    lazy, dense, rng = optimizers(seed)
    for codes, gradients, lr in steps(rng, lrs, batch):
        found = lazy.lookup(torch.tensor(codes, dtype=torch.int32))  # what a batch looks up is up to date
        expected = np.concatenate([table[codes[:, i]] for i, table in enumerate(dense.tables)], axis=1)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)
        take(lazy, codes, gradients, lr)
        dense.step(codes, gradients, lr)
    lazy.settle()
    for found, expected in zip(lazy.tables, dense.tables, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)


def test_one_step_by_hand():
    table = torch.tensor([[1.0], [2.0], [4.0]])
    optimizer = TableOptimizer([table], [0.5])
    codes = torch.tensor([[0], [0], [1]], dtype=torch.int32)
    # Categories 0 and 1 have gradients 1 + 2 = 3 and -1: mean square (9 + 1) / 2 = 5 after bias correction.
    optimizer.step(codes, [torch.tensor([[1.0], [2.0], [-1.0]])], lr=0.2)
    rate = 0.2 / 5**0.5
    optimizer.settle()
    decay = 1 - rate * 0.5
    np.testing.assert_allclose(table[:, 0], [decay - 3 * rate, 2 * decay + rate, 4 * decay], rtol=1e-6)


def test_frequent_categories_go_where_their_rows_say_and_rare_ones_stay():
    """Minimise sum_i count_i / n / 2 (v_i - 1)^2 + prior / 2 v_i^2: v_i = count_i / (count_i + n prior)."""
    counts, n, prior = np.array([90, 9, 1]), 100, 0.1
    table = torch.zeros(3, 1)
    optimizer = TableOptimizer([table], [prior])
    codes = torch.tensor(np.repeat([0, 1, 2], counts)[:, None], dtype=torch.int32)
    for step in range(1500):
        optimizer.step(codes, [(optimizer.lookup(codes) - 1) / n], lr=0.05 * 0.996**step)
    optimizer.settle()
    np.testing.assert_allclose(table[:, 0], counts / (counts + n * prior), atol=2e-3)


def test_times_are_the_rates_taken():
    optimizer = TableOptimizer([torch.zeros(2, 1)], [0.1])
    codes = torch.tensor([[0], [1]], dtype=torch.int32)
    for lr in (0.3, 0.6):  # gradients of 2: the rates are 0.3 / 2 and 0.6 / 2
        optimizer.step(codes, [torch.tensor([[2.0], [-2.0]])], lr)
    np.testing.assert_allclose(optimizer.times, [0.45], rtol=1e-6)
    state = optimizer.state()
    optimizer.step(codes, [torch.tensor([[2.0], [-2.0]])], 1.0)
    optimizer.load_state(state)
    np.testing.assert_allclose(optimizer.times, [0.45], rtol=1e-6)


def test_a_step_far_too_long_halves_at_most():
    table = torch.tensor([[1.0], [8.0]])
    optimizer = TableOptimizer([table], [1e9])
    codes = torch.tensor([[0]], dtype=torch.int32)
    optimizer.step(codes, [torch.tensor([[0.1]])], lr=0.5)
    optimizer.settle()
    np.testing.assert_allclose(table[:, 0], [0.0, 4.0], atol=1e-7)


def test_stored_numbers_stay_in_range_however_small_the_factor():
    table = torch.tensor([[1.0], [8.0]])
    optimizer = TableOptimizer([table], [1e9])
    codes = torch.tensor([[0]], dtype=torch.int32)
    for step in range(200):  # a factor of 2 ** -200 is out of float32's range
        before = optimizer.lookup(codes)
        optimizer.step(codes, [torch.tensor([[-1.0]])], lr=0.5)
        np.testing.assert_allclose(optimizer.lookup(codes), 0.5 * before + 0.5, rtol=1e-5)
        if step == 9:
            expected = optimizer.lookup(torch.tensor([[1]], dtype=torch.int32))
            np.testing.assert_allclose(expected, 8 * 0.5**10, rtol=1e-5)
    assert table.isfinite().all()
    optimizer.settle()
    np.testing.assert_allclose(table[:, 0], [1.0, 0.0], atol=1e-6)


def test_state_goes_back_bit_for_bit():
    lazy, _, rng = optimizers(0)
    plan = list(steps(rng, [0.1] * 6))
    for step in plan[:3]:
        take(lazy, *step)
    state, tables = lazy.state(), [table.clone() for table in lazy.tables]
    for step in plan[3:]:
        take(lazy, *step)
    lazy.settle()
    expected = [table.clone() for table in lazy.tables]
    lazy.load_state(state)
    for table, saved in zip(lazy.tables, tables, strict=True):
        table.copy_(saved)
    for step in plan[3:]:
        take(lazy, *step)
    lazy.settle()
    for table, other in zip(lazy.tables, expected, strict=True):
        assert torch.equal(table, other)


def test_adamw_is_that_of_torch():
    rng = np.random.default_rng(0)
    start = torch.tensor(rng.normal(size=7))
    ours = AdamW(start.clone(), weight_decay=0.1)
    theirs = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], betas=ours.betas, weight_decay=0.1)
    for step in range(20):
        gradient = torch.tensor(rng.normal(size=7)) * 10.0 ** -(step % 5)
        theirs.grad, reference.param_groups[0]["lr"] = gradient, 0.1 / (1 + step)
        reference.step()
        if step == 10:
            saved, parameters = ours.state(), ours.parameters.clone()
            ours.step(-gradient, 1.0)
            ours.load_state(saved)
            ours.parameters.copy_(parameters)
        ours.step(gradient, 0.1 / (1 + step))
        torch.testing.assert_close(ours.parameters, theirs.detach())
