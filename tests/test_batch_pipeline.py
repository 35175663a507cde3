"""The nightly pipeline runs, extends what it has learned, and what it leaves behind is sound."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from embedkit import EmbeddingSet, store
from embedkit.serving.batch import verify_output

ROOT = Path(__file__).parent.parent


def write_flights(path: Path) -> None:
    """Four months of flights; half the aeroplanes of the third are new."""
    rng = np.random.default_rng(0)
    rows = 400
    month = np.repeat([1, 2, 3, 4], rows // 4)
    tail = rng.integers(0, 5, rows) + np.where(month >= 3, 3, 0)
    flights = pd.DataFrame({"year": 2013, "month": month, "day": rng.integers(1, 28, rows)})
    flights["hour"] = rng.integers(6, 9, rows)
    flights["carrier"] = rng.choice(["AA", "UA"], rows)
    flights["origin"] = rng.choice(["EWR", "JFK"], rows)
    flights["dest"] = rng.choice(["BOS", "LAX"], rows)
    flights["tailnum"] = [f"N{i}" for i in tail]
    flights["flight"] = rng.integers(1, 4, rows)
    flights["distance"] = rng.choice([187.0, 2475.0], rows)
    flights["sched_dep_time"] = flights["hour"] * 100
    flights["arr_delay"] = 10.0 * tail - 10
    flights.to_csv(path, index=False)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder and output of a run through the four months, two of them to learn from."""
    folder = tmp_path_factory.mktemp("nights")
    write_flights(folder / "flights.csv")
    command = [sys.executable, ROOT / "pipelines" / "batch_features.py", "--folder", folder / "out"]
    command += ["--data", folder / "flights.csv", "--first-months", "2", "--epochs", "1"]
    command += ["--max-unknown", "70%"]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "out", run.stdout.splitlines()


def test_batch_features(lived: tuple[Path, list[str]]) -> None:
    folder, lines = lived
    assert lines[0] == "v000001: learned from 2 months"
    assert lines[1].startswith("month=03: 100 rows with v000001, most unknown: tailnum ")
    assert lines[2] == "v000002: extended by what is new in month=03"
    assert lines[3:] == ["month=04: 100 rows with v000002, most unknown: hour 0.00%"]
    assert store.verify(folder / "flights.embedkit") == []
    for month, version in (("03", "v000001"), ("04", "v000002")):
        output = folder / "features" / f"month={month}"
        assert verify_output(output) == []
        rows = pd.read_parquet(folder / "rows" / f"month={month}")
        embedding_set = EmbeddingSet.load(folder / "flights.embedkit", version)
        found = ds.dataset(output).to_table().select(list(embedding_set.feature_names_out))
        np.testing.assert_array_equal(found.to_pandas().to_numpy(), embedding_set.transform(rows))


def test_what_was_learned_before_stays_as_it_is(lived: tuple[Path, list[str]]) -> None:
    old, new = (EmbeddingSet.load(lived[0] / "flights.embedkit", f"v00000{i}") for i in (1, 2))
    assert old["tailnum"].categories.to_pylist() == ["N0", "N1", "N2", "N3", "N4"]
    assert new["tailnum"].categories.to_pylist() == [f"N{i}" for i in range(8)]
    assert len({new["tailnum"].vector(f"N{i}").tobytes() for i in (5, 6, 7)}) == 3
    assert old.feature_names_out == new.feature_names_out
    for feature, table in old.items():
        kept = new[feature].vectors.take(new[feature].encode(table.categories), axis=0)
        np.testing.assert_array_equal(kept, table.vectors[2:])
        np.testing.assert_array_equal(new[feature].vectors[:2], table.vectors[:2])
