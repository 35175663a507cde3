"""The lookup as a join gives the bits of the library's own, on real databases."""

import datetime
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from batch_data import features, make_rows, make_set
from click.testing import CliRunner

from embedkit.cli import main
from embedkit.crosses import Cross
from embedkit.errors import InputError, OutputError
from embedkit.serving.batch import transform_dataset
from embedkit.serving.export import export_tables
from embedkit.serving.sql import export_sql, join_query
from embedkit.tables import EmbeddingSet, EmbeddingTable, NumericColumn
from embedkit.vocabulary import Vocabulary

duckdb = pytest.importorskip("duckdb")


def table_of(feature: str, categories: pa.Array, dim: int = 2) -> EmbeddingTable:
    vectors = np.random.default_rng(len(feature)).normal(size=(len(categories) + 2, dim))
    return EmbeddingTable(Vocabulary(feature, categories, np.ones(len(categories) + 2, np.int64)), vectors)


def cross_of(features: tuple[str, str], n_first: int, n_second: int, n_outputs: int = 1) -> Cross:
    """Of every other combination, those with missing and unknown included."""
    pairs = np.argwhere((np.arange(n_first * n_second) % 2 == 0).reshape(n_first, n_second))
    effects = np.random.default_rng(n_first).normal(size=(len(pairs), n_outputs))
    return Cross(features, pairs, np.ones(len(pairs)), effects)


@pytest.fixture(scope="module")
def odd_set() -> EmbeddingSet:
    """Every type of category, awkward names and values, numbers at the limits."""
    utc = pa.timestamp("us", "UTC")
    times = [datetime.datetime(2020, 1, 1, 12, 30, 15, 250), datetime.datetime(2024, 2, 29)]
    return EmbeddingSet(
        [
            table_of('we"ird `name', pa.array(["", " ", "NULL", "a,b", 'q"q', "x\ny", "ß", "日本"]), 11),
            table_of("price", pa.array([-1.5, 0.0, 0.1, 1e300])),
            table_of("flag", pa.array([False, True])),
            table_of("day", pa.array([datetime.date(1969, 12, 31), datetime.date(2024, 2, 29)])),
            table_of("at", pa.array(times, pa.timestamp("us"))),
            table_of("zoned", pa.array(times, utc)),
            table_of("amount", pa.array([Decimal("1.10"), Decimal("2.20")], pa.decimal128(8, 2))),
            table_of("empty", pa.array([], pa.string())),
        ],
        [
            NumericColumn("plain", fill=None, center=0.1, scale=1 / 3),
            NumericColumn("huge", fill=-2.7, center=1e-3, scale=1e30, missing_scale=0.1),
        ],
        crosses=[cross_of(("price", 'we"ird `name'), 6, 10), cross_of(("flag", "day"), 4, 4, n_outputs=3)],
    )


@pytest.fixture(scope="module")
def odd_rows(odd_set: EmbeddingSet) -> pa.Table:
    """Rows with all categories of the odd set, unknown values, nulls and NaN."""
    size = 60
    rng = np.random.default_rng(5)
    unknown = {"price": 7.25, "day": datetime.date(2000, 1, 1), "amount": Decimal("9.99")}
    unknown |= dict.fromkeys(["at", "zoned"], datetime.datetime(1999, 1, 1))
    columns = {"id": pa.array(np.arange(size))}
    for feature, part in odd_set.items():
        values = [*part.categories.to_pylist(), None]
        values += [unknown.get(feature, "other")] if feature != "flag" else []
        columns[feature] = pa.array(
            [values[i] for i in rng.integers(0, len(values), size)], part.categories.type
        )
    columns["price"] = pa.array(
        np.where(np.arange(size) % 7, columns["price"].to_numpy(zero_copy_only=False), np.nan)
    )
    numbers = [1.0, -0.0, 0.1, 1e-40, np.pi, -1e200, None]
    for name in ("plain", "huge"):
        columns[name] = pa.array([numbers[i] for i in rng.integers(0, len(numbers), size)], pa.float64())
    return pa.table(columns)


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    gaps = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), gaps)
    np.testing.assert_array_equal(found.view(np.int32)[~gaps], expected.view(np.int32)[~gaps])


def join_duckdb(embedding_set: EmbeddingSet, rows: pa.Table, folder: Path) -> np.ndarray:
    export_sql(embedding_set, folder, dialect="duckdb", source="my rows", keep=["id"], location=str(folder))
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'America/New_York'")
        database.register("my rows", rows)
        database.execute((folder / "tables.sql").read_text())
        query = (folder / "join.sql").read_text().rstrip(";\n")
        found = database.sql(f"{query} ORDER BY s.id").to_arrow_table()
    assert found["id"].to_pylist() == rows["id"].to_pylist()
    return features(found, embedding_set)


def test_duckdb_gives_the_same_bits(tmp_path: Path) -> None:
    embedding_set, rows = make_set(), make_rows(5_000)
    same_bits(join_duckdb(embedding_set, rows, tmp_path), embedding_set.transform(rows))


def test_the_command_takes_all_that_the_join_needs(tmp_path: Path) -> None:
    make_set().save(tmp_path / "store")
    command = ["export", tmp_path / "store", "--format", "sql", "--out", tmp_path / "command"]
    options = ["--source", "my rows", "--keep", "id,day", "--location", "s3://bucket", "--dialect", "spark"]
    result = CliRunner().invoke(main, list(map(str, [*command, *options])))
    assert result.exit_code == 0, result.output
    given = {"source": "my rows", "keep": ["id", "day"], "location": "s3://bucket", "dialect": "spark"}
    expected = export_sql(make_set(), tmp_path / "library", **given)
    for path in expected:
        assert (tmp_path / "command" / path.name).read_bytes() == path.read_bytes()
    query = join_query(make_set(), dialect="spark", source="my schema.rows")
    assert query.splitlines().count("FROM `my schema`.`rows` AS s") == 1
    result = CliRunner().invoke(main, [*map(str, command[:2]), "--out", "x", "--source", "rows"])
    assert result.exit_code == 2
    assert "--source is for --format sql, got --format parquet" in result.output


def test_duckdb_gives_the_same_bits_for_odd_data(
    tmp_path: Path, odd_set: EmbeddingSet, odd_rows: pa.Table
) -> None:
    found = join_duckdb(odd_set, odd_rows, tmp_path)
    same_bits(found, odd_set.transform(odd_rows))
    numbers = found[:, -4:]
    assert (numbers != 0).any(axis=0).all()
    assert (numbers == 0).any(axis=0).all()


@pytest.fixture(scope="module")
def postgres() -> Iterator[list[str]]:
    """The psql command for a database cluster of its own on loopback, gone after the tests."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    programs = found[-1].parent if found else Path(shutil.which("initdb") or "initdb").parent
    if not (programs / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root; its package brings a user.
    run_as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="embedkit-postgres-"))
    try:
        if run_as:
            shutil.chown(folder, "postgres")
        data = str(folder / "data")
        quiet = {"check": True, "capture_output": True, "cwd": folder}
        command = [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "embedkit",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run([*run_as, *command, "--locale=C.UTF-8"], **quiet)
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        control = [*run_as, programs / "pg_ctl", "-D", data, "-w"]
        subprocess.run([*control, "-o", options, "-l", folder / "log", "start"], **quiet)
        try:
            psql = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", str(folder), "-U", "embedkit"]
            yield [*psql, "-d", "postgres"]
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder)


POSTGRES_TYPES = {
    pa.string(): "TEXT",
    pa.int64(): "BIGINT",
    pa.int32(): "INTEGER",
    pa.float64(): "DOUBLE PRECISION",
    pa.bool_(): "BOOLEAN",
    pa.date32(): "DATE",
    pa.timestamp("us"): "TIMESTAMP",
    pa.timestamp("us", "UTC"): "TIMESTAMPTZ",
    pa.decimal128(8, 2): "NUMERIC(8, 2)",
}


def join_postgres(embedding_set: EmbeddingSet, rows: pa.Table, folder: Path, psql: list[str]) -> np.ndarray:
    export_sql(embedding_set, folder, dialect="postgres", source="my rows", keep=["id"])
    options = pacsv.WriteOptions(quoting_style="all_valid")
    pacsv.write_csv(rows.select(["id", *embedding_set.features_in]), folder / "rows.csv", options)
    columns = ", ".join(
        '"{}" {}'.format(name.replace('"', '""'), POSTGRES_TYPES[rows.schema.field(name).type])
        for name in ["id", *embedding_set.features_in]
    )
    query = (folder / "join.sql").read_text().rstrip(";\n")
    (folder / "run.sql").write_text(
        'SET TIME ZONE "America/New_York";\nDROP TABLE IF EXISTS "my rows";\n'
        f'CREATE TABLE "my rows" ({columns});\n'
        "\\copy \"my rows\" FROM 'rows.csv' WITH (FORMAT csv, HEADER)\n\\i tables.sql\n"
        f"CREATE TEMP TABLE result AS {query} ORDER BY s.id;\n"
        "\\copy result TO 'result.csv' WITH (FORMAT csv, HEADER)\n"
    )
    run = subprocess.run([*psql, "-f", "run.sql"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    types = dict.fromkeys(embedding_set.feature_names_out, pa.float32())
    found = pacsv.read_csv(folder / "result.csv", convert_options=pacsv.ConvertOptions(column_types=types))
    assert found["id"].to_pylist() == rows["id"].to_pylist()
    return features(found, embedding_set)


@pytest.mark.postgres
def test_postgres_gives_the_same_bits(tmp_path: Path, postgres: list[str]) -> None:
    embedding_set, rows = make_set(), make_rows(5_000)
    same_bits(join_postgres(embedding_set, rows, tmp_path, postgres), embedding_set.transform(rows))


@pytest.mark.postgres
def test_postgres_gives_the_same_bits_for_odd_data(
    tmp_path: Path, odd_set: EmbeddingSet, odd_rows: pa.Table, postgres: list[str]
) -> None:
    same_bits(join_postgres(odd_set, odd_rows, tmp_path, postgres), odd_set.transform(odd_rows))


@pytest.mark.slow
@pytest.mark.postgres
def test_a_million_rows_are_the_same_everywhere(tmp_path: Path, postgres: list[str]) -> None:
    embedding_set, rows = make_set(), make_rows(1_000_000)
    expected = embedding_set.transform(rows)
    same_bits(embedding_set.transform(pl.from_arrow(rows)), expected)
    same_bits(embedding_set.transform(rows.to_pandas(types_mapper=pd.ArrowDtype)), expected)
    same_bits(join_duckdb(embedding_set, rows, tmp_path / "duckdb"), expected)
    same_bits(join_postgres(embedding_set, rows, tmp_path / "postgres", postgres), expected)
    pacsv.write_csv(rows, tmp_path / "rows.csv")
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=100_000)
    for engine in ("plain", "dask"):
        transform_dataset(
            embedding_set,
            tmp_path / "rows.parquet",
            tmp_path / engine,
            engine=engine,
            workers=2,
            unit_rows=300_000,
        )
        found = ds.dataset(tmp_path / engine).to_table()
        same_bits(features(found, embedding_set), expected)


def test_long_names_make_shorter_names_of_files(tmp_path: Path) -> None:
    table, names = make_set()["store"], ["店" * 40, "店" * 40 + "b", "店" * 10]
    tables = [
        EmbeddingTable(Vocabulary(name, table.categories, table.counts), table.vectors) for name in names
    ]
    paths = export_tables(EmbeddingSet(tables), tmp_path / "tables")
    assert [pq.read_table(path).schema.metadata[b"embedkit.feature"].decode() for path in paths] == names
    assert paths[2].name == f"{'%E5%BA%97' * 10}.parquet"
    paths = export_sql(EmbeddingSet(tables), tmp_path / "sql", dialect="duckdb")
    assert len(set(paths)) == 5
    assert all(path.name in (tmp_path / "sql" / "tables.sql").read_text() for path in paths[:3])


def test_names_that_a_database_would_change_are_refused() -> None:
    long = EmbeddingSet([table_of("x" * 62, pa.array(["a"]))])
    with pytest.raises(InputError, match=r"does not fit postgres, which takes 63 bytes: rename"):
        join_query(long, dialect="postgres")
    join_query(long, dialect="duckdb")
    twice = EmbeddingSet([table_of("a", pa.array(["a"])), table_of("A", pa.array(["a"]))])
    with pytest.raises(InputError, match=r"names \['A_0', 'A_1', 'a_0', 'a_1'\] are the same in duckdb"):
        join_query(twice, dialect="duckdb")
    join_query(twice, dialect="postgres")
    with pytest.raises(InputError, match=r"dialect must be one of .* got 'oracle'"):
        join_query(twice, dialect="oracle")


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (pa.array(["a\0b"]), "which PostgreSQL lacks"),
        (pa.array([datetime.time(1, 2)]), "is time64.*, which is not exported"),
        (pa.array([1], pa.timestamp("ns")), "finer than a microsecond"),
    ],
)
def test_values_that_a_database_cannot_hold_are_refused(
    tmp_path: Path, categories: pa.Array, message: str
) -> None:
    with pytest.raises(InputError, match=f"column 'c' .*{message}"):
        export_sql(EmbeddingSet([table_of("c", categories)]), tmp_path, dialect="postgres")


def test_an_unwritable_directory_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .*file"):
        export_sql(make_set(), tmp_path / "file", dialect="spark")
