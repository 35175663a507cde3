"""Trainings that are interrupted and go on: the same bits as without, from any moment, or a named refusal."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from embedkit import EmbeddingSet, EntityEmbeddingClassifier, EntityEmbeddingRegressor, InputError, cli
from embedkit.errors import OutputError, StoreError
from embedkit.learning import checkpoint as checkpoint_module
from embedkit.learning import numeric as numeric_module
from embedkit.learning import stored_rows
from embedkit.learning.checkpoint import FILE, Checkpoint, fingerprint_of
from embedkit.learning.prepare import prepare
from embedkit.learning.training import Trainer

SETTINGS = {"hidden_layer_sizes": (8,), "max_epochs": 4, "max_lr": 0.02, "random_state": 0, "batch_size": 32}


class Interrupted(BaseException):
    """Ends a training at once, as a signal does."""


def sales(n: int = 200) -> tuple[pa.Table, np.ndarray]:
    """Rows whose shop and town say something about the target."""
    rng = np.random.default_rng(0)
    shop, town = rng.integers(0, 30, n), np.array(["Bonn", "Oslo", "Rome"])[rng.integers(0, 3, n)]
    table = pa.table({"shop": shop, "town": town, "area": rng.normal(size=n)})
    return table, np.sin(shop) + (town == "Oslo") + rng.normal(0, 0.1, n)


def model(**settings: object) -> EntityEmbeddingRegressor:
    return EntityEmbeddingRegressor(["shop"], **(SETTINGS | settings))


def content(estimator: EntityEmbeddingRegressor) -> list[bytes]:
    """All that was learned, as bytes."""
    learned = estimator._learned
    parts = [*learned.weights.values(), *(table.vectors for table in learned.tables)]
    history = [learned.history.epochs, learned.history.lrs, learned.history.best_epoch, learned.max_lr]
    return [part.tobytes() for part in parts] + [repr(history).encode()]


@contextlib.contextmanager
def interruption(after: int) -> Iterator[None]:
    """The process ends after so many steps of training."""
    steps, advance = 0, Trainer.advance

    def counted(self: Trainer, lr: float) -> object:
        nonlocal steps
        steps += 1
        if steps > after:
            raise Interrupted
        return advance(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", counted)
        yield


@pytest.fixture(params=["in memory", "stream"])
def data(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple:
    X, y = sales()
    if request.param == "in memory":
        return X, y
    monkeypatch.setattr(numeric_module, "MAX_SORTED_ROWS", 10)
    monkeypatch.setattr(stored_rows, "BLOCK_ROWS", 32)
    monkeypatch.setattr(stored_rows, "MIN_BLOCKS", 2)
    monkeypatch.setattr(stored_rows, "BUFFER_BYTES", 1)
    pq.write_table(X.append_column("y", pa.array(y)), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet", "y"


@pytest.mark.parametrize("settings", [{}, {"early_stopping": True, "n_iter_no_change": 1, "max_epochs": 9}])
def test_a_training_goes_on_bit_for_bit(data: tuple, settings: dict, tmp_path: Path) -> None:
    expected = content(model(**settings).fit(*data))
    for after in (1, 4, 5, 11, 17):
        folder = tmp_path / str(after)
        with interruption(after), contextlib.suppress(Interrupted):
            model(**settings).fit(*data, checkpoint=folder, checkpoint_seconds=0)
        assert os.listdir(folder) == [FILE]
        with interruption(after=100):
            found = model(**settings).fit(*data, checkpoint=folder, checkpoint_seconds=0)
        assert content(found) == expected, after


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    with interruption(after=17), contextlib.suppress(Interrupted):
        model().fit(*sales(), checkpoint=tmp_path, checkpoint_seconds=0)
    with interruption(after=7):  # of 24 steps
        model().fit(*sales(), checkpoint=tmp_path)


def test_several_interruptions_with_the_range_test(tmp_path: Path) -> None:
    X, y = sales()
    labels = np.where(y > 0.5, "high", "low")

    def fit(**saving: object) -> EntityEmbeddingClassifier:
        return EntityEmbeddingClassifier(["shop"], **SETTINGS | {"max_lr": "auto", "max_epochs": 140}).fit(
            X, labels, **saving
        )

    expected = fit()
    finder = len(expected.lr_finder_.lrs)
    for _ in range(3):
        with interruption(after=finder + 6), contextlib.suppress(Interrupted):
            fit(checkpoint=tmp_path, checkpoint_seconds=0)
    found = fit(checkpoint=tmp_path)
    assert content(found) == content(expected)
    np.testing.assert_array_equal(found.lr_finder_.losses, expected.lr_finder_.losses)


def test_an_unstable_epoch_is_taken_back_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def spoiled(self: Trainer, lr: float) -> tuple:
        loss, hits = advance(self, lr)
        return (loss * torch.nan if lr > 0.01 else loss), hits

    monkeypatch.setattr(Trainer, "advance", spoiled)
    monkeypatch.setattr("embedkit.learning.loop.warnings.warn", lambda *_, **__: None)
    expected = content(model().fit(*sales()))
    for after in (8, 10, 14):  # before, within and after the epoch is repeated
        with interruption(after), contextlib.suppress(Interrupted):
            model().fit(*sales(), checkpoint=tmp_path / str(after), checkpoint_seconds=0)
        assert content(model().fit(*sales(), checkpoint=tmp_path / str(after))) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"dropout": 0.3}, "dropout"), ({"random_state": 1}, "seed"), ({"embedding_dim": 3}, "embedding_dim")],
)
def test_the_checkpoint_of_other_settings_is_refused(settings: dict, named: str, tmp_path: Path) -> None:
    with interruption(after=3), contextlib.suppress(Interrupted):
        model().fit(*sales(), checkpoint=tmp_path, checkpoint_seconds=0)
    with pytest.raises(InputError, match=rf"is of another training, .*\b{named}\b.* differ.*remove"):
        model(**settings).fit(*sales(), checkpoint=tmp_path)


def test_the_same_settings_as_numbers_of_numpy_are_the_same(tmp_path: Path) -> None:
    own = {"max_epochs": 4, "hidden_layer_sizes": (4, 4), "min_frequency": 2, "ranks": True, "dropout": 0.5}
    numpys = {
        "max_epochs": np.int64(4),
        "hidden_layer_sizes": np.array([4, 4]),
        "min_frequency": np.int32(2),
        "ranks": np.True_,
        "dropout": np.float32(0.5),
    }
    with interruption(after=3), contextlib.suppress(Interrupted):
        model(**own).fit(*sales(), checkpoint=tmp_path, checkpoint_seconds=0)
    found = model(**numpys).fit(*sales(), checkpoint=tmp_path)
    assert content(found) == content(model(**own).fit(*sales()))


def test_the_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    X, y = sales()
    with interruption(after=3), contextlib.suppress(Interrupted):
        model().fit(X, y, checkpoint=tmp_path, checkpoint_seconds=0)
    renamed = X.set_column(1, "town", pa.array([f"{town}!" for town in X["town"].to_pylist()]))
    for other in ((X, np.append(y[:-1], 0.0)), (renamed, y)):
        with pytest.raises(InputError, match="is of another training, data differ"):
            model().fit(*other, checkpoint=tmp_path)
    model(verbose=1).fit(X, y, checkpoint=tmp_path)  # a progress bar changes nothing


def test_a_damaged_checkpoint_has_a_name(tmp_path: Path) -> None:
    with interruption(after=3), contextlib.suppress(Interrupted):
        model().fit(*sales(), checkpoint=tmp_path, checkpoint_seconds=0)
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"x" * 1000):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(StoreError, match=r"training.safetensors is damaged .*remove it"):
            model().fit(*sales(), checkpoint=tmp_path)


def test_where_no_checkpoint_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write a checkpoint to .*file"):
        model().fit(*sales(), checkpoint=tmp_path / "file")
    with pytest.raises(InputError, match="needs a random_state that is a number, got None"):
        model(random_state=None).fit(*sales(), checkpoint=tmp_path)
    for seconds in (-1, "soon"):
        with pytest.raises(InputError, match="checkpoint_seconds must be"):
            model().fit(*sales(), checkpoint=tmp_path, checkpoint_seconds=seconds)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(3, dtype=torch.int64),
        "b": [torch.tensor(1.5, dtype=torch.float64), None, True, 3, 0.1, float("inf"), "text"],
        "c": {0: {"step": torch.tensor(2.0)}, "betas": (0.9, 0.99)},
        "empty": torch.empty(0, 4),
    }
    saved = Checkpoint(tmp_path / "new", {})
    assert saved.read() is None
    saved.write(state)
    found = Checkpoint(tmp_path / "new", {}).read()
    assert found["c"].pop("betas") == (0.9, 0.99)
    assert found["c"][0]["step"] == 2
    assert torch.equal(found["a"], state["a"])
    assert found["b"][0].dtype == torch.float64
    assert found["b"] == state["b"]
    assert found["empty"].shape == (0, 4)
    with pytest.raises(TypeError, match="cannot hold object"):
        saved.write({"a": object()})
    checkpoint_module.remove(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_long_writes_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now)
    saved = Checkpoint(tmp_path, {}, seconds=60)
    assert not saved.due()
    now = 60.0
    assert saved.due()
    saved.took, saved.written = 6.0, now
    now = 179.0
    assert not saved.due(), "at most a twentieth of the time goes into writing"
    now = 180.0
    assert saved.due()


def fit_command(data: Path, out: Path, *more: str) -> list[str]:
    command = ["fit", str(data), "--target", "y", "--categorical", "shop", "--out", str(out), "-q"]
    return [*command, "--max-epochs", "4", "--max-lr", "0.02", "--batch-size", "32", *more]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    X, y = sales()
    pq.write_table(X.append_column("y", pa.array(y)), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def published(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_command_resumes(rows_file: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(cli.main, fit_command(rows_file, tmp_path / "whole")).exit_code == 0
    out, often = tmp_path / "out", ("--checkpoint-seconds", "0")
    with interruption(after=13), contextlib.suppress(Interrupted):
        run(cli.main, fit_command(rows_file, out, *often), catch_exceptions=False)
    assert (tmp_path / "out.checkpoint" / FILE).exists()
    assert not out.exists()
    with interruption(after=11):
        assert run(cli.main, fit_command(rows_file, out, "--resume", *often)).exit_code == 0
    assert published(out) == published(tmp_path / "whole")
    assert not (tmp_path / "out.checkpoint").exists()


def test_without_resume_a_training_starts_anew(rows_file: Path, tmp_path: Path) -> None:
    run, keep = CliRunner().invoke, ("--checkpoint", str(tmp_path / "c"), "--checkpoint-seconds", "0")
    with interruption(after=13), contextlib.suppress(Interrupted):
        run(cli.main, fit_command(rows_file, tmp_path / "out", *keep), catch_exceptions=False)
    other = fit_command(rows_file, tmp_path / "out", *keep, "--seed", "5")
    refused = run(cli.main, [*other, "--resume"])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: the checkpoint in ")
    assert refused.stderr.count("\n") == 1
    assert run(cli.main, other).exit_code == 0
    assert run(cli.main, [*other, "--resume"]).exit_code == 0, "nothing to resume: from the beginning"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [(signal.SIGKILL, 20), (signal.SIGINT, 3)])
def test_killed_at_random_moments_and_resumed(kind: signal.Signals, times: int, tmp_path: Path) -> None:
    """After each kill the published files are the same, byte for byte."""
    X, y = sales(2_000)
    pq.write_table(X.append_column("y", pa.array(y)), tmp_path / "rows.parquet")
    start = [sys.executable, "-m", "embedkit"]

    def begin(out: Path, *more: str) -> subprocess.Popen:
        """A training that has written its first checkpoint."""
        options = ("--max-epochs", "30", "--checkpoint-seconds", "0.05", *more)
        process = subprocess.Popen(
            start + fit_command(tmp_path / "rows.parquet", out, *options), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (tmp_path / f"{out.name}.checkpoint" / FILE).exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        return process

    process = begin(tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - began
    expected, moments = published(tmp_path / "whole"), np.random.default_rng(0)
    kills = 0
    while kills < times:
        process = begin(out := tmp_path / f"out{kills}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.9) * duration)
        process.send_signal(kind)
        process.wait()
        # A kill that met the publishing leaves what it had written by then beside the versions.
        learning, publishing = not out.exists(), out.exists() and not (out / "CURRENT").exists()
        if learning or publishing:
            kills += learning
            assert begin(out, "--resume").wait() == 0
        if publishing:
            assert EmbeddingSet.load(out).equals(EmbeddingSet.load(tmp_path / "whole"))
        else:
            assert published(out) == expected
        shutil.rmtree(out)


def test_another_number_of_processes_is_another_training() -> None:
    """With "auto", or so many rows a process, the settings are the same and the batches are not."""
    X, y = sales()
    settings = EntityEmbeddingRegressor(batch_size=32, random_state=0)
    preparation = prepare(settings._task(X, y, None))
    one = fingerprint_of(preparation, settings._settings())
    preparation.trainer.batch_size *= 2
    assert fingerprint_of(preparation, settings._settings()) != one
