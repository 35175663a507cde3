"""The training loop: what a step changes, what is taken back, and which weights are kept."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from embedkit.learning.data import make_rows
from embedkit.learning.learned import NetworkShape
from embedkit.learning.loop import UnstableTrainingError, train
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.targets import Head
from embedkit.learning.threads import SHORTEST, SMALL_BATCH, WIDE_VECTORS, ThreadChoice
from embedkit.learning.training import Trainer
from embedkit.vocabulary import UNKNOWN


def make_trainer(n=60, *, seed=0, unknown_fraction=0.1, weights=None, classes=False):
    """One table of 8 rows whose codes say all about the target, and a number that says nothing."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(0)
    codes = rng.integers(2, 8, (n, 1)).astype(np.int32)
    targets = (codes > 4).astype("f4") if classes else ((codes - 4.5) / 2).astype("f4")
    rows = make_rows(
        codes, rng.normal(size=(n, 1)).astype("f4"), targets, np.ones(n) if weights is None else weights
    )
    head = Head("y", "binary", np.array([0, 1])) if classes else Head("y", "continuous")
    return Trainer(
        EntityEmbeddingNetwork(NetworkShape((8,), (3,), 1, (8,), 1), 0.1, 0.1),
        [head],
        rows,
        priors=[0.01],
        batch_size=16,
        weight_decay=0.01,
        unknown_fraction=unknown_fraction,
        generator=torch.Generator().manual_seed(seed),
    )


def content(trainer):
    """All that a step changes, as bytes."""
    snapshot = trainer.snapshot()
    parts = [
        *snapshot["network"].values(),
        snapshot["noise"],
    ]
    states = [*snapshot["tables"].values(), *snapshot["layers"].values()]
    parts += [part for part in states if isinstance(part, torch.Tensor)]
    parts += [snapshot["generator"], snapshot["torch"]]
    rest = snapshot["tables"]["num_steps"], snapshot["position"], snapshot["layers"]["num_steps"]
    return [part.numpy().tobytes() for part in parts], rest


@pytest.mark.parametrize("before", [0, 2, 3, 5], ids=lambda steps: f"after {steps} steps")
def test_snapshot_and_restore_bit_for_bit(before):
    trainer = make_trainer()
    for _ in range(before):
        trainer.step(0.01)
    snapshot, expected = trainer.snapshot(), content(trainer)
    first = [trainer.step(0.02) for _ in range(5)], content(trainer)
    assert content(trainer) != expected
    trainer.restore(snapshot)
    assert content(trainer) == expected
    assert ([trainer.step(0.02) for _ in range(5)], content(trainer)) == first
    trainer.restore(snapshot)  # the snapshot itself was not changed by training on
    assert content(trainer) == expected


def test_an_epoch_is_every_row_once_with_some_values_unknown():
    trainer = make_trainer(64, unknown_fraction=0.25)
    for _ in range(2):
        batches = [trainer.next_batch() for _ in range(trainer.steps_per_epoch)]
        numbers = torch.cat([batch.numeric for batch in batches])[:, 0]
        codes = torch.cat([batch.codes for batch in batches])[:, 0]
        assert sorted(numbers.tolist()) == sorted(trainer.rows.numeric[:, 0].tolist())
        assert 5 <= int((codes == UNKNOWN).sum()) <= 28
    assert not (trainer.rows.codes == UNKNOWN).any()
    plain = make_trainer(64, unknown_fraction=0.0)
    assert not (plain.next_batch().codes == UNKNOWN).any()


def test_training_learns_and_calls_the_schedule_for_every_step():
    trainer, steps = make_trainer(), []

    def schedule(step):
        steps.append(step)
        return 0.03

    history = train(trainer, schedule, 30)
    assert trainer.steps_per_epoch == 3
    assert steps == list(range(90))
    assert history.lrs == [0.03] * 90
    assert [epoch["epoch"] for epoch in history.epochs] == list(range(1, 31))
    assert history.best_epoch == 30
    assert history.epochs[-1]["validation_loss"] is None
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"] / 2
    assert trainer.evaluate(trainer.rows)[0] < 0.1


def test_a_short_training_predicts_what_it_learned():
    """Batch norm's running statistics would still be near their start after so few steps."""
    trainer = make_trainer(classes=True)
    history = train(trainer, lambda step: 0.02, 8)
    assert history.epochs[-1]["train_loss"] < 0.4
    assert trainer.evaluate(trainer.rows)[1] > 0.95


def test_batch_norm_keeps_what_it_sees_at_the_end():
    trainer = make_trainer(64)
    trainer.network.embedding_dropout.p = 0.0
    train(trainer, lambda step: 0.02, 2)
    linear, norm = trainer.network.layers[:2]
    with torch.no_grad():
        inputs = torch.cat([trainer.network.lookup(trainer.epoch.codes), trainer.epoch.numeric], dim=1)
        units = linear(inputs)
    torch.testing.assert_close(norm.running_mean, units.mean(dim=0))
    torch.testing.assert_close(norm.running_var, units.var(dim=0))


def test_batch_norm_is_measured_with_dropout():
    trainer = make_trainer(64, seed=1)
    train(trainer, lambda step: 0.02, 2)
    variances = []
    for p in (0.0, 0.8):
        trainer.network.embedding_dropout.p = p
        trainer.measure_batch_norm()
        variances.append(trainer.network.layers[1].running_var.sum().item())
    assert variances[1] > 1.05 * variances[0]


def test_evaluation_by_hand():
    trainer = make_trainer(classes=True, weights=np.linspace(0.1, 2, 60))
    train(trainer, lambda step: 0.02, 2)
    loss, accuracy = trainer.evaluate(trainer.rows)
    rows, network = trainer.rows, trainer.network.eval()
    with torch.no_grad():
        logits = network(network.lookup(rows.codes), rows.numeric)[:, 0].double().numpy()
    y, weights = rows.targets[:, 0].double().numpy(), rows.weights.double().numpy()
    np.testing.assert_allclose(
        loss, np.average(np.log1p(np.exp(-logits * (2 * y - 1))), weights=weights), rtol=1e-5
    )
    np.testing.assert_allclose(accuracy, np.average((logits > 0) == (y > 0), weights=weights), rtol=1e-6)


def test_evaluation_changes_nothing_in_the_training():
    alone = make_trainer()
    expected = [alone.step(0.01) for _ in range(4)]
    watched = make_trainer()
    for step in expected:
        watched.evaluate(watched.rows)
        assert watched.step(0.01) == step


def test_early_stopping_keeps_the_best_weights():
    trainer = make_trainer(30)
    watch, trainer.rows = trainer.rows.take(slice(0, 8)), trainer.rows.take(slice(8, None))
    rates = itertools.chain([0.02] * 10, itertools.repeat(5.0))  # good epochs, then ruinous ones
    seen = []
    evaluate = trainer.evaluate

    def spy(rows):
        result = evaluate(rows)
        trainer.tables.settle()  # as at the end, so that bytes can be compared
        seen.append((result, content(trainer)[0][:6]))
        return result

    trainer.evaluate = spy
    history = train(trainer, lambda step: next(rates), 40, watch=watch, n_iter_no_change=3)
    losses = [epoch["validation_loss"] for epoch in history.epochs]
    assert history.best_epoch == 1 + int(np.argmin(losses))
    assert len(history.epochs) == history.best_epoch + 3 < 40
    assert content(trainer)[0][:6] == seen[history.best_epoch - 1][1]
    np.testing.assert_allclose(evaluate(watch)[0], min(losses), rtol=1e-6)


class Spoiled(Trainer):
    """Its loss is NaN at a rate above a limit; notes the rates and the state at the start of each epoch."""

    limit = 1e-3

    def advance(self, lr):
        loss, hits = super().advance(lr)
        return (loss if lr <= self.limit else loss * math.nan), hits


def test_an_unstable_epoch_is_taken_back_at_a_lower_rate():
    trainer = make_trainer()
    trainer.__class__ = Spoiled
    with pytest.warns(RuntimeWarning, match=r"epoch 1: repeating it at 0\.\d+ times the rate") as caught:
        history = train(trainer, lambda step: 0.05, 3)
    assert len(caught) == 2
    assert history.restarts == 2
    np.testing.assert_allclose(history.lrs, 0.0005)
    calm = make_trainer()
    expected = train(calm, lambda step: 0.0005, 3)
    assert [epoch["train_loss"] for epoch in history.epochs] == pytest.approx(
        [epoch["train_loss"] for epoch in expected.epochs], rel=1e-6
    )


def test_after_three_restarts_the_error_has_a_name_and_the_weights_are_sound():
    trainer = make_trainer()
    trainer.__class__ = Spoiled
    trainer.limit = 0.0
    start = content(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UnstableTrainingError, match=r"epoch 1, not even at 0.001 times.*lower max_lr"):
            train(trainer, lambda step: 0.05, 3)
    assert len(caught) == 3
    assert content(trainer) == start


def test_weights_that_the_last_step_of_an_epoch_broke_are_taken_back():
    trainer = make_trainer()
    ruinous = trainer.steps_per_epoch - 1
    with pytest.warns(RuntimeWarning, match="epoch 1: repeating it at 0.1"):
        history = train(
            trainer, lambda step: math.inf if step == ruinous and not trainer.tried() else 0.01, 2
        )
    assert history.restarts == 1
    assert trainer.is_finite()


@pytest.fixture(autouse=True)
def _try_once(monkeypatch):
    """`Trainer.tried`: False when first called, then True."""
    calls = itertools.count()
    monkeypatch.setattr(Trainer, "tried", lambda self: next(calls) > 0, raising=False)


NUMBER, CLASSES = Head("y", "continuous"), Head("y", "multiclass", np.arange(5))


@pytest.mark.skipif(not WIDE_VECTORS, reason="this processor's steps always take all threads")
@pytest.mark.parametrize("batch_size", [512, SMALL_BATCH])
@pytest.mark.parametrize("heads", [[NUMBER], [CLASSES], [NUMBER, Head("z", "continuous")]], ids=len)
def test_a_step_is_the_same_on_any_number_of_threads(heads, batch_size):
    before, found = torch.get_num_threads(), []
    rng = np.random.default_rng(0)
    sizes, dims, n = (300, 40, 2000), (17, 5, 30), 3000
    codes = np.column_stack([rng.integers(2, size, n) for size in sizes]).astype(np.int32)
    targets = rng.integers(0, 5, (n, 1)) if heads[0] is CLASSES else rng.normal(size=(n, len(heads)))
    rows = make_rows(codes, rng.normal(size=(n, 3)).astype("f4"), targets.astype("f4"), rng.random(n))
    shape = NetworkShape(sizes, dims, 3, (200, 150), sum(head.n_outputs for head in heads))
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            trainer = Trainer(
                EntityEmbeddingNetwork(shape, 0.1, 0.1),
                heads,
                rows,
                priors=[0.01] * 3,
                batch_size=batch_size,
                weight_decay=0.01,
                unknown_fraction=0.1,
                generator=torch.Generator().manual_seed(0),
            )
            trainer.threads = ThreadChoice(1)
            losses = [trainer.step(0.01)[0] for _ in range(4)]
            trainer.micro_batch = batch_size // 2
            losses += [trainer.step(0.01)[0] for _ in range(2)]
            found.append((losses, content(trainer)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


class Steps:
    """Steps that take so long on one thread and so long on all, by a clock of their own."""

    def __init__(self, one, many):
        self.seconds, self.now, self.threads = {1: one, 2: many}, 0.0, []

    def __call__(self):
        self.threads.append(torch.get_num_threads())
        self.now += self.seconds[self.threads[-1]]

    def clock(self):
        return self.now


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("many", "trial"), [(0.5, 5), (0.99, 5), (2.0, 5), (9.0, 3)])
def test_steps_take_the_faster_number_of_threads(two_threads, many, trial):
    steps, better = Steps(1.0, many), 2 if many < 0.95 else 1
    choice = ThreadChoice(2, steps.clock)
    for _ in range(1000):
        choice.run(steps)
        assert torch.get_num_threads() == 2
    assert steps.threads[: 5 + trial] == [1] * 5 + [2] * trial
    assert steps.threads[5 + trial : 5 + trial + SHORTEST] == [better] * SHORTEST
    assert steps.threads.count(3 - better) <= 25  # trials get rarer


def test_threads_that_get_slow_are_given_up_at_once_and_tried_again(two_threads):
    steps = Steps(1.0, 0.5)
    choice = ThreadChoice(2, steps.clock)
    for _ in range(500):
        choice.run(steps)
    assert choice.chosen == 2
    steps.seconds[2], done = 1000.0, len(steps.threads)
    for _ in range(500):
        choice.run(steps)
    assert steps.threads[done:].count(2) <= 2 + 3 * 4
    steps.seconds[2] = 0.5
    for _ in range(1000):
        choice.run(steps)
    assert choice.chosen == 2


def test_a_step_that_fails_leaves_the_number_of_threads(two_threads):
    def fail():
        assert torch.get_num_threads() == 1
        raise MemoryError

    with pytest.raises(MemoryError):
        ThreadChoice(2).run(fail)
    assert torch.get_num_threads() == 2


def test_only_small_steps_have_a_choice(two_threads):
    trainer = make_trainer()
    assert trainer.threads.most == 2
    torch.set_num_threads(1)
    assert make_trainer().threads.most == 1


def test_the_scale_of_the_weights_changes_nothing():
    found = []
    for weights in (np.ones(60), np.full(60, 3.5)):
        trainer = make_trainer(weights=weights)
        found.append((trainer, [trainer.step(0.01)[0] for _ in range(20)]))
    (light, losses), (heavy, others) = found
    assert others == pytest.approx(losses)
    torch.testing.assert_close(light.noise, heavy.noise)
    torch.testing.assert_close(light.network.tables[0], heavy.network.tables[0])
