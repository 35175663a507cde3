"""Batch jobs: what comes out, where, under which names."""

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from batch_data import features, make_rows, make_set, reference, tree, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedkit import store
from embedkit.errors import InputError, OutputError
from embedkit.files import read_table
from embedkit.serving import engines
from embedkit.serving.batch import transform_dataset, verify_output
from embedkit.serving.output import JobFolder
from embedkit.tables import EmbeddingSet


@pytest.fixture(scope="module")
def embedding_set() -> EmbeddingSet:
    return make_set()


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return make_rows(2_000)


@pytest.fixture
def source(tmp_path: Path, rows: pa.Table) -> Path:
    return write_dataset(tmp_path / "in", rows)


def read(output: Path) -> pa.Table:
    return ds.dataset(output, partitioning=None).to_table()


def test_wide_output_is_the_lookup_and_keeps_the_input(
    tmp_path: Path, source: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    summary = transform_dataset(embedding_set, source, tmp_path / "out", unit_rows=200)
    found = read(tmp_path / "out")
    expected = [name for name in rows.column_names if name != "distance"]
    assert found.column_names == [*expected, *embedding_set.feature_names_out] == list(summary.columns)
    assert found.select(expected).equals(rows.select(expected))
    np.testing.assert_array_equal(features(found, embedding_set), reference(embedding_set, rows))
    np.testing.assert_array_equal(features(found, embedding_set), embedding_set.transform(rows))
    assert (summary.rows, summary.files, summary.units, summary.committed) == (2_000, 4, 12, True)
    states = rows["state"].to_pylist()
    assert summary.unknown["state"] == states.count("??")
    assert summary.missing["state"] == states.count(None)
    assert f"state: unknown {states.count('??') / 2_000:.2%}" in str(summary)
    assert verify_output(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_vector_layout_holds_one_list_per_feature(
    tmp_path: Path, source: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out", layout="vector", columns=["id"])
    found = read(tmp_path / "out")
    lists = [f"{feature}_embedding" for feature in embedding_set]
    assert found.column_names == ["id", *lists, "distance", "distance_missing"]
    assert found.schema.field("tail_embedding").type == pa.list_(pa.float32(), 3)
    flat = [np.stack(found[name].to_numpy(zero_copy_only=False)) for name in lists]
    flat += [found[name].to_numpy()[:, None] for name in ("distance", "distance_missing")]
    np.testing.assert_array_equal(np.hstack(flat), reference(embedding_set, rows))


def test_replace_leaves_out_what_was_looked_up(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out", replace=True)
    assert read(tmp_path / "out").column_names == ["id", "day", *embedding_set.feature_names_out]


def test_columns_that_would_come_twice_are_refused(tmp_path: Path, rows: pa.Table) -> None:
    embedding_set = make_set()
    source = write_dataset(tmp_path / "in", rows.append_column("store_0", rows["id"]))
    with pytest.raises(InputError, match=r"two columns of the name\(s\) \['store_0'\]"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    transform_dataset(embedding_set, source, tmp_path / "out", columns=["id"])


def test_directories_of_the_input_are_kept_and_their_keys_looked_up(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    source, rows = tmp_path / "in", rows.slice(0, 120)
    ds.write_dataset(
        rows, source, format="parquet", partitioning=["store", "day"], partitioning_flavor="hive"
    )
    transform_dataset(embedding_set, source, tmp_path / "out")
    kept = {path.parent.relative_to(source) for path in source.rglob("*.parquet")}
    assert kept == {
        path.parent.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.parquet")
    }
    found = ds.dataset(tmp_path / "out", partitioning="hive").to_table().sort_by("id")
    assert found["store"].to_pylist() == rows["store"].to_pylist()
    assert found["day"].to_pylist() == rows["day"].to_pylist()
    np.testing.assert_array_equal(features(found, embedding_set), reference(embedding_set, rows))
    assert "store" not in pq.read_schema(next((tmp_path / "out").rglob("*.parquet"))).names


@pytest.mark.parametrize("by", [["day"], ["state", "day"]])
def test_directories_can_be_chosen(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet, by: list[str]
) -> None:
    rows = rows.slice(0, 300)
    source = write_dataset(tmp_path / "in", rows, files=2)
    transform_dataset(embedding_set, source, tmp_path / "out", partition_by=by)
    found = ds.dataset(tmp_path / "out", partitioning="hive").to_table().sort_by("id")
    for name in ("id", *by):
        assert found[name].to_pylist() == rows[name].to_pylist()
    np.testing.assert_array_equal(features(found, embedding_set), reference(embedding_set, rows))
    assert verify_output(tmp_path / "out") == []


@pytest.mark.parametrize("partition_by", [None, []])
def test_without_rows_there_are_columns_still(
    tmp_path: Path, embedding_set: EmbeddingSet, partition_by: list[str] | None
) -> None:
    pq.write_table(make_rows(1).slice(0, 0), tmp_path / "in.parquet")
    transform_dataset(embedding_set, tmp_path / "in.parquet", tmp_path / "out", partition_by=partition_by)
    assert read(tmp_path / "out").schema.field("store_0").type == pa.float32()


def test_columns_of_later_files_are_not_left_out_in_silence(
    tmp_path: Path, source: Path, rows: pa.Table, embedding_set: EmbeddingSet
) -> None:
    pq.write_table(rows.append_column("extra", rows["id"]), source / "3.parquet")
    with pytest.warns(UserWarning, match=r"3.parquet has column\(s\) \['extra'\], which .*0.parquet lacks"):
        transform_dataset(embedding_set, source, tmp_path / "out")
    assert "extra" not in read(tmp_path / "out").column_names
    transform_dataset(embedding_set, source, tmp_path / "some", columns=["id"])


def test_directories_can_be_given_up(tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet) -> None:
    source, rows = tmp_path / "in", rows.slice(0, 120)
    ds.write_dataset(
        rows, source, format="parquet", partitioning=["store", "day"], partitioning_flavor="hive"
    )
    transform_dataset(embedding_set, source, tmp_path / "out", partition_by=())
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    found = read(tmp_path / "out").sort_by("id")
    assert found["day"].to_pylist() == rows["day"].to_pylist()
    assert found.schema.field("store").type == pa.int64()


@pytest.mark.parametrize("pattern", ["in/*.parquet", "in/[0-3].parquet", "**/?.parquet", "in"])
def test_patterns_and_directories_find_the_same_files(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, pattern: str
) -> None:
    (source / "_SUCCESS").touch()
    (source / "_skipped.parquet").touch()
    summary = transform_dataset(embedding_set, tmp_path / pattern, tmp_path / "out", dry_run=True)
    assert (summary.files, summary.rows, summary.committed) == (4, 2_000, False)
    assert "dry run: 2,000 rows in 4 file(s)" in str(summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_input_by_uri(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    transform_dataset(embedding_set, source, tmp_path / "a")
    transform_dataset(embedding_set, source.as_uri(), (tmp_path / "b").as_uri())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("compressed", [False, True])
def test_csv(tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet, compressed: bool) -> None:
    (tmp_path / "in").mkdir()
    rows = rows.set_column(3, "tail", rows["tail"].cast(pa.string()))
    pacsv.write_csv(rows, tmp_path / "in" / "a.csv")
    if compressed:
        data = (tmp_path / "in" / "a.csv").read_bytes()
        (tmp_path / "in" / "a.csv").unlink()
        (tmp_path / "in" / "a.csv.gz").write_bytes(gzip.compress(data))
    summary = transform_dataset(embedding_set, tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out")
    # A CSV file cannot tell an empty text from none: both are missing.
    expected = rows.set_column(3, "tail", pa.array([v or None for v in rows["tail"].to_pylist()]))
    np.testing.assert_array_equal(features(found, embedding_set), reference(embedding_set, expected))
    assert summary.rows == 2_000
    assert summary.unknown["tail"] == 0


@pytest.mark.parametrize("num_rows", [0, 1])
def test_tiny_inputs(tmp_path: Path, embedding_set: EmbeddingSet, num_rows: int) -> None:
    rows = make_rows(5).slice(0, num_rows)
    pq.write_table(rows, tmp_path / "in.parquet")
    summary = transform_dataset(embedding_set, tmp_path / "in.parquet", tmp_path / "out")
    found = read(tmp_path / "out")
    assert summary.rows == found.num_rows == num_rows
    assert found.column_names == list(summary.columns)
    np.testing.assert_array_equal(features(found, embedding_set), embedding_set.transform(rows))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    group=st.integers(1, 120),
    unit_rows=st.integers(60, 400),
    limit=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_no_way_of_cutting_changes_a_row(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    group: int,
    unit_rows: int,
    limit: int,
    seed: int,
) -> None:
    monkeypatch.setattr("embedkit.serving.units.ROW_GROUP_ROWS", limit)
    root, embedding_set = tmp_path_factory.mktemp("cut"), make_set(seed)
    rows = make_rows(sum(sizes), seed)
    (root / "in").mkdir()
    for i, size in enumerate(sizes):
        part = rows.slice(sum(sizes[:i]), size)
        pq.write_table(part, root / "in" / f"{i}.parquet", row_group_size=group)
    summary = transform_dataset(embedding_set, root / "in", root / "out", unit_rows=unit_rows)
    found = read(root / "out")
    assert found["id"].to_pylist() == list(range(sum(sizes)))
    assert summary.rows == sum(sizes)
    np.testing.assert_array_equal(features(found, embedding_set), embedding_set.transform(rows))
    for path in (root / "out").glob("*.parquet"):
        footer = pq.read_metadata(path)
        assert all(footer.row_group(i).num_rows <= limit for i in range(footer.num_row_groups))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_bytes_do_not_depend_on_threads_or_on_the_kind_of_store(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, compression: str
) -> None:
    for workers in (1, 3):
        transform_dataset(
            embedding_set,
            source,
            tmp_path / str(workers),
            workers=workers,
            unit_rows=100,
            compression=compression,
        )
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    embedding_set.save(tmp_path / "store")
    transform_dataset(tmp_path / "store", source, tmp_path / "s", unit_rows=100, compression=compression)
    manifest = json.loads((tmp_path / "s" / "_manifest.json").read_bytes())
    assert manifest["store_version"] == store.current_version(tmp_path / "store")
    differing = {k for k, v in tree(tmp_path / "s").items() if v != tree(tmp_path / "1")[k]}
    assert differing == {"_manifest.json"}


def test_other_libraries_read_the_directory(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    pd = pytest.importorskip("pandas")
    duckdb = pytest.importorskip("duckdb")
    out = tmp_path / "features.parquet"
    transform_dataset(embedding_set, source, out, unit_rows=100)
    expected = read(out)["store_0"].to_numpy()
    np.testing.assert_array_equal(pd.read_parquet(out)["store_0"].to_numpy(), expected)
    np.testing.assert_array_equal(pl.read_parquet(f"{out}/*.parquet")["store_0"].to_numpy(), expected)
    found = duckdb.sql(f"SELECT store_0 FROM '{out}/*.parquet' ORDER BY id").fetchnumpy()["store_0"]
    np.testing.assert_array_equal(found, expected)


def count_units(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Note the numbers of the units that are done; fail at one of them."""
    done: list[int] = []
    real = engines.transform_unit

    def counting(job: engines.Job, unit: engines.Unit, *rest: object) -> dict:
        if unit.index == fail_at:
            raise InputError("the test stops here")
        done.append(unit.index)
        return real(job, unit, *rest)

    monkeypatch.setattr(engines, "transform_unit", counting)
    return done


def interrupt(
    monkeypatch: pytest.MonkeyPatch, fail_at: int, *arguments: object, **settings: object
) -> list[int]:
    """Run a job that fails at a unit; return the numbers of those that were done."""
    with monkeypatch.context() as patch:
        done = count_units(patch, fail_at)
        with pytest.raises(InputError, match="stops here"):
            transform_dataset(*arguments, **settings)
    return done


def test_resume_does_what_is_missing_and_nothing_else(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"unit_rows": 100, "workers": 1}
    transform_dataset(embedding_set, source, tmp_path / "whole", **kwargs)
    first = interrupt(monkeypatch, 7, embedding_set, source, tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="not finished: resume it"):
        transform_dataset(embedding_set, source, tmp_path / "out", **kwargs)
    with pytest.raises(OutputError, match=r"was started with other \['layout', 'columns'\]"):
        transform_dataset(embedding_set, source, tmp_path / "out", resume=True, layout="vector", **kwargs)
    second = count_units(monkeypatch)
    summary = transform_dataset(embedding_set, source, tmp_path / "out", resume=True, **kwargs)
    assert set(first) >= set(range(7))
    assert sorted(first + second) == list(range(summary.units))
    assert summary.units_reused == len(first)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    again = transform_dataset(embedding_set, source, tmp_path / "out", resume=True, **kwargs)
    assert again.units_reused == again.units
    assert again.unknown == summary.unknown


def test_resume_notices_another_file_under_an_old_name(
    tmp_path: Path, source: Path, rows: pa.Table, embedding_set: EmbeddingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {"unit_rows": 500, "workers": 1}
    interrupt(monkeypatch, 3, embedding_set, source, tmp_path / "out", **kwargs)
    changed = rows.slice(500, 500).set_column(0, "id", pa.array(np.arange(500) + 7))
    pq.write_table(changed, source / "1.parquet", row_group_size=100)
    done = count_units(monkeypatch)
    transform_dataset(embedding_set, source, tmp_path / "out", resume=True, **kwargs)
    assert sorted(done) == [1, 3]
    assert read(tmp_path / "out")["id"].to_pylist()[500:510] == list(range(7, 17))
    assert verify_output(tmp_path / "out") == []


def test_resume_does_lost_parts_again(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3, embedding_set, source, tmp_path / "out", unit_rows=500, workers=1)
    folder = JobFolder(tmp_path / "out")
    with open(folder.data / "part-000001.parquet", "ab") as file:
        file.write(b"more")
    (folder.data / "part-000002.parquet").unlink()
    (folder.data / ".tmp-left-by-a-dead-worker").touch()
    done = count_units(monkeypatch)
    transform_dataset(embedding_set, source, tmp_path / "out", unit_rows=500, resume=True)
    assert sorted(done) == [1, 2, 3]
    assert verify_output(tmp_path / "out") == []


@pytest.mark.parametrize("harm", ["unlink", "cut"])
def test_a_finished_output_that_lost_a_part_is_not_taken_for_complete(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, harm: str
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out")
    part = tmp_path / "out" / "part-000001.parquet"
    whole = part.read_bytes()
    part.unlink()
    if harm == "cut":
        part.write_bytes(whole[:-1])
    with pytest.raises(OutputError, match=r"part-000001.parquet is gone or of another size; overwrite it"):
        transform_dataset(embedding_set, source, tmp_path / "out", resume=True)
    transform_dataset(embedding_set, source, tmp_path / "out", overwrite=True, resume=True)
    assert part.read_bytes() == whole


@pytest.mark.parametrize("finished", [True, False])
def test_resume_notices_cells_that_changed_places(
    tmp_path: Path, embedding_set: EmbeddingSet, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(100_000)
    stores = rows["store"].to_pylist()
    rows, changed = (
        rows.set_column(1, "store", pa.array([*stores[:500], *pair, *stores[502:]]))
        for pair in ((1, 2), (2, 1))
    )
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    options = {"row_group_size": 50_000, "compression": "none"}
    pq.write_table(rows, source, **options)
    before = source.stat().st_size, source.read_bytes()[-(1 << 16) :]
    settings = {"unit_rows": 50_000, "workers": 1}
    if finished:
        transform_dataset(embedding_set, source, output, **settings)
    else:
        interrupt(monkeypatch, 1, embedding_set, source, output, **settings)
    pq.write_table(changed, source, **options)
    assert before == (source.stat().st_size, source.read_bytes()[-(1 << 16) :])
    summary = transform_dataset(embedding_set, source, output, resume=True, overwrite=finished, **settings)
    assert summary.units_reused == 0
    expected = embedding_set.transform(changed)
    np.testing.assert_array_equal(read(output)["store_0"].to_numpy(), expected[:, 0])


def test_resume_looks_at_the_limit_of_unknown_values_too(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out")
    with pytest.raises(InputError, match="unknown"):
        transform_dataset(embedding_set, source, tmp_path / "out", resume=True, max_unknown=0.0)
    assert transform_dataset(embedding_set, source, tmp_path / "out", resume=True).units_reused > 0


def test_a_csv_file_of_the_same_size_with_another_cell_is_another_file(tmp_path: Path) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    lines = b"store\n" + b"5\n" * 100_000
    (tmp_path / "a.csv").write_bytes(lines)
    transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out")
    (tmp_path / "a.csv").write_bytes(lines.replace(b"5", b"6", 1))
    with pytest.raises(OutputError, match="out exists"):
        transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out", resume=True)


def test_bytes_that_are_text_are_looked_up_as_text(tmp_path: Path, embedding_set: EmbeddingSet) -> None:
    rows = make_rows(300)
    as_bytes = rows.set_column(2, "state", rows["state"].cast(pa.binary()))
    source = write_dataset(tmp_path / "in", as_bytes)
    transform_dataset(embedding_set, source, tmp_path / "out", columns=["id"])
    found = read(tmp_path / "out").drop_columns("id")
    np.testing.assert_array_equal(
        np.stack([c.to_numpy() for c in found], axis=1), embedding_set.transform(rows)
    )


@pytest.mark.parametrize("columns", [None, ["id"]])
@pytest.mark.parametrize("suffix", [".csv", ".CSV.GZ"])
def test_a_quote_that_is_not_closed_is_found_in_every_column(
    tmp_path: Path, columns: list[str] | None, suffix: str
) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    path, packed = tmp_path / f"in{suffix}", gzip.compress if suffix == ".CSV.GZ" else bytes
    path.write_bytes(packed(b'store,id,note\n5,1,6" pipe\n5,2,ok\n'))
    assert transform_dataset(embedding_set, path, tmp_path / "sound", columns=columns).rows == 2
    path.write_bytes(packed(b'store,id,note\n5,1,ok\n5,2,"bad\n5,3,ok\n'))
    with pytest.raises(InputError, match="ends inside a quoted cell"):
        transform_dataset(embedding_set, path, tmp_path / "out", columns=columns)


@pytest.mark.parametrize(
    ("lines", "stores"),
    [
        ("store\n5\n\n6\n\n", [5, None, 6, None]),
        ("\r\nstore\r\n\r\n5\r\n", [None, 5]),
        ('"store"\n\n5\n', [None, 5]),
        ("store,note\n5,a\n\n6,b\n\n", [5, 6]),
    ],
)
def test_an_empty_line_of_csv_is_a_missing_value_where_there_is_one_column(
    tmp_path: Path, lines: str, stores: list[int | None]
) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    (tmp_path / "a.csv").write_bytes(lines.encode())
    assert transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out").rows == len(stores)
    assert read(tmp_path / "out")["store"].to_pylist() == stores
    assert read_table(tmp_path / "a.csv")["store"].to_pylist() == stores


def test_ids_of_csv_do_not_fall_together(tmp_path: Path) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("store,zip,id,size\n5,107,3,1e19\n")
    wide = ["12345678901234567890", "12345678901234567891"]
    (tmp_path / "in" / "b.csv").write_text(f"store,zip,id,size\n6,007,{wide[0]},0\n,,,\n7,7,{wide[1]},0.5\n")
    transform_dataset(embedding_set, tmp_path / "in", tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["store"].to_pylist() == [5, 6, None, 7]
    assert found["zip"].to_pylist() == ["107", "007", None, "7"]
    assert found["id"].to_pylist() == ["3", wide[0], None, wide[1]]
    assert found["size"].to_pylist() == [1e19, 0, None, 0.5]
    whole = read_table(tmp_path / "in" / "b.csv")
    assert whole["zip"].to_pylist() == ["007", None, "7"]
    assert whole["id"].to_pylist() == [wide[0], None, wide[1]]


@pytest.mark.parametrize("rows", [1, 600_000])
def test_an_id_of_csv_that_is_not_of_the_type_that_was_learned(tmp_path: Path, rows: int) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    (tmp_path / "a.csv").write_text("note,store\n" + "x,5\n" * rows + "x,12345678901234567890\n")
    with pytest.raises(
        InputError, match=r"a\.csv.*column 'store'.*int64: invalid value '12345678901234567890'"
    ):
        transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out")


def test_cells_of_csv_may_hold_line_breaks(tmp_path: Path) -> None:
    embedding_set = make_set(numerics=False).subset(["store"])
    (tmp_path / "a.csv").write_text("store,note\n" + '5,"one\ntwo"\n' * 200_000)
    summary = transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out")
    assert summary.rows == 200_000
    assert set(read(tmp_path / "out")["note"].to_pylist()) == {"one\ntwo"}
    (tmp_path / "a.csv").write_text("store,note\n5,x\n" + '5,"x\n' + "5,x\n" * 1000)
    with pytest.raises(InputError, match=r"a\.csv ends inside a quoted cell"):
        transform_dataset(embedding_set, tmp_path / "a.csv", tmp_path / "out2")


def test_what_is_sent_with_every_unit_does_not_grow_with_the_dataset(
    tmp_path: Path, rows: pa.Table, embedding_set: EmbeddingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    real = engines.transform_unit

    def measuring(job: engines.Job, unit: engines.Unit, *rest: object) -> dict:
        sent.append(len(pickle.dumps((job, unit))))
        return real(job, unit, *rest)

    monkeypatch.setattr(engines, "transform_unit", measuring)
    for files in (1, 50):
        source = write_dataset(tmp_path / f"in-{files}", rows.slice(0, 50), files)
        transform_dataset(embedding_set, source, tmp_path / f"out-{files}")
    assert max(sent) - sent[0] < 50


def test_verify_output_finds_every_change(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    out = tmp_path / "out"
    transform_dataset(embedding_set, source, out)
    damaged, missing = out / "part-000001.parquet", out / "part-000002.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    (out / "stray").touch()
    problems = verify_output(out)
    assert [line.partition(" ")[0] for line in problems] == [str(damaged), str(missing), str(out / "stray")]
    (out / "_manifest.json").write_bytes((out / "_manifest.json").read_bytes().replace(b"wide", b"Wide"))
    with pytest.raises(InputError, match=r"no sound _manifest\.json"):
        verify_output(out)


def test_a_job_does_without_pandas(tmp_path: Path, source: Path, embedding_set: EmbeddingSet) -> None:
    embedding_set.save(tmp_path / "store")
    code = (
        "import sys\nfrom embedkit.serving.batch import transform_dataset\n"
        "transform_dataset(*sys.argv[1:], layout='vector', compression='zstd')\n"
        "print([name for name in ('pandas', 'torch', 'sklearn') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, tmp_path / "store", source, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.stdout == "[]\n", run.stderr


def test_progress_shows_rows(
    tmp_path: Path, source: Path, embedding_set: EmbeddingSet, capsys: pytest.CaptureFixture
) -> None:
    transform_dataset(embedding_set, source, tmp_path / "out", progress=True)
    assert "2.00k/2.00k" in capsys.readouterr().err
