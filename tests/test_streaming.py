"""Rows in files: the same codes as in memory, all rows in every epoch, nothing left behind."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from embedkit import (
    EmbeddingSet,
    EntityEmbeddingClassifier,
    EntityEmbeddingEncoder,
    EntityEmbeddingRegressor,
    InputError,
    cli,
    files,
)
from embedkit import inputs as inputs_module
from embedkit.errors import OutputError
from embedkit.frames import to_table
from embedkit.learning import numeric as numeric_module
from embedkit.learning import stored_rows, streaming
from embedkit.learning.learned import Settings, Task
from embedkit.learning.numeric import NumericInputs, RunningMoments
from embedkit.learning.prepare import prepare
from embedkit.learning.stored_rows import RowWriter
from embedkit.learning.streaming import Stream, ValueCounts, scan_heads
from embedkit.learning.targets import make_heads
from embedkit.roles import Roles
from embedkit.vocabulary import UNKNOWN, Vocabulary

SMALL = {"hidden_layer_sizes": (8,), "max_epochs": 2, "max_lr": 0.01, "random_state": 0}


@pytest.fixture
def few_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, buffers and batches so small that a few hundred rows fill several."""
    monkeypatch.setattr(numeric_module, "MAX_SORTED_ROWS", 10)
    monkeypatch.setattr(stored_rows, "BLOCK_ROWS", 8)
    monkeypatch.setattr(stored_rows, "BUFFER_BYTES", 1)
    monkeypatch.setattr(streaming, "BATCH_ROWS", 50)
    monkeypatch.setattr(streaming, "MIN_MERGE", 4)


@pytest.fixture
def rows() -> pa.Table:
    """700 rows: a number, an integer id, a text with gaps, targets of several kinds, weights."""
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 40, 700)
    town = np.array(["Bonn", "Oslo", "Rome", None], dtype=object)[rng.integers(0, 4, 700)]
    area = rng.normal(5, 2, 700)
    area[::9] = np.nan
    sales = np.sin(shop) + rng.normal(0, 0.1, 700)
    return pa.table(
        {
            "shop": shop.astype("i4"),
            "town": pa.array(town),
            "area": pa.array(area, from_pandas=True),
            "sales": sales,
            "grade": np.where(sales > 0.5, "high", "low"),
            "stars": rng.integers(0, 5, 700).astype("i2"),
            "open": sales > 0,
            "weight": rng.integers(0, 3, 700),
        }
    )


@pytest.fixture
def folder(rows: pa.Table, tmp_path: Path) -> Path:
    """The rows in two files."""
    (tmp_path / "rows").mkdir()
    pq.write_table(rows.slice(0, 300), tmp_path / "rows" / "a.parquet", row_group_size=70)
    pq.write_table(rows.slice(300), tmp_path / "rows" / "b.parquet")
    return tmp_path / "rows"


def stream_of(folder: Path, *targets: str, weight: str | None = None) -> Stream:
    return inputs_module.make_stream(folder, list(targets), weight, None)


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize("weight", [None, "weight"])
@pytest.mark.parametrize("limits", [{}, {"min_frequency": 19}, {"min_frequency": 0.03, "max_categories": 9}])
def test_codes_and_inputs_are_those_of_the_table_in_memory(
    rows: pa.Table, folder: Path, weight: str | None, limits: dict
) -> None:
    roles = Roles(("shop", "town", "open"), ("area",))
    weights = None if weight is None else rows[weight].to_numpy().astype(float)
    y = rows["sales"].to_numpy()[:, None]
    heads = make_heads(y, ["sales"], "auto", weights)
    settings = Settings(max_epochs=1, **limits)
    expected = prepare(Task(to_table(rows), roles, heads, y, weights, settings))
    stream = stream_of(folder, "sales", weight=weight)
    found = prepare(Task(stream, roles, scan_heads(stream, "auto"), None, None, settings))
    for a, b in zip(expected.vocabularies, found.vocabularies, strict=True):
        assert a.categories.equals(b.categories)
        assert a.counts.dtype == b.counts.dtype
        np.testing.assert_array_equal(a.counts, b.counts)
    present = np.ones(700, dtype=bool) if weights is None else weights > 0
    codes = np.stack([part.encode(rows[part.feature]) for part in expected.vocabularies], axis=1)[present]
    np.testing.assert_array_equal(found.trainer.rows.codes.numpy(), codes)
    np.testing.assert_allclose(found.inputs.means, expected.inputs.means, rtol=1e-12)
    np.testing.assert_allclose(found.inputs.scales, expected.inputs.scales, rtol=1e-12)
    assert found.inputs.flagged == expected.inputs.flagged == (True,)
    np.testing.assert_allclose(found.priors, expected.priors, rtol=1e-12)
    np.testing.assert_allclose(
        found.trainer.rows.targets.numpy()[:, 0], heads[0].encode(y[present, 0]), rtol=1e-6
    )


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize("target", ["sales", "grade", "stars", "open"])
@pytest.mark.parametrize("kind", ["auto", "continuous", "multiclass"])
def test_heads_are_those_of_the_targets_in_memory(
    rows: pa.Table, folder: Path, target: str, kind: str
) -> None:
    y = rows[target].to_pandas().to_numpy()[:, None]
    if (target, kind) in {("grade", "continuous"), ("sales", "multiclass")}:
        errors = []
        for attempt in (
            lambda: make_heads(y, [target], kind),
            lambda: scan_heads(stream_of(folder, target), kind),
        ):
            with pytest.raises(InputError) as found:
                attempt()
            errors.append(str(found.value).partition(",")[0])
        assert errors[0] == errors[1]
        return
    (expected,) = make_heads(y, [target], kind)
    (head,) = scan_heads(stream_of(folder, target), kind)
    assert (head.name, head.kind) == (expected.name, expected.kind)
    np.testing.assert_allclose([head.center, head.scale], [expected.center, expected.scale], rtol=1e-12)
    if expected.classes is not None:
        assert [str(label) for label in head.classes] == [str(label) for label in expected.classes]
        assert head.classes.dtype.kind == expected.classes.dtype.kind


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcdefgh") | st.none(), st.integers(0, 3)), max_size=12),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from([None, 2, 0.2]),
    st.sampled_from([None, 3]),
)
def test_counts_add_up(batches: list, whole: bool, min_frequency: float | None, most: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "MIN_MERGE", 3)
        counts = ValueCounts("c", whole)
        for batch in batches:
            values = pa.chunked_array([pa.array([value for value, _ in batch], pa.string())])
            counts.add(values, np.array([weight for _, weight in batch], dtype=float))
        found = counts.vocabulary(min_frequency, most)
    cells = [cell for batch in batches for cell in batch]
    expected = Vocabulary.fit(
        pa.array([value for value, _ in cells], pa.string()),
        "c",
        min_frequency=min_frequency,
        max_categories=most,
        sample_weight=None if whole else np.array([weight for _, weight in cells], dtype=float),
    )
    assert found.categories.equals(expected.categories)
    assert found.counts.dtype == expected.counts.dtype
    np.testing.assert_array_equal(found.counts, expected.counts)


@given(
    st.lists(
        st.lists(
            st.tuples(st.floats(-1e6, 1e6) | st.just(np.nan), st.floats(0.1, 9)), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=5,
    )
)
def test_running_moments(batches: list) -> None:
    running = RunningMoments(1)
    for batch in batches:
        values, weights = np.array(batch).T
        running.add(values[:, None], weights)
    values, weights = np.array([cell for batch in batches for cell in batch]).T
    expected = NumericInputs.fit(values[:, None], ["x"], weights)
    found = NumericInputs.of_moments(
        ["x"], running.means.tolist(), running.scales().tolist(), running.missing.tolist()
    )
    size = max(np.nan_to_num(np.abs(values)).max(), 1.0)
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-9, atol=1e-9 * size)
    if expected.scales[0] > 1e-6 * size:
        np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-6)
    assert found.flagged == expected.flagged
    assert running.total == pytest.approx(weights.sum())


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize("n", [3, 8, 100, 700])
@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_an_epoch_has_every_row_once_in_another_order(n: int, batch_size: int, tmp_path: Path) -> None:
    batch_size = min(batch_size, n)
    writer = RowWriter(str(tmp_path), 2, 1, 1)
    numbers = np.arange(n)
    for part in np.array_split(numbers, 3):
        writer.add(
            np.stack([part, part + 1], axis=1) + 2, part[:, None] / 2, -part[:, None], np.ones(len(part))
        )
    rows = writer.rows(torch.device("cpu"))
    assert os.listdir(tmp_path) == []
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        state = generator.get_state()
        epoch = rows.shuffled(generator, 0.1, batch_size)
        batches = [epoch.take(slice(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
        assert all(len(batch) == batch_size for batch in batches[: n // batch_size])
        targets = torch.cat([batch.targets[:, 0] for batch in batches])
        orders.append((-targets).long().tolist())
        torch.testing.assert_close(torch.cat([batch.numeric[:, 0] for batch in batches]), -targets / 2)
        codes = torch.cat([batch.codes for batch in batches])
        kept = codes != UNKNOWN
        known = (-targets).int()[:, None] + torch.tensor([2, 3], dtype=torch.int32)
        assert torch.equal(codes[kept], known[kept])
        again = rows.shuffled(generator.clone_state().set_state(state), 0.1, batch_size)
        for i in (n // batch_size - 1, 0):  # in any order
            assert torch.equal(
                again.take(slice(i * batch_size, (i + 1) * batch_size)).codes, batches[i].codes
            )
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(n))
    assert n == 3 or orders[0] != orders[1]
    assert rows.codes[:, 0].tolist() == list(range(2, n + 2)), "what is stored never changes"


def test_rows_that_are_many_are_mixed_from_all_over(tmp_path: Path) -> None:
    writer = RowWriter(str(tmp_path), 1, 0, 1)
    n = 40 * stored_rows.BLOCK_ROWS
    writer.add(np.full((n, 1), 2), np.empty((n, 0)), np.arange(n)[:, None], np.ones(n))
    rows = writer.rows(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_rows, "BUFFER_BYTES", 10 * rows.row_bytes * stored_rows.BLOCK_ROWS)
        patch.setattr(stored_rows, "MIN_BLOCKS", 1)
        epoch = rows.shuffled(torch.Generator().manual_seed(0), 0.0, 512)
        batch = epoch.take(slice(0, 512)).targets[:, 0] / n
    assert len(epoch.buffers) == 4
    assert 0.2 < batch.mean() < 0.8
    assert batch.std() > 0.2


def test_few_rows_in_files_learn_what_they_learn_in_memory(rows: pa.Table, folder: Path) -> None:
    used = rows.drop_columns(["grade", "stars", "weight"])
    pq.write_table(used, folder / "a.parquet")
    (folder / "b.parquet").unlink()
    expected = EntityEmbeddingRegressor(["shop"], **SMALL).fit(
        used.drop_columns("sales"), used["sales"].to_pandas().rename("sales")
    )
    for X in (folder, folder / "a.parquet", f"{folder}/*.parquet", folder.as_uri(), ds.dataset(folder)):
        found = EntityEmbeddingRegressor(["shop"], **SMALL).fit(X, "sales")
        assert found.embeddings_.equals(expected.embeddings_)
        columns = used.drop_columns("sales")
        np.testing.assert_array_equal(found.predict(columns), expected.predict(columns))


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize("early_stopping", [False, True])
def test_streamed_rows_learn_to_the_same_quality(rows: pa.Table, folder: Path, early_stopping: bool) -> None:
    many = pa.concat_tables([rows] * 4).sort_by("shop")  # neighbours are alike: the worst case for blocks
    pq.write_table(many, folder / "a.parquet")
    (folder / "b.parquet").unlink()
    settings = SMALL | {"max_epochs": 8, "early_stopping": early_stopping}
    names = ["shop", "town", "area"]
    in_memory = EntityEmbeddingRegressor(["shop"], **settings)
    in_memory.fit(many.select(names), many["sales"].to_numpy())
    streamed = EntityEmbeddingRegressor(["shop"], **settings)
    streamed.fit(ds.dataset(folder).replace_schema(many.select([*names, "sales"]).schema), "sales")
    assert list(streamed.feature_names_in_) == names
    errors = [
        np.mean((model.predict(rows.select(names)) - rows["sales"].to_numpy()) ** 2)
        for model in (in_memory, streamed)
    ]
    assert errors[1] < 1.3 * errors[0] + 0.01
    assert errors[1] < 0.1


@pytest.mark.usefixtures("few_in_memory")
def test_classes_weights_and_several_targets(rows: pa.Table, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    data = ds.dataset(folder).replace_schema(rows.drop_columns(["sales", "stars", "open"]).schema)
    model = EntityEmbeddingClassifier(["shop"], **SMALL).fit(data, "grade", "weight", cache_dir=cache)
    assert list(model.classes_) == ["high", "low"]
    assert list(model.feature_names_in_) == ["shop", "town", "area"]
    assert model.embeddings_["shop"].counts.sum() >= rows["weight"].to_numpy().sum()
    assert os.listdir(cache) == []
    both = EntityEmbeddingEncoder(["shop"], **SMALL).fit(folder, ["sales", "grade"])
    assert [head.kind for head in both._learned.heads] == ["continuous", "binary"]
    assert EntityEmbeddingEncoder(["shop"], **SMALL).find_lr(folder, "sales", num_iter=10).lrs.shape == (10,)


def test_directories_name_columns(rows: pa.Table, tmp_path: Path) -> None:
    ds.write_dataset(
        rows.select(["shop", "town", "sales"]),
        tmp_path / "d",
        format="parquet",
        partitioning=["town"],
        partitioning_flavor="hive",
    )
    found = EntityEmbeddingRegressor(["shop"], **SMALL).fit(tmp_path / "d", "sales")
    assert found.embeddings_["town"].categories.to_pylist() == ["Bonn", "Oslo", "Rome"]
    assert found.embeddings_["town"].counts[0] == rows["town"].null_count


def test_files_whose_types_differ_have_the_wider_type(tmp_path: Path) -> None:
    for name, dtype in (("a", pa.int16()), ("b", pa.int64()), ("c", pa.null())):
        shop = pa.array([None] * 20 if dtype == pa.null() else [1, 2] * 10, dtype)
        pq.write_table(pa.table({"shop": shop, "y": [0.5, 1.5] * 10}), tmp_path / f"{name}.parquet")
    found = EntityEmbeddingRegressor(["shop"], **SMALL).fit(tmp_path, "y")
    assert found.embeddings_["shop"].vocabulary.counts.tolist()[2:] == [20, 20]


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize(
    ("change", "y", "weight", "message"),
    [
        ({}, "salse", None, r"no column \['salse'\].*'sales'"),
        ({}, ["sales", "nothing"], None, r"no column \['nothing'\]"),
        ({}, np.zeros(700), None, "y must name the column"),
        ({}, "sales", np.ones(700), "sample_weight must name a column"),
        ({}, "sales", "none", r"no column \['none'\]"),
        ({"sales": [None] + [0.5, 1.0] * 350}, "sales", None, "target 'sales' is missing in at least 1 row"),
        ({"sales": [0.5, 1.0] * 350 + [np.inf]}, "sales", None, "'sales' holds .*infinite.* from row 700"),
        ({"sales": [0.5] * 701}, "sales", None, "one class or value only"),
        ({"area": [0.5] * 700 + [np.inf]}, "sales", None, "column 'area' holds 1 infinite.*from row"),
        ({"weight": [1.0] * 700 + [-1.0]}, "sales", "weight", "weight column 'weight' is missing or neg"),
        ({"weight": [0.0] * 701}, "sales", "weight", "one class or value only .no value in all 0 row"),
    ],
)
def test_errors_name_the_column(
    rows: pa.Table, folder: Path, change: dict, y: object, weight: object, message: str
) -> None:
    if change:
        rows = pa.concat_tables([rows, rows.slice(0, 1)])
        for name, values in change.items():
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, pa.float64()))
        (folder / "b.parquet").unlink()
        pq.write_table(rows, folder / "a.parquet")
    with pytest.raises(InputError, match=message):
        EntityEmbeddingRegressor(["shop"], **SMALL).fit(folder, y, weight)


@pytest.mark.usefixtures("few_in_memory")
def test_a_bad_row_is_named_by_its_place_among_all_rows(rows: pa.Table, tmp_path: Path) -> None:
    area = rows["area"].to_numpy(zero_copy_only=False).copy()
    area[250] = np.inf
    rows = rows.set_column(rows.column_names.index("area"), "area", pa.array(area))
    weight = np.where(np.arange(700) % 2, 1.0, 0.0)
    weight[250] = 1.0
    rows = rows.set_column(rows.column_names.index("weight"), "weight", pa.array(weight))
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=50)
    with pytest.raises(InputError, match=r"rows are counted from row 250, without those of weight 0"):
        EntityEmbeddingRegressor(["shop"], **SMALL).fit(tmp_path / "rows.parquet", "sales", "weight")


@pytest.mark.usefixtures("few_in_memory")
@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_rows_to_learn_from_and_rows_to_watch_are_needed(folder: Path, fraction: float) -> None:
    model = EntityEmbeddingRegressor(**SMALL, early_stopping=True, validation_fraction=fraction)
    with pytest.raises(InputError, match=r"validation_fraction .* of 700 rows holds out (0|700) and leaves"):
        model.fit(folder, "sales")


@pytest.mark.usefixtures("few_in_memory")
def test_too_many_classes_are_named(rows: pa.Table, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_CLASSES", 20)
    with pytest.raises(InputError, match=r"'shop' has more than 20 distinct values, too many for classes"):
        scan_heads(stream_of(folder, "shop"), "multiclass")
    (head,) = scan_heads(stream_of(folder, "shop"), "auto")
    assert (head.kind, head.center) == ("continuous", pytest.approx(rows["shop"].to_numpy().mean()))


@pytest.mark.parametrize(("number", "error"), [(1e308, "too large"), (1e-200, "too close to one another")])
def test_targets_of_files_that_cannot_be_standardised(
    few_in_memory: None, tmp_path: Path, number: float, error: str
) -> None:
    sales = np.where(np.arange(300) % 2, number, -number)
    pq.write_table(pa.table({"shop": ["a", "b", "c"] * 100, "sales": sales}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=f"target 'sales' holds numbers {error}"):
        EntityEmbeddingRegressor(**SMALL).fit(tmp_path / "rows.parquet", "sales")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    model = EntityEmbeddingRegressor(**SMALL)
    with pytest.raises(InputError, match="does not exist"):
        model.fit(tmp_path / "none.parquet", "y")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is no Parquet PAR1")
    with pytest.raises(InputError, match=r"bad.parquet cannot be read as Parquet"):
        model.fit(tmp_path / "bad.parquet", "y")
    (tmp_path / "rows.csv").write_text("a,y\n1,2\n")
    with pytest.raises(InputError, match=r"rows.csv is no Parquet"):
        model.fit(tmp_path / "rows.csv", "y")
    pq.write_table(pa.table({"y": [1.0, 2.0]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="no column to learn from"):
        model.fit(tmp_path / "y.parquet", "y")


@pytest.mark.usefixtures("few_in_memory")
def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    model = EntityEmbeddingRegressor(["shop"], **SMALL)
    with pytest.raises(OutputError, match=r"cannot write coded rows to .*none .*cache_dir"):
        model.fit(folder, "sales", cache_dir=tmp_path / "none")


@pytest.mark.usefixtures("few_in_memory")
def test_the_command_streams_what_it_is_told_to(folder: Path, rows: pa.Table, tmp_path: Path) -> None:
    gaps = rows.slice(0, 300).set_column(3, "sales", pa.array([None] * 30 + [0.5, 1.5] * 135))
    pq.write_table(gaps, folder / "a.parquet")

    def fit(data: object, *more: str) -> Result:
        out = str(tmp_path / f"out{len(os.listdir(tmp_path))}")
        command = [
            "fit",
            str(data),
            "--target",
            "sales",
            "--categorical",
            "shop",
            "--drop",
            "open,grade,stars",
        ]
        command += ["--out", out, "--weight", "weight", "--max-epochs", "1", "--max-lr", "0.01", *more]
        return CliRunner().invoke(cli.main, command)

    lacking = fit(folder, "--stream")
    assert lacking.exit_code == 1
    assert "target 'sales' is missing in at least" in lacking.stderr
    done = fit(f"{folder}/*.parquet", "--skip-missing-target")
    assert done.exit_code == 0, done.output
    assert "Learned from 670 rows" in done.stdout
    (out,) = tmp_path.glob("out*")
    stored = EmbeddingSet.load(out)
    assert stored.features_in == ("shop", "town", "area")
    weights = np.concatenate([rows["weight"].to_numpy()[30:300], rows["weight"].to_numpy()[300:]])
    assert stored["shop"].counts[[0, *range(2, 42)]].sum() == weights.sum()
    for wrong in (["--target", "salse"], ["--columns", "shop,twon"], ["--categorical", "sales"]):
        refused = fit(folder, "--stream", *wrong)
        assert refused.exit_code == 1
        assert refused.stderr.count("\n") == 1


def test_only_large_parquet_is_streamed_unasked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(files.open_training(str(folder), ["sales"]).X, pa.Table)
    assert isinstance(files.open_training(str(folder), ["sales"], stream=True).X, ds.Dataset)
    monkeypatch.setattr(files, "STREAM_ROWS", 699)
    assert isinstance(files.open_training(str(folder), ["sales"]).X, ds.Dataset)
    assert isinstance(files.open_training(str(folder), ["sales"], stream=False).X, pa.Table)
    (tmp_path / "rows.csv").write_text("a,y\n" + "b,1\n" * 800)
    assert isinstance(files.open_training(str(tmp_path / "rows.csv"), ["y"]).X, pa.Table)
    with pytest.raises(InputError, match="does not exist"):
        files.open_training(str(tmp_path / "none.parquet"), ["y"])


@pytest.mark.parametrize("stream", [False, True])
def test_the_index_of_a_frame_is_not_learned_from(tmp_path: Path, stream: bool) -> None:
    frame = pd.DataFrame({"shop": list("abcd") * 50, "sales": np.arange(200.0)}).sample(
        frac=1, random_state=0
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    dataset = EntityEmbeddingRegressor(**SMALL).fit(ds.dataset(tmp_path / "rows.parquet"), "sales")
    assert dataset.embeddings_.features_in == ("shop",)
    assert "__index_level_0__" in pq.read_schema(tmp_path / "rows.parquet").names
    rows = files.open_training(str(tmp_path / "rows.parquet"), ["sales"], stream=stream)
    estimator = rows.estimator(**SMALL).fit(rows.X, rows.y)
    assert estimator.embeddings_.features_in == ("shop",)
