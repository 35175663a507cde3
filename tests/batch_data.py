"""Data for the tests of batch jobs: a set made by hand, rows with gaps and unknown values, a reference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn
from embedkit.vocabulary import Vocabulary

STATES = ["BE", "BY", "Köln", "NW", "ZH, 'quoted'"]


def make_set(seed: int = 0, numerics: bool = True) -> EmbeddingSet:
    """Tables for store (integers), state, tail (strings) and promo (booleans), and the number distance."""
    rng = np.random.default_rng(seed)
    categories = {
        "store": pa.array(range(1, 41)),
        "state": pa.array(sorted(STATES)),
        "tail": pa.array([f"N{i:05d}" for i in range(3_000)]),
        "promo": pa.array([False, True]),
    }
    tables = []
    for dim, (feature, values) in enumerate(categories.items(), start=1):
        counts = np.ones(len(values) + 2, dtype=np.int64)
        vectors = rng.normal(size=(len(values) + 2, dim)).astype(np.float32)
        tables.append(EmbeddingTable(Vocabulary(feature, values, counts), vectors))
    distance = NumericColumn("distance", fill=3.5, center=100.25, scale=1 / 3, missing_scale=0.7)
    return EmbeddingSet(tables, [distance] if numerics else [])


def make_rows(rows: int, seed: int = 0) -> pa.Table:
    """Rows with an id, a tenth of the values missing and a tenth unknown."""
    rng = np.random.default_rng(seed)

    def draw(known: Sequence[object], unknown: object, dtype: pa.DataType) -> pa.Array:
        pool = [*known, unknown, None]
        share = [0.8 / len(known)] * len(known) + [0.1, 0.1]
        return pa.array([pool[i] for i in rng.choice(len(pool), rows, p=share)], dtype)

    return pa.table(
        {
            "id": pa.array(np.arange(rows)),
            "store": draw(range(1, 41), 999, pa.int32()),
            "state": draw(STATES, "??", pa.string()),
            "tail": draw([f"N{i:05d}" for i in range(0, 3_000, 17)], "", pa.string()),
            "promo": draw([False], True, pa.bool_()),
            "distance": draw(list(rng.normal(100, 30, 7)), 1e300, pa.float64()),
            "day": draw(["mon", "tue", "a/b=c"], "d d", pa.string()),
        }
    )


def write_dataset(root: Path, table: pa.Table, files: int = 4, row_group_rows: int = 100) -> Path:
    """Write a table as some Parquet files of small row groups."""
    root.mkdir(parents=True, exist_ok=True)
    size = -(-table.num_rows // files)
    for i in range(files):
        pq.write_table(table.slice(i * size, size), root / f"{i}.parquet", row_group_size=row_group_rows)
    return root


def reference(embedding_set: EmbeddingSet, table: pa.Table) -> np.ndarray:
    """What must come out, one value at a time; float32 of shape (n_rows, width)."""
    columns = []
    for feature, part in embedding_set.items():
        rows = {value: code for code, value in enumerate(part.categories.to_pylist(), start=2)}
        found = [0 if v is None else rows.get(v, 1) for v in table[feature].to_pylist()]
        columns.append(np.array([part.vectors[code] for code in found]).reshape(len(found), -1))
    for number in embedding_set.numerics:
        values = table[number.feature].to_pylist()
        limit = float(np.finfo(np.float32).max)
        scaled = [((number.fill if v is None else v) - number.center) * number.scale for v in values]
        columns.append(np.array([[min(max(v, -limit), limit)] for v in scaled], dtype=np.float32))
        columns.append(np.array([[number.missing_scale * (v is None)] for v in values], dtype=np.float32))
    return np.hstack(columns)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def features(table: pa.Table, embedding_set: EmbeddingSet) -> np.ndarray:
    """The feature columns of a wide table as an array of shape (n_rows, width)."""
    return np.column_stack([table[name].to_numpy() for name in embedding_set.feature_names_out])
