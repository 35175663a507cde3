"""Memory that runs out, injected: training goes on with fewer rows at a time, or ends with a named error."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from embedkit import EntityEmbeddingRegressor
from embedkit.learning import memory
from embedkit.learning.data import make_rows
from embedkit.learning.gradients import LayerGradients
from embedkit.learning.learned import NetworkShape
from embedkit.learning.loop import UnstableTrainingError, train
from embedkit.learning.memory import OutOfMemoryError, halved, ran_out
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.optimizer import TableOptimizer
from embedkit.learning.targets import Head
from embedkit.learning.training import Trainer

HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(), HOST]


def make_trainer(n: int = 256, batch_size: int = 64, hidden: tuple[int, ...] = (8,)) -> Trainer:
    """Two targets, a number and a class, that follow from the codes; no dropout."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    codes = rng.integers(2, 8, (n, 2)).astype(np.int32)
    targets = np.stack([(codes[:, 0] - 4.5) / 2, codes[:, 1] > 4], axis=1).astype("f4")
    rows = make_rows(codes, rng.normal(size=(n, 1)).astype("f4"), targets, rng.uniform(0.5, 2, n))
    heads = [Head("y", "continuous"), Head("z", "binary", np.array([0, 1]))]
    return Trainer(
        EntityEmbeddingNetwork(NetworkShape((8, 8), (3, 3), 1, hidden, 2)),
        heads,
        rows,
        priors=[0.01, 0.01],
        batch_size=batch_size,
        weight_decay=0.01,
        unknown_fraction=0.1,
        generator=torch.Generator().manual_seed(0),
    )


def limit(patch: pytest.MonkeyPatch, rows: int, error: BaseException) -> None:
    """No more than so many rows fit into memory at a time."""
    forward = LayerGradients.forward

    def limited(self: LayerGradients, embedded: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        if len(embedded) > rows:
            raise error
        return forward(self, embedded, numeric)

    patch.setattr(LayerGradients, "forward", limited)


def weights(trainer: Trainer) -> list[np.ndarray]:
    trainer.tables.settle()
    return [part.detach().numpy().copy() for part in trainer.network.parameters()]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "host", "torch on the host"])
def test_fewer_rows_at_a_time(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 20, error)
    trainer = make_trainer()
    with pytest.warns(RuntimeWarning, match="out of memory in a training step with") as caught:
        history = train(trainer, lambda step: 0.02, 6)
    assert [str(warning.message)[-2:] for warning in caught] == ["32", "16"]
    assert trainer.micro_batch == 16
    assert len(history.epochs) == 6
    assert history.epochs[-1]["train_loss"] < 0.7 * history.epochs[0]["train_loss"]


def test_the_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    """Without hidden layers, so that batch norm has no say."""
    expected, found = (make_trainer(hidden=()) for _ in range(2))
    found.micro_batch = 17
    for _ in range(6):
        loss, hits = expected.step(0.02)
        other_loss, other_hits = found.step(0.02)
        np.testing.assert_allclose([loss, hits], [other_loss, other_hits], rtol=1e-5)
    for a, b in zip(weights(expected), weights(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(expected.noise, found.noise)


def test_a_step_that_ran_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: the same rows are taken again, none is left out or seen twice."""
    expected, found = make_trainer(hidden=()), make_trainer(hidden=())
    forward, calls = LayerGradients.forward, []

    def once(self: LayerGradients, embedded: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        calls.append(len(embedded))
        if len(calls) == 3:
            raise MemoryError
        return forward(self, embedded, numeric)

    for _ in range(4):
        expected.advance(0.02)
    monkeypatch.setattr(LayerGradients, "forward", once)
    with pytest.warns(RuntimeWarning, match="with 64 rows at a time: going on with 32"):
        losses = [found.advance(0.02)[0] for _ in range(4)]
    assert len(losses) == 4
    assert calls == [64, 64, 64, 32, 32, 32, 32]
    for a, b in zip(weights(expected), weights(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_that_ran_out_halfway_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers have moved, the tables have not: the epoch starts again from its beginning."""
    step, failed = TableOptimizer.step, []

    def fails_once(self: TableOptimizer, *arguments: object) -> None:
        if self.num_steps == 6 and not failed:
            failed.append(True)
            raise MemoryError
        step(self, *arguments)

    monkeypatch.setattr(TableOptimizer, "step", fails_once)
    trainer = make_trainer(hidden=())
    with pytest.warns(RuntimeWarning, match="going on with 32"):
        found = train(trainer, lambda step: 0.02, 3)
    expected = train(plain := make_trainer(hidden=()), lambda step: 0.02, 3)
    assert failed
    for a, b in zip(weights(plain), weights(trainer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    losses = [[epoch["train_loss"] for epoch in history.epochs] for history in (expected, found)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "host", "torch on the host"])
def test_no_room_for_a_few_rows_has_a_name(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 3, error)
    with pytest.raises(OutOfMemoryError, match="in a training step with 16 rows at a time: set a smaller"):
        train(make_trainer(), lambda step: 0.02, 2)


def test_an_epoch_that_does_not_fit_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Trainer) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "draw_epoch", fails)
    with pytest.raises(OutOfMemoryError, match="give them as Parquet files"):
        make_trainer().advance(0.01)


def test_evaluation_takes_fewer_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_trainer().evaluate(make_trainer().rows)
    forward = EntityEmbeddingNetwork.forward

    def limited(self: EntityEmbeddingNetwork, embedded: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        if len(embedded) > 40:
            raise MemoryError
        return forward(self, embedded, numeric)

    monkeypatch.setattr(EntityEmbeddingNetwork, "forward", limited)
    trainer = make_trainer()
    trainer.evaluation_batch = 256
    with pytest.warns(RuntimeWarning, match="out of memory in a look at the rows with"):
        found = trainer.evaluate(trainer.rows)
    assert trainer.evaluation_batch == 32
    np.testing.assert_allclose(found, expected, rtol=0.3)  # batch norm is measured on fewer rows


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_fit_with_the_range_test_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 33, ERRORS[0])
    shop = np.random.default_rng(0).integers(0, 9, 600)
    model = EntityEmbeddingRegressor(["shop"], batch_size=64, random_state=0, max_epochs=4)
    model.fit(pa.table({"shop": shop}), np.sin(shop))
    assert np.mean((model.predict(pa.table({"shop": shop})) - np.sin(shop)) ** 2) < 0.2


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 3, RuntimeError("expected scalar type Float but found Double"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        make_trainer().advance(0.01)
    assert not ran_out(OutOfMemoryError("named already"))
    assert not ran_out(ValueError("other"))


def test_halves_down_to_a_floor() -> None:
    for rows, fewer in ((100, 50), (33, 17), (17, 16)):
        with pytest.warns(RuntimeWarning, match=f"test with {rows} rows at a time: going on with {fewer}"):
            assert halved(rows, "a test") == fewer
    with pytest.raises(OutOfMemoryError, match="in a test with 16 rows"):
        halved(memory.MIN_ROWS, "a test")


def test_a_training_that_turns_unstable_leaves_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has a name, and the estimator holds what was learned before."""
    advance, steps = Trainer.advance, []

    def spoiled(self: Trainer, lr: float) -> tuple:
        loss, hits = advance(self, lr)
        steps.append(lr)
        return (loss * torch.nan if len(steps) > 40 else loss), hits

    monkeypatch.setattr(Trainer, "advance", spoiled)
    monkeypatch.setattr("embedkit.learning.loop.warnings.warn", lambda *_, **__: None)
    shop = np.random.default_rng(0).integers(0, 9, 640)
    X, y = pa.table({"shop": shop}), np.sin(shop)
    model = EntityEmbeddingRegressor(["shop"], batch_size=64, random_state=0, max_epochs=9, max_lr=0.02)
    with pytest.raises(UnstableTrainingError, match="not finite in epoch 5, not even") as found:
        model.fit(X, y)
    assert found.value.history.best_epoch == 4
    assert [epoch["epoch"] for epoch in model.history_] == [1, 2, 3, 4]
    assert np.mean((model.predict(X) - y) ** 2) < 0.3
