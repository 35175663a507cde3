"""Which encoding makes which model best? Encodings x models over a suite of tables, the same rows for all.

    python pipelines/benchmark_quality.py --suite suite.toml --out quality

Encodings: ordinal, one-hot where it fits, scikit-learn's TargetEncoder, LightGBM's own, embedkit with its
defaults. Models: KNN, random forest, LightGBM; CatBoost (`pip install -r requirements-quality.txt`) and
embedkit's network as a whole. A suite is a TOML file of tasks, with files relative to it::

    [[task]]
    name = "sales"
    file = "sales.parquet"            # or .csv
    where = "Sales > 0"               # optional, a pandas query
    target = "Sales"                  # rows without it are dropped
    transform = "log"                 # optional, of the target: log or log1p
    kind = "regression"               # R2; or binary (ROC AUC), multiclass (macro one-vs-rest ROC AUC)
    categorical = ["Store", "DayOfWeek"]
    numeric = ["Distance"]
    split = "random"                  # 75 / 25; or "time:COLUMN", the newest 25 % last; or "group:COLUMN"
    max_rows = 100000                 # optional, drawn at random before the split

Seeds change the encoders and the models, never the rows. Scores of a task go to OUT/tasks/TASK.parquet when
it is done; the tables OUT/quality.md and OUT/quality.parquet are made of all tasks there.
"""

import argparse
import importlib.util
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from embedkit import EntityEmbeddingClassifier, EntityEmbeddingRegressor
from embedkit.comparison import COLUMNS, METRICS, OURS, Problem, compare, score_of

TEST_SHARE = 0.25
TRANSFORMS = {"log": np.log, "log1p": np.log1p}
ENCODINGS = {
    "ordinal": "ordinal",
    "onehot": "one-hot",
    "target": "TargetEncoder",
    "native": "native",
    "embedkit": "embedkit",
    "embedkit+native": "embedkit, native",
}
MODELS = {"knn": "KNN", "forest": "Random Forest", "lightgbm": "LightGBM"}


def load(task: Mapping[str, Any], folder: Path) -> Problem:
    """The rows of a task, split; always the same ones."""
    path = folder / task["file"]
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, low_memory=False)
    if "where" in task:
        table = table.query(task["where"])
    table = table[table[task["target"]].notna()]
    if len(table) > task.get("max_rows", len(table)):
        table = table.sample(task["max_rows"], random_state=0)
    how, _, column = task["split"].partition(":")
    if how == "time":
        table = table.sort_values(column, kind="stable")
        cut = round(len(table) * (1 - TEST_SHARE))
        train, test = table.iloc[:cut], table.iloc[cut:]
    elif how == "group":
        splitter = GroupShuffleSplit(1, test_size=TEST_SHARE, random_state=0)
        ((left, right),) = splitter.split(table, groups=table[column])
        train, test = table.iloc[left], table.iloc[right]
    elif how == "random":
        train, test = train_test_split(table, test_size=TEST_SHARE, random_state=0)
    else:
        raise SystemExit(
            f"task {task['name']}: split must be random, time:COLUMN or group:COLUMN, got {how!r}"
        )
    transform = TRANSFORMS[task["transform"]] if "transform" in task else np.asarray
    columns = [*task["categorical"], *task["numeric"]]
    return Problem(
        X_train=train[columns],
        y_train=transform(train[task["target"]].to_numpy()),
        X_test=test[columns],
        y_test=transform(test[task["target"]].to_numpy()),
        categorical=list(task["categorical"]),
        numeric=list(task["numeric"]),
        kind=task["kind"],
        groups=train[column].to_numpy() if how == "group" else None,
    )


def run_task(task: Mapping[str, Any], folder: Path, seeds: int, threads: int) -> pd.DataFrame:
    """Scores of all encodings and models, for every seed."""
    problem = load(task, folder)
    rows = f"{len(problem.X_train):,} rows to learn from, {len(problem.X_test):,} to be judged on"
    print(f"{task['name']}: {rows}", flush=True)
    parts = []
    for seed in range(seeds):
        start = time.perf_counter()
        kind = EntityEmbeddingRegressor if problem.kind == "regression" else EntityEmbeddingClassifier
        encoder = kind(problem.categorical, random_state=seed)
        scores = compare(problem, encoder, random_state=seed, n_jobs=threads)
        if importlib.util.find_spec("catboost") is not None:
            whole = pd.DataFrame([catboost_record(problem, seed, threads)], columns=COLUMNS)
            scores = pd.concat([scores, whole], ignore_index=True)
        parts.append(scores.assign(seed=seed))
        print(f"  seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
        best = scores.sort_values("score", ascending=False)
        for row in best.itertuples():
            print(f"    {row.encoding:9} {row.model:9} {row.score:.4f}", flush=True)
    return pd.concat(parts, ignore_index=True).assign(task=task["name"])


def catboost_record(problem: Problem, seed: int, threads: int) -> tuple[Any, ...]:
    """CatBoost with its defaults, categories its own way, as many trees as its last training rows ask for.

    The last tenth of the training rows, the newest of a split by time, choose the number; then all rows are
    learned from. With the default number CatBoost can do worse than the mean where test rows come later: the
    combinations of categories that it relies on are others by then.
    """
    import catboost

    kind = catboost.CatBoostRegressor if problem.kind == "regression" else catboost.CatBoostClassifier
    settings = {
        "random_seed": seed,
        "thread_count": threads,
        "verbose": False,
        "allow_writing_files": False,
        "cat_features": problem.categorical,
    }
    train, test = problem.X_train.copy(), problem.X_test.copy()
    for frame in (train, test):
        for name in problem.categorical:
            frame[name] = frame[name].astype(object).astype(str).where(frame[name].notna(), "(missing)")
            frame[name] = frame[name].astype(object)
        frame[problem.numeric] = frame[problem.numeric].astype(float)
    start = time.perf_counter()
    y, cut = problem.y_train, round(0.9 * len(train))
    trial = kind(early_stopping_rounds=100, **settings)
    trial.fit(train[:cut], y[:cut], eval_set=(train[cut:], y[cut:]))
    model = kind(iterations=trial.tree_count_, learning_rate=trial.learning_rate_, **settings).fit(train, y)
    score = score_of(model, test, problem)
    seconds = time.perf_counter() - start
    return "catboost", "catboost", METRICS[problem.kind], score, train.shape[1], 0.0, 0.0, seconds


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread (standard deviation) over seeds, and mean times, of each task, encoding and model."""
    groups = scores.groupby(["task", "metric", "encoding", "model"], sort=False)
    table = groups.agg(
        score=("score", "mean"),
        spread=("score", "std"),
        seeds=("seed", "nunique"),
        n_columns=("n_columns", "mean"),
        fit_seconds=("fit_seconds", "mean"),
        transform_seconds=("transform_seconds", "mean"),
        model_seconds=("model_seconds", "mean"),
    )
    return table.fillna({"spread": 0.0}).reset_index()


def duel(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """How our best of some rows compares with their best: "win", "loss", or "tie" within the spread."""
    mine, other = (rows.loc[rows["score"].idxmax()] for rows in (ours, theirs))
    difference = mine["score"] - other["score"]
    if abs(difference) <= np.hypot(mine["spread"], other["spread"]):
        return "tie"
    return "win" if difference > 0 else "loss"


def count_wins(table: pd.DataFrame) -> list[tuple[str, dict[str, str]]]:
    """Outcome by task of embedkit under each model, and as a whole against CatBoost."""
    ours, rivals = table["encoding"] == "embedkit", ~table["encoding"].isin(OURS)
    rows = []
    for model, title in MODELS.items():
        under = table["model"] == model
        rows.append((f"{title}: embedkit against the best other encoding", under & ours, under & rivals))
    boosted, target = table["model"] == "lightgbm", table["encoding"] == "target"
    beside = table["encoding"] == "embedkit+native"
    title = "LightGBM: embedkit and native categories against the best other encoding"
    rows.append((title, boosted & beside, boosted & rivals))
    rows.append(("LightGBM: embedkit against TargetEncoder", boosted & ours, boosted & target))
    rows.append(
        ("best model over embedkit, network included, against CatBoost", ours, table["model"] == "catboost")
    )
    outcomes = []
    for title, mine, other in rows:
        by_task = {
            task: duel(table[mine & (table["task"] == task)], table[other & (table["task"] == task)])
            for task in table["task"].unique()
            if (mine & (table["task"] == task)).any() and (other & (table["task"] == task)).any()
        }
        if by_task:
            outcomes.append((title, by_task))
    return outcomes


def as_markdown(table: pd.DataFrame) -> str:
    """The tables to read: scores, wins, times."""
    seeds = int(table["seeds"].min())
    lines = [
        "# Quality",
        "",
        f"R2, ROC AUC or macro one-vs-rest ROC AUC on held-out rows; mean over {seeds} seed(s), ± standard "
        "deviation where it is 0.0005 or more. The best encoding of a model is bold.",
        "",
    ]
    for model, title in MODELS.items():
        lines += [f"## {title}", "", *_score_rows(table[table["model"] == model], "encoding", ENCODINGS), ""]
    whole = table[table["model"].isin(["network", "catboost"])]
    best = table[(table["encoding"] == "embedkit") & (table["model"] != "catboost")]
    best = best.loc[best.groupby("task")["score"].idxmax()].assign(model="best")
    names = {"network": "embedkit's network", "best": "best model over embedkit", "catboost": "CatBoost"}
    lines += ["## Whole models", "", *_score_rows(pd.concat([whole, best]), "model", names), ""]
    beyond = "beyond the spread" if seeds > 1 else "of one seed, without a spread"
    lines += [f"## Wins {beyond}", "", "| | wins | ties | losses | lost on |", "|---|---|---|---|---|"]
    for title, by_task in count_wins(table):
        outcomes = list(by_task.values())
        lost = ", ".join(task for task, outcome in by_task.items() if outcome == "loss")
        counts = " | ".join(str(outcomes.count(outcome)) for outcome in ("win", "tie", "loss"))
        lines.append(f"| {title} | {counts} | {lost} |")
    lines += ["", "## Seconds to learn the encoding, and to encode the test rows", ""]
    lines += ["| task | " + " | ".join(ENCODINGS.values()) + " |", "|---" * (len(ENCODINGS) + 1) + "|"]
    times = table[table["model"] == "lightgbm"].set_index(["task", "encoding"])
    for task in table["task"].unique():
        rows = [times.loc[(task, name)] if (task, name) in times.index else None for name in ENCODINGS]
        cells = [
            "" if row is None else f"{row['fit_seconds']:.1f} + {row['transform_seconds']:.2f}"
            for row in rows
        ]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _score_rows(table: pd.DataFrame, column: str, names: Mapping[str, str]) -> list[str]:
    names = {name: title for name, title in names.items() if (table[column] == name).any()}
    lines = ["| task | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    for task, rows in table.groupby("task", sort=False):
        rows = rows.set_index(column)
        cells = []
        for name in names:
            if name not in rows.index:
                cells.append("")
                continue
            score, spread = rows.loc[name, "score"], rows.loc[name, "spread"]
            text = f"{score:.4f}" + (f" ± {spread:.3f}" if spread >= 0.0005 else "")
            cells.append(f"**{text}**" if score == rows["score"].max() else text)
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return lines


def read_tasks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All tasks of `--suite`; ends the program where it lacks one of `--task`."""
    tasks = tomllib.loads(args.suite.read_text())["task"]
    absent = set(args.task or ()) - {task["name"] for task in tasks}
    if absent:
        parser.error(f"{args.suite} has no task {', '.join(sorted(absent))}")
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", type=Path, required=True, help="TOML file of tasks")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=-1, help="of the models; -1 is all")
    args = parser.parse_args()
    tasks = read_tasks(parser, args)
    if importlib.util.find_spec("catboost") is None:
        print("catboost is not installed and left out: pip install -r pipelines/requirements-quality.txt")
    (args.out / "tasks").mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if args.task is None or task["name"] in args.task:
            scores = run_task(task, args.suite.parent, args.seeds, args.threads)
            scores.to_parquet(args.out / "tasks" / f"{task['name']}.parquet")
    done = [args.out / "tasks" / f"{task['name']}.parquet" for task in tasks]
    table = summarise(pd.concat([pd.read_parquet(path) for path in done if path.exists()]))
    table.to_parquet(args.out / "quality.parquet")
    (args.out / "quality.md").write_text(as_markdown(table))
    print(f"\n{as_markdown(table)}\nwrote {args.out}/quality.md and quality.parquet")


if __name__ == "__main__":
    main()
