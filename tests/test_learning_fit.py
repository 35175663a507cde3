"""Learning as a whole: rates, schedules, reserved rows, determinism."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from embedkit import EntityEmbeddingEncoder, EntityEmbeddingRegressor, InputError
from embedkit.learning import fit as learning
from embedkit.learning import prepare
from embedkit.learning.learned import Settings
from embedkit.learning.lr_finder import LRFinderResult

FAST = {"hidden_layer_sizes": (8,), "max_epochs": 3, "max_lr": 0.01, "random_state": 0}
# More than 300 steps, for which the rate is not known beforehand.
TESTED = {**FAST, "max_lr": "auto", "max_epochs": 140}


@pytest.fixture(scope="module")
def sales():
    rng = np.random.default_rng(0)
    shop, area = rng.integers(0, 6, 200), rng.normal(size=200)
    X = pd.DataFrame({"shop": shop.astype(str), "town": (shop // 2).astype(str), "area": area})
    X.loc[::11, "town"] = None
    return X, shop * 10.0 + area


def test_an_automatic_rate_is_the_suggestion(sales, monkeypatch):
    curve = np.ones(3)
    found = LRFinderResult(curve, curve, curve, None, {}, 0.0023, True, "because")
    monkeypatch.setattr(learning, "find_lr", lambda *_, **__: found)
    encoder = EntityEmbeddingEncoder(**TESTED).fit(*sales)
    assert encoder.max_lr_ == found.suggestion
    lrs = encoder._learned.history.lrs
    assert max(lrs) == pytest.approx(found.suggestion, rel=0.02)  # the peak is between two steps


def test_the_suggestion_for_a_fit_stays_within_bounds(sales):
    result = EntityEmbeddingEncoder(**FAST).find_lr(*sales, fallback=3.0)
    low, high = learning.AUTO_LR_BOUNDS
    assert low <= result.suggestion <= high


@pytest.mark.parametrize(("max_epochs", "low"), [(1, 1e-2), (4, 1 / 128), (400, 1e-3)])
def test_the_fewer_the_steps_the_larger_they_are(sales, max_epochs, low):
    # Batches of 32 rows: 64 steps an epoch.
    X, y = sales[0].sample(2_048, replace=True, random_state=0), np.arange(2_048.0)
    encoder = EntityEmbeddingEncoder(max_epochs=max_epochs, random_state=0)
    tiny = {"start_lr": 1e-8, "end_lr": 1e-6, "fallback": 1e-6}  # whatever it finds is below
    assert encoder.find_lr(X, y, **tiny).suggestion == pytest.approx(low)


@pytest.mark.parametrize(
    ("n_steps", "rate"), [(64, 1e-2), (256, 2 / 256), (799, learning.AUTO_LR_FALLBACK), (800, None)]
)
def test_a_short_training_needs_no_range_test(sales, n_steps, rate):
    X, y = sales[0].sample(32 * n_steps, replace=True, random_state=0), np.arange(32.0 * n_steps)
    encoder = EntityEmbeddingEncoder(max_epochs=1, batch_size=32, random_state=0).fit(X, y)
    assert len(encoder.learning_rates_) == n_steps
    assert (encoder.lr_finder_ is None) == (rate is not None)
    assert encoder.max_lr_ == (rate or encoder.lr_finder_.suggestion)


def test_the_finder_leaves_no_trace_in_the_training(sales):
    auto = EntityEmbeddingEncoder(**TESTED).fit(*sales)
    assert auto.max_lr_ == auto.lr_finder_.suggestion
    by_hand = EntityEmbeddingEncoder(**{**TESTED, "max_lr": auto.max_lr_}).fit(*sales)
    assert by_hand.lr_finder_ is None
    assert by_hand.history_ == auto.history_
    np.testing.assert_array_equal(by_hand.transform(sales[0]), auto.transform(sales[0]))


def test_find_lr_leaves_the_estimator_as_it_was(sales):
    fresh = EntityEmbeddingEncoder(**FAST)
    result = fresh.find_lr(*sales, start_lr=1e-5, end_lr=1.0, num_iter=30)
    assert (result.lrs[0], len(result.lrs) <= 30) == (pytest.approx(1e-5), True)
    assert vars(fresh) == vars(EntityEmbeddingEncoder(**FAST))
    fitted = EntityEmbeddingEncoder(**FAST).fit(*sales)
    before = dict(vars(fitted))
    fitted.find_lr(sales[0][["town"]], sales[1], num_iter=30)
    assert {name: id(value) for name, value in vars(fitted).items()} == {k: id(v) for k, v in before.items()}


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("one_cycle", {"pct_start": 0.5, "div_factor": 10.0}),
        ("triangular", {"step_size": 3}),
        ("triangular2", {}),
        ("exp_range", {"gamma": 0.9}),
        ("cosine_restarts", {"T_0": 6}),
        ("constant", {}),
    ],
)
def test_every_schedule_sets_the_rates_of_the_steps(sales, schedule, options):
    encoder = EntityEmbeddingEncoder(schedule=schedule, schedule_options=options, **FAST).fit(*sales)
    steps = 3 * 6  # epochs, batches of 32 of 200 rows
    rate = learning.make_schedule(schedule, max_lr=0.01, total_steps=steps, steps_per_epoch=6, **options)
    assert encoder._learned.history.lrs == [rate(step) for step in range(steps)]


def test_global_random_states_are_untouched(sales):
    torch.manual_seed(7)
    np.random.seed(7)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    encoder = EntityEmbeddingEncoder(**{**FAST, "max_lr": "auto"}).fit(*sales)
    encoder.find_lr(*sales, num_iter=20)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state[1])


def test_the_unknown_row_is_trained_and_counted(sales):
    trained = EntityEmbeddingRegressor(embedding_dim=2, unknown_fraction=0.1, **FAST).fit(*sales)
    table = trained.embeddings_["shop"]
    assert table.counts.tolist()[:2] == [0, 20]
    assert table.vectors[1].any()
    untrained = EntityEmbeddingRegressor(embedding_dim=2, unknown_fraction=0.0, **FAST).fit(*sales)
    table = untrained.embeddings_["shop"]
    assert table.counts.tolist()[:2] == [0, 0]
    np.testing.assert_allclose(table.vectors[1], 0, atol=1e-6)


def test_rare_values_train_the_unknown_row(sales):
    X, y = sales
    X = X.assign(shop=["rare" if i < 3 else shop for i, shop in enumerate(X["shop"])])
    encoder = EntityEmbeddingEncoder(min_frequency=5, unknown_fraction=0.0, embedding_dim=2, **FAST).fit(X, y)
    table = encoder.embeddings_["shop"]
    assert "rare" not in table.categories.to_pylist()
    assert table.counts[1] == 3
    assert table.vectors[1].any()


def test_a_missing_row_that_nothing_trained_is_the_mean_of_the_data(sales):
    encoder = EntityEmbeddingEncoder(embedding_dim=2, **FAST).fit(*sales)
    shop, town = encoder.embeddings_["shop"], encoder.embeddings_["town"]
    assert (shop.counts[0], town.counts[0]) == (0, 19)
    of_data = np.concatenate([[0, 0], shop.counts[2:]]) / 200
    np.testing.assert_allclose(shop.vectors[0], of_data @ shop.vectors, atol=1e-5)
    np.testing.assert_allclose(shop.vectors[0], 0, atol=1e-5)
    assert np.abs(town.vectors[0]).max() > 1e-3
    # The network's own table agrees with the published one.
    own = encoder._learned.weights["tables.0"]
    np.testing.assert_allclose(own[0], of_data @ own, atol=1e-5)


def test_early_stopping_reports_the_watched_rows(sales):
    encoder = EntityEmbeddingEncoder(
        early_stopping=True, n_iter_no_change=2, **{**FAST, "max_epochs": 30}
    ).fit(*sales)
    losses = [epoch["validation_loss"] for epoch in encoder.history_]
    assert encoder.best_iter_ == 1 + int(np.argmin(losses))
    assert encoder.n_iter_ == len(losses) == encoder.best_iter_ + 2 < 30


def test_batch_size_and_device():
    assert [prepare.choose_batch_size("auto", n) for n in (2, 128 * 32, 128 * 64, 10**7)] == [
        32,
        32,
        64,
        1024,
    ]
    assert prepare.choose_batch_size(7, 10**7) == 7
    assert prepare.choose_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="'abacus'"):
        prepare.choose_device("abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    assert prepare.choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match="torch finds no GPU"):
        prepare.choose_device("cuda")


PROGRAM = """
import numpy as np, pandas as pd
from embedkit import EntityEmbeddingClassifier
rng = np.random.default_rng(0)
X = pd.DataFrame({"k": rng.choice(list("abcdef"), 300), "m": rng.choice([1, 2, 3], 300)})
X["x"] = rng.normal(size=300)
model = EntityEmbeddingClassifier(["m"], random_state=5, max_epochs=100, early_stopping=True)
model.fit(X, np.where(X["k"] < "c", "low", "high")).save("set")
"""


def test_the_same_seed_stores_the_same_bytes_in_another_process(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.manual_seed(1)  # which must not matter
    exec(PROGRAM, {})
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path / "there", check=True)
    stored = []
    for root in (tmp_path / "here", tmp_path / "there"):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        stored.append({path.relative_to(root): path.read_bytes() for path in files})
    assert len(stored[0]) >= 7  # the range test among them
    assert stored[0] == stored[1]


def test_bfloat16_learns_the_same(sales):
    exact, rounded = (
        EntityEmbeddingRegressor(**FAST, precision=precision).fit(*sales)
        for precision in ("float32", "bfloat16")
    )
    assert not np.array_equal(exact.predict(sales[0]), rounded.predict(sales[0]))
    assert rounded.score(*sales) == pytest.approx(exact.score(*sales), abs=0.02)
    assert rounded.transform(sales[0]).dtype == np.float32
    with pytest.raises(InputError, match="precision must be one of float32, bfloat16, got 'float16'"):
        EntityEmbeddingRegressor(precision="float16").fit(*sales)


def test_the_precision_that_is_kept_is_that_of_the_prior(sales):
    learned = EntityEmbeddingEncoder(shrinkage=0.2, **FAST).fit(*sales)._learned
    cardinalities = [table.vocabulary.cardinality for table in learned.tables]
    found = [projection.precision for projection in learned.projections]
    assert found == pytest.approx([0.2 * cardinality for cardinality in cardinalities])


def test_parameters_have_one_default(sales):
    """Those of the estimators, and of `Settings`, which others may make."""
    chosen = EntityEmbeddingEncoder(random_state=7)._settings()
    assert chosen == Settings(seed=chosen.seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_predicts_what_its_parent_does():
    code = """
import os, sys
import numpy as np, pandas as pd
from embedkit import EntityEmbeddingRegressor
rng = np.random.default_rng(0)
X = pd.DataFrame({"shop": rng.integers(0, 50, 3000).astype(str)})
model = EntityEmbeddingRegressor(max_epochs=1, max_lr=0.01, random_state=0).fit(X, rng.normal(size=3000))
expected = model.predict(X)
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(model.predict(X), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
