"""Stored sets: what goes in comes out."""

import datetime
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs

from embedkit import layout, store
from embedkit.errors import InputError, OutputError, StoreNotFoundError
from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn
from embedkit.vocabulary import Vocabulary

GOLDEN = Path(__file__).parent / "golden"
ATTACHMENTS = {"network.safetensors": bytes(range(256)), "report/history.parquet": b"PAR1 not really"}


def make_table(feature: str, column: pa.Array, dim: int = 2) -> EmbeddingTable:
    vocabulary = Vocabulary.fit(column, feature)
    vectors = np.arange(vocabulary.num_embeddings * dim, dtype=np.float32).reshape(-1, dim) / 3 - 1
    return EmbeddingTable(vocabulary, vectors)


def make_set() -> EmbeddingSet:
    """The set that `tests/golden` holds: never change it."""
    return EmbeddingSet(
        [
            make_table("city", pa.array(["Ulm", "Köln", None, "Bonn", "Ulm"]), 3),
            make_table("Store", pa.array([262, 3, 3, -1])),
            make_table("day/of week", pa.array([datetime.date(2024, 2, 29), None])),
            make_table("at", pa.array([datetime.datetime(2024, 2, 29, 12, 30)], pa.timestamp("us", "UTC"))),
            make_table("price", pa.array([0.5, -0.25])),
            make_table("exact", pa.array([Decimal("1.10"), Decimal("-2.00")])),
            make_table("flag", pa.array([True, False, None])),
            make_table("empty", pa.nulls(2)),
            EmbeddingTable(
                Vocabulary.fit(pa.array(["u", "v"]), "weighted", sample_weight=[0.5, 0.25]), np.eye(4)
            ),
        ],
        [NumericColumn("age", fill=40.5, center=30.0, scale=0.1, missing_scale=1.0), NumericColumn("income")],
        {"task": "multiclass", "classes": ["a", "b"], "seed": 0, "scores": {"logloss": 0.1}, "note": "Größe"},
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """A store of two versions."""
    store.publish(tmp_path / "a.embedkit", make_set().subset(["city"]))
    store.publish(tmp_path / "a.embedkit", make_set(), attachments=ATTACHMENTS)
    return tmp_path / "a.embedkit"


def all_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_golden_directory_of_format_1_stays_readable():
    root = GOLDEN / "v1"
    assert store.verify(root) == []
    assert store.versions(root) == ["v000001", "v000002"]
    assert store.load(root).equals(make_set())
    assert store.load(root, "v000001").equals(make_set().subset(["city"]))
    for name, data in ATTACHMENTS.items():
        assert store.read_attachment(root, name) == data


def make_ranked_set() -> EmbeddingSet:
    """The set that `tests/golden/v1-ranked` holds: never change it."""
    vocabulary = Vocabulary.fit(pa.array(["Ulm", "Bonn"]), "city")
    vectors = [[0.0, 0.5, 0.0], [0.25, -0.5, 2e-6], [1.0, 2.0, 4e-6], [-1.0, -2.0, 6e-6]]
    return EmbeddingSet(
        [EmbeddingTable(vocabulary, vectors, ranked=True), make_table("flag", pa.array([True]))]
    )


def test_golden_directory_with_ranks_stays_readable():
    root = GOLDEN / "v1-ranked"
    assert store.verify(root) == []
    assert store.load(root).equals(make_ranked_set())
    assert store.load(root)["city"].feature_names_out == ("city_0", "city_1", "city_rank")


def test_save_and_load(root, tmp_path):
    learned = EmbeddingSet.load(root)
    assert learned.equals(make_set())
    assert learned.save(tmp_path / "b") == "v000001"
    assert learned.save(str(tmp_path / "b"), {"x": b"1"}) == "v000002"
    assert store.read_attachment(tmp_path / "b", "x") == b"1"
    assert EmbeddingSet.load(tmp_path / "b").equals(learned)
    assert EmbeddingSet.load((tmp_path / "b").as_uri(), "v000001").equals(learned)


def test_versions_and_their_parents(root):
    assert store.versions(root) == ["v000001", "v000002"]
    assert store.current_version(root) == "v000002"
    assert list(store.load(root, "v000001")) == ["city"]
    parents = [
        json.loads((root / name / "manifest.json").read_bytes())["parent"] for name in store.versions(root)
    ]
    assert parents == [None, "v000001"]
    assert store.verify(root) == []


def test_the_same_content_gives_the_same_bytes(root, tmp_path):
    other = tmp_path / "elsewhere" / "b"
    store.publish(other, make_set().subset(["city"]))
    store.publish(other, store.load(root), attachments=ATTACHMENTS)
    assert all_files(other) == all_files(root)


def test_the_layout_on_disk(root):
    names = [name for name in all_files(root) if name.startswith("v000002")]
    tables = ["Store", "at", "city", "day%2Fof week", "empty", "exact", "flag", "price", "weighted"]
    assert names == [
        "v000002/manifest.json",
        "v000002/network.safetensors",
        "v000002/report/history.parquet",
        *(f"v000002/tables/{name}.parquet" for name in tables),
    ]


feature_names = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(
        ["..", ".", "", "a/b", "/", "A", "a", "AUX", "a%2Fb", "\0", "x" * 300, "x" * 299 + "y", "ä" * 90]
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(feature_names, min_size=1, max_size=6, unique=True), st.integers(0, 2**32))
def test_any_feature_name_is_a_safe_file_name(tmp_path, names, number):
    learned = EmbeddingSet([make_table(name, pa.array([name]), 1) for name in names])
    files, _ = layout.contents(learned, {})
    assert all(file.startswith("tables/") and file.count("/") == 1 and len(file) < 200 for file in files)
    assert len({file.lower() for file in files}) == len(names)
    root = tmp_path / str(number)
    version = store.publish(root, learned)
    assert store.load(root, version).equals(learned)
    assert store.verify(root) == []


def test_file_names_differ_in_more_than_case():
    files, _ = layout.contents(
        EmbeddingSet([make_table(name, pa.array(["x"])) for name in ("Day", "day", "DAY")]), {}
    )
    assert sorted(files) == [
        "tables/DAY-c45bc4a7dc2c7ac5.parquet",
        "tables/Day.parquet",
        "tables/day-944c27e5b97ab779.parquet",
    ]


@pytest.mark.parametrize(
    "dtype",
    [
        *(pa.timestamp(unit, tz) for unit in ("s", "ms", "us", "ns") for tz in (None, "UTC", "Europe/Paris")),
        *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.date32(), pa.date64()),
        *(pa.int8(), pa.uint32(), pa.float16(), pa.float32(), pa.decimal128(30, 2), pa.decimal256(40, 2)),
        *(pa.decimal32(5, 2), pa.decimal64(12, 2), pa.large_string(), pa.string_view()),
    ],
    ids=str,
)
def test_every_type_of_category_survives(tmp_path, dtype):
    # Whole days, which every type can hold.
    cells = pa.array(
        [0, 86_400_000, None, 172_800_000] if dtype == pa.date64() else [0, 1, None, 2], pa.int64()
    )
    if pa.types.is_decimal(dtype):
        column = cells.cast(pa.decimal128(21, 2)).cast(dtype)
    elif pa.types.is_string_view(dtype) or pa.types.is_large_string(dtype):
        column = cells.cast(pa.string()).cast(dtype)
    else:
        width = pa.int32() if dtype in (pa.time32("s"), pa.time32("ms"), pa.date32()) else pa.int64()
        column = cells.cast(width).cast(dtype)
    table = make_table("c", column)
    store.publish(tmp_path, EmbeddingSet([table]))
    loaded = store.load(tmp_path)["c"]
    assert loaded.equals(table)
    assert loaded.encode(column).tolist() == [2, 3, 0, 4]


def test_loading_imports_neither_torch_nor_sklearn_nor_pandas(root):
    code = f"""
import sys
from embedkit.tables import EmbeddingSet
import pyarrow as pa
learned = EmbeddingSet.load({str(root)!r})
frame = pa.table({{"city": learned["city"].categories[:2], "income": learned["price"].categories}})
assert learned.subset(["city", "income"]).transform(frame).shape == (2, 4)
heavy = {{"torch", "sklearn", "pandas", "narwhals", "matplotlib", "pyarrow.dataset"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there(root, tmp_path):
    for missing in (lambda: store.load(tmp_path / "none"), lambda: store.verify(tmp_path / "none")):
        with pytest.raises(StoreNotFoundError, match="none/CURRENT does not exist"):
            missing()
    for version in ("v000009", "latest", "../v000001"):
        with pytest.raises(StoreNotFoundError, match=version):
            store.load(root, version)
    with pytest.raises(StoreNotFoundError, match=r"no file 'x', it has \['network.safetensors', 'report/"):
        store.read_attachment(root, "x")
    assert store.versions(tmp_path / "none") == []


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "../x", "a/../x", "a//b", "tables/x", "crosses/x", "manifest.json", "./x"]
)
def test_attachments_stay_inside_their_version(tmp_path, name):
    with pytest.raises(
        InputError, match=r"must be a relative path outside tables/, crosses/ and manifest\.json"
    ):
        store.publish(tmp_path, make_set(), attachments={name: b""})
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=f"^cannot write to {root}: ") as caught:
            store.publish(root, make_set())
        assert "\n" not in str(caught.value)


def test_unknown_kind_of_uri():
    with pytest.raises(InputError, match="cannot open gopher://x/y: "):
        store.load("gopher://x/y")


def test_a_file_system_without_rename(tmp_path, monkeypatch):
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(store, "_resolve", lambda root: (remote, root.removeprefix("s3://")))
    learned = make_set()
    assert store.publish("s3://bucket/a", learned, attachments=ATTACHMENTS) == "v000001"
    assert store.publish("s3://bucket/a", learned) == "v000002"
    assert store.load("s3://bucket/a").equals(learned)
    assert store.read_attachment("s3://bucket/a", "report/history.parquet", "v000001") == b"PAR1 not really"
    assert store.verify("s3://bucket/a") == []
    (tmp_path / "bucket/a/v000001/tables/city.parquet").write_bytes(b"")
    assert len(store.verify("s3://bucket/a")) == 1
