"""What differs between two sets, by hand and after rotations."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import embedkit
from embedkit import EmbeddingSet, EmbeddingTable, InputError
from embedkit.cli import main
from embedkit.vocabulary import Vocabulary

COLUMNS = ["feature", "category", "change", "old_count", "new_count", "distance", "moved"]


def table(feature: str, categories: list, vectors: np.ndarray, counts: list[int]) -> EmbeddingTable:
    """A table whose rows for missing and unknown are zero and have no rows behind them."""
    vectors = np.concatenate([np.zeros((2, np.shape(vectors)[1])), vectors])
    return EmbeddingTable(Vocabulary(feature, pa.array(categories), np.array([0, 0, *counts])), vectors)


@pytest.fixture
def old() -> EmbeddingSet:
    """Four cities in a cross around zero; the spread of their vectors is 2."""
    cross = np.array([[2.0, 0], [-2, 0], [0, 2], [0, -2]])
    return EmbeddingSet([table("city", ["a", "b", "c", "d"], cross, [5, 5, 5, 5])])


def test_added_gone_and_moved_by_hand(old: EmbeddingSet) -> None:
    # All as before but a, which is 1 further out: the mean moves by 1/4 with it.
    vectors = np.array([[3.0, 0], [-2, 0], [0, 2], [0, -2], [7, 7]])
    new = EmbeddingSet([table("city", ["a", "b", "c", "d", "e"], vectors, [5, 5, 5, 5, 9])])
    found = embedkit.drift(old, new)
    assert list(found.columns) == COLUMNS
    assert found["category"].tolist()[:2] == ["e", "a"]
    assert found["change"].tolist() == ["added", "kept", "kept", "kept", "kept"]
    assert found["new_count"].tolist() == [9, 5, 5, 5, 5]
    assert np.isnan(found.loc[0, ["old_count", "distance", "moved"]].astype(float)).all()
    by_city = found.set_index("category")["distance"]
    np.testing.assert_allclose(by_city[["a", "b", "c", "d"]], [0.75, 0.25, 0.25, 0.25], atol=1e-6)
    np.testing.assert_allclose(found["moved"][1:], found["distance"][1:] / 2, rtol=1e-6)

    back = embedkit.drift(new, old)
    assert (back["category"][0], back["change"][0], back["old_count"][0]) == ("e", "gone", 9)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_rotations_mirrors_shifts_and_widths_are_no_drift(seed: int, mirror: bool) -> None:
    random = np.random.default_rng(seed)
    vectors, counts = random.normal(size=(12, 3)), random.integers(1, 50, size=12).tolist()
    rotation = np.linalg.qr(random.normal(size=(3, 3)))[0]
    rotation[:, 0] *= -1 if mirror else 1
    turned = vectors @ rotation + random.normal(size=3)
    turned = np.pad(turned, ((0, 0), (0, 2)))
    sets = [EmbeddingSet([table("x", list(range(12)), part, counts)]) for part in (vectors, turned)]
    assert embedkit.drift(*sets)["distance"].max() < 1e-5
    assert embedkit.drift(sets[1], sets[0])["distance"].max() < 1e-5


def test_no_distance_can_be_smaller_than_after_the_best_rotation(old: EmbeddingSet) -> None:
    random = np.random.default_rng(0)
    before = old["city"].vectors[2:].astype(float)
    after = before + random.normal(0, 0.5, size=before.shape)
    found = embedkit.drift(old, EmbeddingSet([table("city", ["a", "b", "c", "d"], after, [5] * 4)]))
    before, after = before - before.mean(axis=0), after - after.mean(axis=0)
    for angle in np.linspace(0, 2 * np.pi, 500):
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for candidate in (turn, turn * [1, -1]):
            squares = ((after @ candidate - before) ** 2).sum()
            assert (found["distance"] ** 2).sum() <= squares + 1e-6


def test_the_same_vectors_have_not_moved_at_all(old: EmbeddingSet) -> None:
    found = embedkit.drift(old, old)
    assert (found["distance"] == 0).all()
    assert (found["moved"] == 0).all()
    assert found["category"].tolist() == ["a", "b", "c", "d"]  # nothing trained the reserved rows


def test_without_counts_all_categories_count_the_same() -> None:
    vectors = np.array([[1.0, 0], [-1, 0]])
    before = EmbeddingSet([table("city", ["a", "b"], vectors, [0, 0])])
    after = EmbeddingSet([table("city", ["a", "b"], 2 * vectors, [0, 0])])
    assert embedkit.drift(before, after)["distance"].tolist() == [1.0, 1.0]


def test_features_that_only_one_set_has(old: EmbeddingSet) -> None:
    new = EmbeddingSet([table("shop", [7], np.ones((1, 1)), [3])])
    found = embedkit.drift(old, new)
    assert found["feature"].tolist() == ["city"] * 4 + ["shop"]
    assert found["change"].tolist() == ["gone"] * 4 + ["added"]
    assert found["category"].iloc[-1] == "7"


def test_another_type_of_categories_is_refused(old: EmbeddingSet) -> None:
    new = EmbeddingSet([table("city", [1, 2], np.ones((2, 2)), [3, 3])])
    with pytest.raises(InputError, match="column 'city' was string when learned, is int64 now"):
        embedkit.drift(old, new)


def test_versions_of_a_stored_set(old: EmbeddingSet, tmp_path: Path) -> None:
    root, out = tmp_path / "s.embedkit", tmp_path / "drift.parquet"
    old.save(root)
    vectors = old["city"].vectors[2:] * [[1], [1], [1], [2]]
    EmbeddingSet([table("city", ["a", "b", "c", "e"], vectors, [5, 5, 5, 5])]).save(root)
    expected = embedkit.drift(old, EmbeddingSet.load(root))
    pd.testing.assert_frame_equal(embedkit.drift(root, root, old_version="v000001"), expected)
    arguments = ["drift", root, root, "--old-version", "v000001", "--out", out]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "city: 1 added, 1 gone, 3 kept" in done.stdout
    pd.testing.assert_frame_equal(pq.read_table(out).to_pandas(), expected)
