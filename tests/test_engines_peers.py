"""Spark and Ray give the bits of the library's own lookup, each in an environment of its own.

EMBEDKIT_SPARK_PYTHON and EMBEDKIT_RAY_PYTHON name the Python of an environment with the packages of
``pipelines/requirements-spark.txt`` or ``pipelines/requirements-ray.txt``.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from batch_data import features, make_rows, make_set

ROOT = Path(__file__).parent.parent


def run(variable: str, script: str, *arguments: object) -> None:
    """Run a pipeline with the Python that an environment variable names."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python")
    python = os.environ[variable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": python}
    command = [python, ROOT / "pipelines" / script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3_000:]


@pytest.mark.spark
@pytest.mark.parametrize(
    ("variable", "script", "options"),
    [
        ("EMBEDKIT_SPARK_PYTHON", "spark_transform.py", []),
        ("EMBEDKIT_SPARK_PYTHON", "spark_transform.py", ["--join"]),
        ("EMBEDKIT_RAY_PYTHON", "ray_transform.py", []),
    ],
)
@pytest.mark.parametrize("num_rows", [5_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_peers_give_the_same_bits(
    tmp_path: Path, variable: str, script: str, options: list[str], num_rows: int
) -> None:
    # A number would come out twice in these recipes, as it is and scaled: the set has none.
    embedding_set, rows = make_set(numerics=False), make_rows(num_rows)
    embedding_set.save(tmp_path / "store")
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=100_000)
    run(variable, script, tmp_path / "store", tmp_path / "rows.parquet", tmp_path / "out", *options)
    found = (
        ds.dataset(tmp_path / "out", format="parquet", exclude_invalid_files=True).to_table().sort_by("id")
    )
    assert found["id"].to_pylist() == rows["id"].to_pylist()
    expected = embedding_set.transform(rows)
    np.testing.assert_array_equal(features(found, embedding_set).view(np.int32), expected.view(np.int32))
