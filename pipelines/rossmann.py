"""The tables of "Entity Embeddings of Categorical Variables" (Guo & Berkhahn 2016, arXiv 1604.06737), beside
ours.

The same seven columns, split, sample and error (mean absolute percentage error of sales). Nothing is tuned to
these data: the network is learned with embedkit's defaults.

    python pipelines/rossmann.py --data rossmann.parquet --split time

The data are those of Kaggle's "Rossmann Store Sales", joined with the stores' states: columns Store, Date,
DayOfWeek, Promo, State and Sales, as Parquet or CSV.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import lightgbm
import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler

from embedkit import EntityEmbeddingRegressor

COLUMNS = ["Store", "DayOfWeek", "day", "month", "year", "Promo", "State"]
SAMPLE = 200_000
# Tables II and III of the paper: (without, with entity embeddings).
PAPER = {
    "time": {
        "KNN": (0.290, 0.116),
        "random forest": (0.158, 0.108),
        "boosted trees": (0.152, 0.115),
        "network": (0.101, 0.093),
    },
    "shuffled": {
        "KNN": (0.315, 0.099),
        "random forest": (0.167, 0.089),
        "boosted trees": (0.122, 0.071),
        "network": (0.070, 0.070),
    },
}


def load(path: Path) -> pd.DataFrame:
    """Open days in order of date, with the date's parts as columns."""
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, low_memory=False)
    table = table[table["Sales"] > 0].copy()
    date = pd.to_datetime(table["Date"])
    table["day"], table["month"], table["year"] = date.dt.day, date.dt.month, date.dt.year
    return table.assign(Date=date).sort_values("Date", kind="stable").reset_index(drop=True)


def split(table: pd.DataFrame, how: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """200,000 rows of the first nine tenths to learn from, in order, and the last tenth."""
    random = np.random.RandomState(seed)
    if how == "shuffled":
        table = table.iloc[random.permutation(len(table))]
    cut = int(0.9 * len(table))
    sample = np.sort(random.permutation(cut)[:SAMPLE])
    return table.iloc[sample], table.iloc[cut:]


def downstream(threads: int) -> dict[str, Callable[[], object]]:
    """The paper's models and settings; for XGBoost LightGBM, half as many trees at twice the rate."""
    return {
        "KNN": lambda: KNeighborsRegressor(10, weights="distance", p=1, n_jobs=threads),
        "random forest": lambda: RandomForestRegressor(200, max_depth=35, random_state=0, n_jobs=threads),
        "boosted trees": lambda: lightgbm.LGBMRegressor(
            n_estimators=1500,
            learning_rate=0.04,
            max_depth=10,
            num_leaves=255,
            subsample=0.9,
            subsample_freq=1,
            colsample_bytree=0.7,
            random_state=0,
            n_jobs=threads,
            verbose=-1,
        ),
    }


def mape(sales: np.ndarray, predicted_log: np.ndarray) -> float:
    """Mean absolute percentage error of sales, as a fraction."""
    return float(np.mean(np.abs(np.exp(predicted_log) - sales) / sales))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=["time", "shuffled"], default="time")
    parser.add_argument("--models", default="KNN,random forest,boosted trees", help="comma-separated names")
    parser.add_argument("--networks", type=int, default=1, help="how many networks to average (the paper: 5)")
    parser.add_argument("--without", action="store_true", help="also score the models without embeddings")
    parser.add_argument("--threads", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train, test = split(load(args.data), args.split, args.seed)
    y, sales = np.log(train["Sales"].to_numpy()), test["Sales"].to_numpy()
    print(f"{args.split}: {len(train):,} rows to learn from, {len(test):,} to be judged on", flush=True)
    networks = []
    for i in range(args.networks):
        start = time.perf_counter()
        network = EntityEmbeddingRegressor(COLUMNS, random_state=args.seed + i, verbose=1)
        networks.append(network.fit(train[COLUMNS], y))
        error = mape(sales, network.predict(test[COLUMNS]))
        seconds = time.perf_counter() - start
        print(
            f"  network {i + 1}: {error:.4f} in {seconds:.0f} s, peak rate {network.max_lr_:.2g}", flush=True
        )

    together = np.mean([network.predict(test[COLUMNS]) for network in networks], axis=0)
    rows, chosen = [], [name for name in downstream(args.threads) if name in args.models.split(",")]
    if chosen:
        encoder = networks[0]
        vectors = encoder.fit_transform(train[COLUMNS], y)
        widths = {name: table.embedding_dim for name, table in encoder.embeddings_.items()}
        why, why_crosses = encoder.cross_fit_["reason"], encoder.cross_fit_["crosses"]
        print(f"  cross-fitting: {why}\n  combinations: {why_crosses}\n  widths: {widths}", flush=True)
    for name, make_model in downstream(args.threads).items():
        without = with_embeddings = float("nan")
        if name in chosen:
            start = time.perf_counter()
            model = make_model().fit(vectors, y)
            with_embeddings = mape(sales, model.predict(encoder.transform(test[COLUMNS])))
            print(f"  {name}: {with_embeddings:.4f} in {time.perf_counter() - start:.0f} s", flush=True)
            if args.without:
                plain = make_pipeline(OrdinalEncoder(), StandardScaler(), make_model()).fit(train[COLUMNS], y)
                without = mape(sales, plain.predict(test[COLUMNS]))
        rows.append((name, *PAPER[args.split][name], without, with_embeddings))
    rows.append(("network", *PAPER[args.split]["network"], float("nan"), mape(sales, together)))

    print("\n| model | paper, ordinal | paper, embeddings | ordinal | embedkit |\n|---|---|---|---|---|")
    for name, *errors in rows:
        print(f"| {name} | " + " | ".join("" if np.isnan(e) else f"{e:.4f}" for e in errors) + " |")


if __name__ == "__main__":
    main()
