"""Processes that learn together: what two make of their halves is what one makes of the whole."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedkit import EmbeddingSet
from embedkit.learning.gradients import LayerGradients
from embedkit.learning.group import SharedGradients
from embedkit.learning.learned import NetworkShape
from embedkit.learning.network import EntityEmbeddingNetwork
from embedkit.learning.prepare import choose_batch_size

SCRIPT = """
import sys
import pyarrow.parquet as pq
import torch
from embedkit import EntityEmbeddingClassifier, EntityEmbeddingRegressor

kind, data, out, batch_size, dropout, early, checkpoint = sys.argv[1:]
rows = pq.read_table(data)
X, y = rows.drop_columns(["y", "label"]), rows["y" if kind == "number" else "label"].to_pandas()
Model = EntityEmbeddingRegressor if kind == "number" else EntityEmbeddingClassifier
model = Model(
    ["shop"], hidden_layer_sizes=(16, 8), dropout=float(dropout), embedding_dropout=float(dropout),
    batch_size=int(batch_size), max_epochs=60 if float(dropout) else 3,  # the many have a range test
    max_lr="auto" if kind == "number" else 0.01, random_state=0, early_stopping=early == "1",
)
saving = {"checkpoint": checkpoint, "checkpoint_seconds": 0} if checkpoint else {}
model.fit(X, y, **saving)
# One write: the processes share a pipe, and print would write its pieces one by one.
sys.stdout.write(f"{model.save(out)} {model.max_lr_} {model.history_}\\n")
"""


def torchrun(processes: int, *command: object) -> str:
    """What the processes print."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *map(str, command)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """1,000 rows: what the target is follows from the shop."""
    rng = np.random.default_rng(0)
    shop, town = rng.integers(0, 20, 1_000), np.array(["Bonn", "Oslo"])[rng.integers(0, 2, 1_000)]
    y = np.sin(shop) + (town == "Oslo") + rng.normal(0, 0.1, 1_000)
    label = np.where(y > 0.5, "high", "low")
    rows = pa.table({"shop": shop, "town": town, "area": rng.normal(size=1_000), "y": y, "label": label})
    pq.write_table(rows, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.parametrize("kind", ["number", pytest.param("label", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does_with_batches_twice_as_large(
    kind: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = []
    for processes, batch_size in ((1, 64), (2, 32)):
        out = tmp_path / f"out{processes}"
        arguments = (tmp_path / "script.py", kind, data, out, batch_size, 0, 1, "")
        printed.append(torchrun(processes, *arguments).splitlines())
    assert len(printed[1]) == 2
    assert len(set(printed[1])) == 1, "both processes hold the same"
    sets = [EmbeddingSet.load(tmp_path / name) for name in ("out1", "out2")]
    assert not (tmp_path / "out2" / "v000002").exists(), "one of them writes"
    assert sets[0].metadata["best_epoch"] == sets[1].metadata["best_epoch"]
    for feature in ("shop", "town"):
        # The size of each axis and the distances, which are the network's own.
        first, second = (part[feature].vectors for part in sets)
        assert first.shape == second.shape
        np.testing.assert_allclose(second, first, atol=2e-3 * np.abs(first).max())


@pytest.mark.slow
def test_with_dropout_each_process_draws_its_own_and_all_stay_together(data: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    saved = tmp_path / "checkpoint"
    arguments = (tmp_path / "script.py", "number", data, tmp_path / "out", 32, 0.2, 1)
    whole = torchrun(2, *arguments, saved).splitlines()
    assert len(whole) == 2
    assert len(set(whole)) == 1
    assert (tmp_path / "out" / "v000001" / "report" / "lr_finder.parquet").exists()
    again = torchrun(2, *arguments, saved).splitlines()  # from the last step's checkpoint
    assert [line.partition(" ")[2] for line in again] == [line.partition(" ")[2] for line in whole]
    tables = [
        (tmp_path / "out" / version / "tables" / "shop.parquet").read_bytes()
        for version in os.listdir(tmp_path / "out")
        if version.startswith("v")
    ]
    assert len(tables) == 2
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_the_command_under_torchrun_writes_and_prints_once(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["fit", data, "--target", "y", "--drop", "label", "--out", out, "--max-epochs", 1]
    printed = torchrun(2, "-m", "embedkit", *command, "--max-lr", "0.01")
    assert printed.count("Stored in") == 1
    assert EmbeddingSet.load(out).metadata["estimator"] == "EntityEmbeddingRegressor"
    assert sorted(os.listdir(out)) == ["CURRENT", "v000001"]


def test_a_group_of_one_has_the_gradients_of_a_process_by_itself_in_either_precision() -> None:
    class Alone:
        size = 1

        def add(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    shape = NetworkShape((9, 4), (3, 2), 0, (20,), 1)
    embedded, numeric, slope = torch.randn(64, 5), torch.randn(64, 0), torch.randn(64, 1)
    network, found = EntityEmbeddingNetwork(shape), {}
    for precision in ("float32", "bfloat16"):
        for make in (LayerGradients, partial(SharedGradients, group=Alone())):
            layers = make(network, precision)
            layers.forward(embedded.clone(), numeric)
            layers.backward(slope)
            found.setdefault(precision, []).append(layers.gradient.clone())
        assert torch.equal(*found[precision])
    assert not torch.equal(found["float32"][0], found["bfloat16"][0])


@pytest.mark.parametrize(
    ("batch_size", "n_rows", "n_processes", "expected"),
    [(32, 1000, 1, 32), (32, 1000, 2, 64), (500, 900, 2, 900), (500, 901, 2, 900), (5, 3, 4, 4),
     ("auto", 128_000, 1, 512), ("auto", 128_000, 3, 510)],
)  # fmt: skip
def test_batches_have_a_share_for_every_process(
    batch_size: int | str, n_rows: int, n_processes: int, expected: int
) -> None:
    assert choose_batch_size(batch_size, n_rows, n_processes) == expected
