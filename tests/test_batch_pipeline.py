"""The nightly pipeline runs, learns again when too much is unknown, and what it leaves behind is sound."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds

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


def test_batch_features(tmp_path: Path) -> None:
    write_flights(tmp_path / "flights.csv")
    command = [sys.executable, ROOT / "pipelines" / "batch_features.py", "--folder", tmp_path / "out"]
    command += ["--data", tmp_path / "flights.csv", "--first-months", "2", "--epochs", "1"]
    run = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "v000001: learned from 2 months"
    assert lines[1].startswith("month=03: 100 rows with v000001, most unknown: tailnum ")
    assert lines[2] == "v000002: learned again from 3 months"
    assert lines[3] == "month=04: 100 rows with v000002, most unknown: hour 0.00%"
    folder = tmp_path / "out"
    assert store.verify(folder / "flights.embedkit") == []
    for month, version in (("03", "v000001"), ("04", "v000002")):
        output = folder / "features" / f"month={month}"
        assert verify_output(output) == []
        rows = pd.read_parquet(folder / "rows" / f"month={month}")
        embedding_set = EmbeddingSet.load(folder / "flights.embedkit", version)
        found = ds.dataset(output).to_table().select(list(embedding_set.feature_names_out))
        np.testing.assert_array_equal(found.to_pandas().to_numpy(), embedding_set.transform(rows))
