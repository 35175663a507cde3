"""Bad input: one line that names the column, what was found and what to do. And input that only looks bad."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from embedkit import (
    EmbeddingSet,
    EmbedkitError,
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    OutputError,
    PretrainedEmbeddingEncoder,
    StoreError,
    cli,
    files,
    places,
    store,
)

FAST = {"max_lr": 0.01, "max_epochs": 1, "random_state": 0}


def frame(shops: pa.Table) -> tuple[pd.DataFrame, pd.Series]:
    rows = shops.to_pandas()
    return rows.drop(columns="sales"), rows["sales"]


def message(kind: type[EmbedkitError], function: Callable, *arguments: Any, **options: Any) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def encoder(**parameters: Any) -> EntityEmbeddingEncoder:
    return EntityEmbeddingEncoder(**FAST, **parameters)


def fit_file(table: pa.Table, folder: Path, *options: str, suffix: str = ".parquet") -> str:
    """The one line that `embedkit fit` prints about a file that holds the table; nothing is left behind."""
    path, out = folder / f"rows{suffix}", folder / "s.embedkit"
    if suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    result = CliRunner().invoke(
        cli.main, ["fit", str(path), "--out", str(out), "--max-epochs", "1", *options]
    )
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert list(folder.iterdir()) == [path]
    return result.stderr


def test_no_categorical_column(shops: pa.Table, tmp_path: Path) -> None:
    rows = shops.select(["shop", "distance", "sales"])
    cure = (
        "no categorical column among ['shop', 'distance']: name integer ids and dates in categorical_features"
    )
    found = message(
        InputError, encoder().fit, rows.drop_columns("sales").to_pandas(), rows["sales"].to_numpy()
    )
    assert found == cure
    assert cure in fit_file(rows, tmp_path, "--target", "sales")


def test_target_missing_in_the_file(shops: pa.Table, tmp_path: Path) -> None:
    line = fit_file(shops, tmp_path, "--target", "Sales")
    assert (
        "rows.parquet has no column 'Sales' (did you mean 'sales'?), which target names: it has shop," in line
    )


@pytest.mark.parametrize("option", ["--drop", "--columns", "--weight"])
def test_any_other_column_missing_in_the_file(option: str, shops: pa.Table, tmp_path: Path) -> None:
    line = fit_file(shops, tmp_path, "--target", "sales", option, "twon", suffix=".csv")
    assert f"has no column 'twon' (did you mean 'town'?), which {option[2:]} names" in line


def test_a_category_missing_in_the_data(shops: pa.Table, tmp_path: Path) -> None:
    expected = "categorical_features names ['shp'], which the data does not have (did you mean 'shop'?)"
    assert message(InputError, encoder(categorical_features=["shp"]).fit, *frame(shops)) == expected
    line = fit_file(shops, tmp_path, "--target", "sales", "--categorical", "shp")
    assert "has no column 'shp' (did you mean 'shop'?), which categorical names" in line


def test_files_of_a_directory_may_differ_in_their_columns(shops: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pq.write_table(shops, tmp_path / "rows" / "a.parquet")
    pq.write_table(shops.append_column("extra", shops["distance"]), tmp_path / "rows" / "b.parquet")
    (tmp_path / "rows" / "_notes.txt").write_text("not rows")
    said = r"a\.parquet lacks column\(s\) \['extra'\] that other files have: its rows count as missing there"
    with pytest.warns(UserWarning, match=said):
        read = files.read_training(tmp_path / "rows", ["sales"])
    with pytest.warns(UserWarning, match=said):
        streamed = files.open_training(str(tmp_path / "rows"), ["sales"], stream=True)
    assert read.X.column_names == ["shop", "town", "open", "distance", "extra"]
    assert set(streamed.X.schema.names) == {*read.X.column_names, "sales"}
    assert read.X["extra"].null_count == 240


def test_missing_keys_of_directories_are_read(shops: pa.Table, tmp_path: Path) -> None:
    ds.write_dataset(
        shops, tmp_path / "rows", format="parquet", partitioning=["town"], partitioning_flavor="hive"
    )
    read = files.read_training(tmp_path / "rows", ["sales"])
    assert read.X["town"].null_count == shops["town"].null_count == 12
    assert sorted(read.X["shop"].to_pylist()) == sorted(shops["shop"].to_pylist())


def test_the_index_column_of_a_csv_file_is_not_learned_from(shops: pa.Table, tmp_path: Path) -> None:
    shops.to_pandas().to_csv(tmp_path / "rows.csv")
    read = files.read_training(tmp_path / "rows.csv", ["sales"])
    assert read.X.column_names == ["shop", "town", "open", "distance"]


def test_a_directory_of_csv_files(shops: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    pacsv.write_csv(shops, tmp_path / "rows" / "a.csv")
    with pytest.raises(InputError, match=r"is no Parquet: convert it; or give embedkit fit one \.csv file"):
        files.open_training(str(tmp_path / "rows"), ["sales"])


def test_ids_of_csv_that_numbers_would_change_are_categories(tmp_path: Path) -> None:
    lines = [f"{i % 5:03},{12345678901234567890 + i % 7},{i}.5\n" for i in range(70)]
    (tmp_path / "rows.csv").write_text("zip,id,sales\n" + "".join(lines))
    rows = files.open_training(str(tmp_path / "rows.csv"), ["sales"])
    model = rows.estimator(**FAST).fit(rows.X, rows.y)
    assert model.embeddings_["zip"].categories.to_pylist() == ["000", "001", "002", "003", "004"]
    assert model.embeddings_["id"].vocabulary.cardinality == 7


def test_cells_of_csv_may_hold_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("town,sales\n" + '"Bad\nHomburg",1.5\n' * 100_000)
    read = files.read_training(tmp_path / "rows.csv", ["sales"])
    assert set(read.X["town"].to_pylist()) == {"Bad\nHomburg"}
    (tmp_path / "open.csv").write_text("sales,town\n1.5,a\n" + '1.5,"a\n' + "1.5,a\n" * 100)
    with pytest.raises(InputError, match=r"open\.csv ends inside a quoted cell: look for a quote"):
        files.read_training(tmp_path / "open.csv", ["sales"])


def test_columns_that_are_left_out_are_not_looked_at(shops: pa.Table, tmp_path: Path) -> None:
    rows = shops.append_column("bytes", pa.array([b"\xff\x00"] * 240))
    pq.write_table(rows, tmp_path / "rows.parquet")
    read = files.read_training(tmp_path / "rows.parquet", ["sales"], drop=["bytes"])
    assert read.X.column_names == ["shop", "town", "open", "distance"]


@pytest.mark.parametrize("value", [7.5, 1, True, "yes"])
def test_target_all_one_value(value: Any, shops: pa.Table, tmp_path: Path) -> None:
    X, _ = frame(shops)
    y = pd.Series([value] * 240, name="late")
    found = message(InputError, encoder().fit, X, y)
    assert f"target 'late' holds one class or value only ({value!r} " in found
    assert "in all 240 row(s)): at least 2 classes or values are needed to learn from" in found
    rows = shops.drop_columns("sales").append_column("late", pa.array([value] * 240))
    assert "target 'late' holds one class or value only" in fit_file(rows, tmp_path, "--target", "late")


@pytest.mark.parametrize("y", [[1.5, np.nan, 2.5], ["a", None, "b"], [True, None, False]])
def test_nan_target(y: list, shops: pa.Table, tmp_path: Path) -> None:
    X, _ = frame(shops)
    target = pd.Series(y * 80, name="late")
    found = message(InputError, encoder().fit, X, target)
    assert found.startswith("target 'late' is missing in 80 row(s), the first is row 1: ")
    assert found.endswith("drop these rows")
    rows = shops.drop_columns("sales").append_column("late", pa.array(y * 80, from_pandas=True))
    line = fit_file(rows, tmp_path, "--target", "late")
    assert "target 'late' is missing in 80 of 240 rows of" in line
    assert "fill them, or leave them out with --skip-missing-target" in line


def test_infinite_target(shops: pa.Table, tmp_path: Path) -> None:
    X, y = frame(shops)
    y[5] = np.inf
    found = message(InputError, encoder().fit, X, y)
    assert found.startswith("target 'sales' is NaN or infinity in 1 row(s), the first is row 5")
    rows = shops.set_column(4, "sales", pa.array(y.to_numpy()))
    assert "target 'sales' is NaN or infinity in 1 row(s)" in fit_file(rows, tmp_path, "--target", "sales")


def test_skipping_rows_without_a_target_works(shops: pa.Table, tmp_path: Path) -> None:
    sales = shops["sales"].to_pylist()
    rows = shops.set_column(4, "sales", pa.array([None, *sales[1:-1], float("nan")]))
    pq.write_table(rows, tmp_path / "rows.parquet")
    options = ["--target", "sales", "--skip-missing-target", "--max-epochs", "1", "--max-lr", "0.01"]
    command = ["fit", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "s"), *options]
    result = CliRunner().invoke(cli.main, command)
    assert "Learned from 238 rows" in result.stdout
    nothing = shops.set_column(4, "sales", pa.nulls(240))
    (tmp_path / "empty").mkdir()
    line = fit_file(nothing, tmp_path / "empty", "--target", "sales", "--skip-missing-target")
    assert "target 'sales' is missing in all rows" in line


def test_a_target_that_is_a_date(shops: pa.Table, tmp_path: Path) -> None:
    dates = pa.array(np.arange(240), pa.int32()).cast(pa.date32())
    line = fit_file(shops.append_column("day", dates), tmp_path, "--target", "day")
    assert "target 'day' is date32[day]: turn it into numbers (such as days), or into text" in line


def test_a_date_that_is_not_named(shops: pa.Table, tmp_path: Path) -> None:
    dates = pa.array(np.arange(240), pa.int32()).cast(pa.date32())
    line = fit_file(shops.append_column("day", dates), tmp_path, "--target", "sales")
    assert (
        "column 'day' is date32[day], neither category nor number: name it in categorical_features or drop it"
        in line
    )


@pytest.mark.parametrize("option", ["--target", "--drop", "--weight"])
def test_a_category_that_is_left_out(option: str, shops: pa.Table, tmp_path: Path) -> None:
    options = ["--target", "sales"] * (option != "--target") + [option, "shop", "--categorical", "shop,town"]
    line = fit_file(shops, tmp_path, *options)
    assert "categorical names ['shop'], which is target, weight, group or left out: name it once" in line


def lookups(regressor: EntityEmbeddingRegressor, stored: Path) -> list[Callable]:
    """Every way to transform rows."""
    return [regressor.embeddings_.transform, EmbeddingSet.load(stored).transform, regressor.predict]


def transform_file(stored: Path, rows: pa.Table, folder: Path) -> str:
    """The one line that `embedkit transform` prints about rows that it refuses."""
    pq.write_table(rows, folder / "rows.parquet")
    command = ["transform", str(stored), str(folder / "rows.parquet"), str(folder / "out")]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert not (folder / "out").exists()
    return result.stderr


def test_a_column_that_vanished(
    shops: pa.Table, regressor: EntityEmbeddingRegressor, stored: Path, tmp_path: Path
) -> None:
    rows = shops.drop_columns(["town", "sales"]).append_column("twon", shops["town"])
    for look_up in lookups(regressor, stored)[:2]:
        found = message(InputError, look_up, rows)
        assert found.startswith("the data lacks column(s) ['town'] (did you mean 'twon'?): expected [")
    with pytest.raises(ValueError, match="Feature names seen at fit time, yet now missing:\n- town"):
        regressor.predict(rows.to_pandas())
    assert "lacks column(s) ['town'] (did you mean 'twon'?)" in transform_file(stored, rows, tmp_path)


def test_a_column_that_changed_its_type(
    shops: pa.Table, regressor: EntityEmbeddingRegressor, stored: Path, tmp_path: Path
) -> None:
    rows = shops.drop_columns("sales")
    text = rows.set_column(0, "shop", pa.array([f"shop {i}" for i in rows["shop"].to_pylist()]))
    words = rows.set_column(3, "distance", pa.array(["far"] * 240))
    for look_up in lookups(regressor, stored):
        found = message(InputError, look_up, text)
        assert found == "column 'shop' was int64 when learned, is string now: cast it to int64"
        found = message(InputError, look_up, words)
        assert found == "column 'distance' must hold numbers, found string: cast it to float64"
    assert "column 'shop' was int64 when learned, is string now" in transform_file(stored, text, tmp_path)
    (tmp_path / "other").mkdir()
    line = transform_file(stored, words, tmp_path / "other")
    assert "column 'distance' must hold numbers, found string" in line


def test_duplicate_column_names(shops: pa.Table, tmp_path: Path) -> None:
    X, y = frame(shops)
    X = pd.concat([X, X[["town"]]], axis=1)
    found = message(InputError, encoder().fit, X, y)
    assert "column names must be unique, found more than once: ['town']" in found
    rows = shops.append_column("town", shops["town"])
    cure = "has more than one column named ['town']: rename or drop all but one"
    assert cure in fit_file(rows, tmp_path, "--target", "sales", suffix=".csv")


def test_duplicate_column_names_in_parquet(shops: pa.Table, tmp_path: Path) -> None:
    line = fit_file(shops.append_column("town", shops["town"]), tmp_path, "--target", "sales")
    assert "more than one column named ['town']" in line


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_0_rows_in_a_file(shops: pa.Table, tmp_path: Path, suffix: str) -> None:
    line = fit_file(shops.slice(0, 0), tmp_path, "--target", "sales", suffix=suffix)
    assert f"rows{suffix} has 0 rows: give a file with at least 1 row" in line


def test_0_and_1_rows_to_learn_from(
    shops: pa.Table, regressor: EntityEmbeddingRegressor, tmp_path: Path
) -> None:
    X, y = frame(shops)
    for look_up in (lambda rows: encoder().fit(rows, y[:0]), regressor.transform):
        found = message(ValueError, look_up, X[:0])
        assert "0 sample(s) (rows): at least 1 row is required" in found
    assert "at least 2 rows are needed to learn from" in message(InputError, encoder().fit, X[:1], y[:1])
    assert "Error: " in fit_file(shops.slice(0, 1), tmp_path, "--target", "sales")


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_numbers(
    value: float, shops: pa.Table, regressor: EntityEmbeddingRegressor, stored: Path, tmp_path: Path
) -> None:
    X, y = frame(shops)
    X.loc[[3, 4], "distance"] = value
    expected = "column 'distance' holds 2 infinite value(s), the first in row 3: replace them by NaN or"
    for function in (lambda rows: encoder().fit(rows, y), *lookups(regressor, stored)):
        assert message(InputError, function, X).startswith(expected)
    rows = pa.Table.from_pandas(X)
    assert expected in transform_file(stored, rows, tmp_path)
    (tmp_path / "fit").mkdir()
    assert expected in fit_file(
        rows.append_column("sales", shops["sales"]), tmp_path / "fit", "--target", "sales"
    )


def test_an_infinite_category(shops: pa.Table) -> None:
    X, y = frame(shops)
    X["shop"] = X["shop"].astype(float)
    X.loc[0, "shop"] = np.inf
    found = message(InputError, encoder(categorical_features=["shop"]).fit, X, y)
    assert "'shop'" in found
    assert "infinite" in found


@pytest.mark.parametrize("where", ["file", "file/below", "other files"])
def test_an_unwritable_output(
    where: str,
    shops: pa.Table,
    regressor: EntityEmbeddingRegressor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other files").mkdir()
    (tmp_path / "other files" / "notes.txt").write_text("")
    pq.write_table(shops, tmp_path / "rows.parquet")
    monkeypatch.setattr("embedkit.base.EntityEmbeddingBase.fit", lambda *_: pytest.fail("it was trained"))
    command = ["fit", str(tmp_path / "rows.parquet"), "--target", "sales", "--out", str(tmp_path / where)]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot write to {tmp_path / where}")
    assert result.stderr.count("\n") == 1
    if where != "other files":
        found = message(OutputError, regressor.save, tmp_path / where)
        assert found.startswith(f"cannot write to {tmp_path / where}: ")


def test_an_output_that_can_be_written_is_left_alone(shops: pa.Table, tmp_path: Path) -> None:
    from embedkit.places import check_output

    check_output(tmp_path / "new" / "s.embedkit")
    assert list(tmp_path.iterdir()) == []


def test_no_output_where_the_folder_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr(places.tempfile, "TemporaryDirectory", refuse)
    found = message(OutputError, places.check_output, tmp_path / "s.embedkit")
    assert found == f"cannot write to {tmp_path}/s.embedkit: Permission denied ({tmp_path})"


@pytest.mark.parametrize("name", ["CURRENT", "v000001/manifest.json", "v000001/tables/town.parquet"])
def test_a_damaged_store(name: str, stored: Path, shops: pa.Table, tmp_path: Path) -> None:
    damaged = shutil.copytree(stored, tmp_path / "damaged")
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    found = message(StoreError, EmbeddingSet.load, damaged)
    assert f"damaged/{name}" in found
    assert "damaged" in found.replace(str(damaged), "")
    assert message(StoreError, PretrainedEmbeddingEncoder(damaged).fit, shops) == found
    pq.write_table(shops, tmp_path / "rows.parquet")
    for command in (
        ["inspect", damaged],
        ["export", damaged, "--out", tmp_path / "out"],
        ["transform", damaged, tmp_path / "rows.parquet", tmp_path / "out"],
        ["verify", damaged],
    ):
        result = CliRunner().invoke(cli.main, list(map(str, command)))
        assert (result.exit_code, result.stdout) == (1, "")
        assert found in result.stderr
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_found_when_they_are_needed(
    stored: Path, shops: pa.Table, tmp_path: Path
) -> None:
    damaged = shutil.copytree(stored, tmp_path / "damaged")
    weights = damaged / "v000001" / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "network.safetensors is damaged" in message(StoreError, EntityEmbeddingRegressor.load, damaged)
    assert EmbeddingSet.load(damaged).transform(shops).shape == (240, 7)


def test_a_set_of_another_kind(stored: Path) -> None:
    found = message(StoreError, EntityEmbeddingClassifier.load, stored)
    assert "holds EntityEmbeddingRegressor, not EntityEmbeddingClassifier" in found


def test_torch_is_not_installed(stored: Path, shops: pa.Table, tmp_path: Path) -> None:
    pq.write_table(shops, tmp_path / "rows.parquet")
    code = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Without())
import embedkit, pyarrow.parquet as pq
rows = pq.read_table(sys.argv[1])
X, y = rows.drop_columns("sales"), rows["sales"].to_numpy()
regressor = embedkit.EntityEmbeddingRegressor.load(sys.argv[2])
regressor.transform(X)
for use in (lambda: embedkit.EntityEmbeddingEncoder().fit(X, y), lambda: regressor.predict(X)):
    try:
        use()
    except embedkit.MissingExtraError as error:
        print(error)
from embedkit.cli import main
main(["fit", sys.argv[1], "--target", "sales", "--out", sys.argv[3]])
"""
    arguments = [tmp_path / "rows.parquet", stored, tmp_path / "s"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cure = 'torch is not installed; in the folder of embedkit: pip install ".[train]"\n'
    assert done.stdout == cure * 2, done.stderr
    assert (done.stderr, done.returncode) == (f"Error: {cure}", 1)


def test_unknown_and_missing_categories_work(
    shops: pa.Table, regressor: EntityEmbeddingRegressor, stored: Path
) -> None:
    rows = pd.DataFrame(
        {"shop": [99, None], "town": ["Kyiv", None], "open": [None, True], "distance": [None, 1.0]}
    )
    table = regressor.embeddings_["town"]
    for look_up in (regressor.transform, EmbeddingSet.load(stored).transform):
        found = look_up(rows)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found[:, 2:4], table.vectors[[1, 0]])
    assert np.isfinite(regressor.predict(rows)).all()


def test_1_row_works(
    shops: pa.Table, regressor: EntityEmbeddingRegressor, stored: Path, tmp_path: Path
) -> None:
    row = shops.drop_columns("sales").slice(7, 1)
    expected = regressor.transform(shops.drop_columns("sales"))[7:8]
    for rows in (row, row.to_pandas(), pl.from_arrow(row)):
        np.testing.assert_array_equal(regressor.transform(rows), expected)
    assert regressor.predict(row.to_pandas()).shape == (1,)
    pacsv.write_csv(row, tmp_path / "row.csv")
    command = ["transform", str(stored), str(tmp_path / "row.csv"), str(tmp_path / "out"), "--replace"]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    found = pq.read_table(tmp_path / "out").select(regressor.embeddings_.feature_names_out)
    np.testing.assert_array_equal(found.to_pandas().to_numpy(), expected)


def test_2_rows_are_enough_to_learn_from(shops: pa.Table) -> None:
    X, y = frame(shops.take([0, 1]))
    assert np.isfinite(encoder().fit(X, y).transform(X)).all()


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["same"] * 240),
        pd.Series([3.0] * 240),
        pd.Series([None] * 240, dtype=object),
        pd.Series([np.nan] * 240),
        pd.Series([f"id {i}" for i in range(240)]),
        pd.Series(["a", 1, 2.5, None, True, pd.Timestamp("2013-01-01")] * 40, dtype=object),
    ],
    ids=["constant text", "constant number", "no text", "no number", "all unique", "mixed types"],
)
def test_columns_that_say_nothing_or_everything_work(
    column: pd.Series, shops: pa.Table, tmp_path: Path
) -> None:
    X, y = frame(shops)
    X = X.assign(odd=column)
    fitted = encoder().fit(X, y)
    found = fitted.transform(X)
    assert np.isfinite(found).all()
    store.publish(tmp_path / "s", fitted.embeddings_)
    np.testing.assert_array_equal(EmbeddingSet.load(tmp_path / "s").transform(X), found)


def test_only_one_column_and_it_is_constant(shops: pa.Table) -> None:
    _, y = frame(shops)
    X = pd.DataFrame({"town": ["Rome"] * 240})
    assert np.isfinite(encoder().fit(X, y).transform(X)).all()
