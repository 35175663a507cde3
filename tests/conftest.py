"""What many tests share: one thread, a small table, and what was learned from it."""

import os
from pathlib import Path

# Results repeat bit for bit at a fixed number of threads only; torch reads this when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pytest

from embedkit import EntityEmbeddingRegressor


@pytest.fixture(scope="session")
def shops() -> pa.Table:
    """Sales of 6 shops in 3 towns, 240 rows; the town of every 20th row is missing."""
    random = np.random.RandomState(0)
    shop = random.randint(6, size=240)
    town = np.array(["Bonn", "Oslo", "Rome"], dtype=object)[shop // 2]
    town[::20] = None
    distance = random.uniform(1, 9, size=240).round(2)
    sales = 10.0 + 3 * shop - distance + random.normal(0, 0.1, size=240)
    return pa.table({"shop": shop, "town": town, "open": shop != 3, "distance": distance, "sales": sales})


@pytest.fixture(scope="session")
def regressor(shops: pa.Table) -> EntityEmbeddingRegressor:
    """Fitted to the sales of `shops`; its categories are shop, town and open."""
    estimator = EntityEmbeddingRegressor(["shop"], embedding_dim=2, max_lr=0.01, max_epochs=2, random_state=0)
    return estimator.fit(shops.drop_columns("sales"), shops["sales"].to_numpy())


@pytest.fixture(scope="session")
def stored(regressor: EntityEmbeddingRegressor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a stored set that holds `regressor`; not to be changed."""
    root = tmp_path_factory.mktemp("stored") / "shops.embedkit"
    regressor.save(root)
    return root
