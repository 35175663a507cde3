"""The same learning on a GPU."""

import numpy as np
import pandas as pd
import pytest
import torch

from embedkit import EntityEmbeddingClassifier, EntityEmbeddingRegressor
from embedkit.learning.prepare import choose_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SETTINGS = {"hidden_layer_sizes": (16,), "max_epochs": 8, "random_state": 0, "embedding_dim": 2}


@pytest.fixture
def sales():
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 6, 600)
    X = pd.DataFrame({"shop": shop.astype(str), "area": rng.normal(size=600)})
    X.loc[::13, "shop"] = None
    return X, shop + 0.1 * X["area"].to_numpy()


def test_auto_is_the_gpu():
    assert choose_device("auto").type == "cuda"


def test_a_gpu_learns_what_a_cpu_learns(sales):
    X, y = sales
    known = X["shop"].notna()
    for device in ("cuda", "cpu"):
        model = EntityEmbeddingRegressor(device=device, max_lr=0.02, **SETTINGS).fit(X, y)
        assert model.score(X[known], y[known]) > 0.9
        assert model.axes_["shop"]["reliability"][0] > 0.5


def test_all_of_it_runs_on_a_gpu(sales, tmp_path):
    X, y = sales
    state = torch.cuda.get_rng_state()
    model = EntityEmbeddingClassifier(device="cuda", early_stopping=True, **SETTINGS)
    labels = np.array(["low", "mid", "high"])[(y // 2).clip(0, 2).astype(int)]
    model.fit(X, labels, sample_weight=np.linspace(0.5, 1.5, 600))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    model.save(tmp_path / "set")
    again = EntityEmbeddingClassifier.load(tmp_path / "set")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
