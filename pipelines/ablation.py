"""What does each ingredient do? The usual recipe for entity embeddings, then one ingredient more at a time.

    python pipelines/ablation.py --suite suite.toml --task flights --rows 20000 --out ablation

Steps, each on top of those before:

1. The plain recipe: `nn.Embedding` tables and layers, AdamW on everything, raw vectors. Layers, widths,
   dropout, decay, epochs, batches, the one-cycle schedule and the range test for its rate are embedkit's; the
   tables start small, as fastai's do. What the training has not seen gets the mean vector of its column.
2. Shrinkage that knows the counts: `embedkit.learning.optimizer.TableOptimizer` moves the tables.
3. A trained unknown: some values are replaced by unknown in training.
4. Canonical axes: the vectors in the network's own metric, numeric columns too.
5. Only axes that are not sampling noise.
6. Ranks: each category's place in sorted order beside its vector, on a scale that distances do not see.
7. Cross-fitting where it is measured to pay.
8. Values hidden from the models, one in a hundred.
9. Numbers for combinations of two categories, of up to eight pairs of columns.

KNN, random forest and LightGBM learn from the vectors of the same training rows, with the same settings, at
every step; the network predicts by itself. KNN gets standardised columns from the raw vectors (steps 1 to 3),
whose scale is arbitrary, and canonical ones as they are. Suites are in the format of `benchmark_quality.py`;
of a task at most ROWS training rows, and at most 10,000 test rows, are drawn at random. Seeds change the
networks and the models, never the rows.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from benchmark_quality import MODELS, load, read_tasks
from torch import nn

from embedkit import EmbeddingSet, EmbeddingTable, EntityEmbeddingClassifier, EntityEmbeddingRegressor
from embedkit.comparison import METRICS, Problem, score_of
from embedkit.learning.data import Rows
from embedkit.learning.fit import range_test
from embedkit.learning.learned import History, Learned, NetworkShape, Settings
from embedkit.learning.losses import row_losses
from embedkit.learning.lr_finder import FALLBACK_LR
from embedkit.learning.prepare import Preparation, prepare
from embedkit.learning.schedules import make_schedule
from embedkit.models import make_model
from embedkit.vocabulary import Vocabulary

MAX_TEST_ROWS = 10_000
TITLES = {**MODELS, "network": "The network itself"}
Estimator = EntityEmbeddingClassifier | EntityEmbeddingRegressor


@dataclass(frozen=True)
class Step:
    """One row of the table."""

    title: str
    settings: Mapping[str, Any]  # of embedkit's, those that are not the defaults
    plain: bool = False  # whether the plain recipe learns
    raw: bool = False  # whether the tables are handed out as they were learned


NO_RANKS = {"ranks": False, "cross_fit": False}
ALL_AXES = {"min_reliability": 0.0, **NO_RANKS}
STEPS = (
    Step("plain recipe", {"unknown_fraction": 0.0, **ALL_AXES}, plain=True, raw=True),
    Step("+ shrinkage that knows the counts", {"unknown_fraction": 0.0, **ALL_AXES}, raw=True),
    Step("+ trained unknown", ALL_AXES, raw=True),
    Step("+ canonical axes", ALL_AXES),
    Step("+ only reliable axes", NO_RANKS),
    Step("+ ranks", {"cross_fit": False}),
    Step("+ cross-fitting", {"hidden_fraction": 0.0, "crosses": 0}),
    Step("+ hidden values", {"crosses": 0}),
    Step("+ numbers for combinations: the defaults", {}),
)


class PlainNetwork(nn.Module):
    """Tables and layers, as everybody writes them; the layers' parameters are named as embedkit's."""

    def __init__(self, shape: NetworkShape, dropout: float, embedding_dropout: float) -> None:
        super().__init__()
        sizes = zip(shape.num_embeddings, shape.embedding_dims, strict=True)
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for rows, dim in sizes)
        for table in self.tables:
            nn.init.trunc_normal_(table.weight, std=0.01)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        layers: list[nn.Module] = []
        width = sum(shape.embedding_dims) + shape.n_numeric
        for units in shape.hidden_layer_sizes:
            layers += [nn.Linear(width, units), nn.BatchNorm1d(units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.layers = nn.Sequential(*layers, nn.Linear(width, shape.n_outputs))

    def forward(self, codes: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        vectors = torch.cat([table(codes[:, i]) for i, table in enumerate(self.tables)], dim=1)
        return self.layers(torch.cat([self.embedding_dropout(vectors), numeric], dim=1))  # (batch, n_outputs)

    def weights(self) -> dict[str, np.ndarray]:
        """All learned numbers, under embedkit's names."""
        tables = {f"tables.{i}": table.weight for i, table in enumerate(self.tables)}
        layers = {f"layers.{name}": part for name, part in self.layers.state_dict().items()}
        return {name: part.detach().numpy().copy() for name, part in {**tables, **layers}.items()}


class PlainTraining:
    """AdamW on everything, batch after batch; embedkit's range test can try it and put it back."""

    def __init__(self, preparation: Preparation, settings: Settings) -> None:
        self.rows: Rows = preparation.trainer.rows
        self.heads = preparation.heads
        self.batch_size = preparation.trainer.batch_size
        self.steps_per_epoch = preparation.trainer.steps_per_epoch
        shape = preparation.trainer.network.shape
        self.network = PlainNetwork(shape, settings.dropout, settings.embedding_dropout)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.waiting: list[torch.Tensor] = []  # batches of this epoch that are still to come

    def step(self, lr: float) -> tuple[float, None]:
        """Train on the next batch; its loss."""
        if not self.waiting:
            order = torch.randperm(len(self.rows))[: self.steps_per_epoch * self.batch_size]
            self.waiting = list(order.split(self.batch_size))
        batch = self.rows.take(self.waiting.pop())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = row_losses(self.heads, self.network(batch.codes, batch.numeric), batch.targets).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), None

    def snapshot(self) -> tuple[dict[str, Any], torch.Tensor]:
        """A copy of everything, random state included."""
        return copy.deepcopy(vars(self)), torch.get_rng_state()

    def restore(self, snapshot: tuple[dict[str, Any], torch.Tensor]) -> None:
        """Put everything back."""
        vars(self).update(snapshot[0])
        torch.set_rng_state(snapshot[1])


def learn_plainly(estimator: Estimator, X: pd.DataFrame, y: np.ndarray) -> None:
    """Fit an estimator by the plain recipe, and leave what it learned where embedkit's own training does."""
    task = estimator._task(X, y, None)
    settings = task.settings
    torch.manual_seed(settings.seed)
    preparation = prepare(task)
    training = PlainTraining(preparation, settings)
    sweep = {"rule": "valley", "fallback": FALLBACK_LR}  # what the finder does by itself, as fastai's
    finder = range_test(replace(preparation, trainer=training), settings, **sweep)
    steps_per_epoch = training.steps_per_epoch
    steps = settings.max_epochs * steps_per_epoch
    schedule = make_schedule(
        "one_cycle", max_lr=finder.suggestion, total_steps=max(steps, 2), steps_per_epoch=steps_per_epoch
    )
    for i in range(steps):
        training.step(schedule(i))
    weights = training.network.weights()
    for i, vocabulary in enumerate(preparation.vocabularies):
        counts, vectors = vocabulary.counts, weights[f"tables.{i}"]
        vectors[counts == 0] = counts / counts.sum() @ vectors
    estimator._learned = Learned(
        raw_tables(preparation.vocabularies, weights),
        numerics=(),
        heads=preparation.heads,
        inputs=preparation.inputs,
        shape=preparation.trainer.network.shape,
        weights=weights,
        axes={},
        projections=(),
        noise=(),
        history=History(),
        lr_finder=finder,
        max_lr=finder.suggestion,
    )


def raw_tables(
    vocabularies: Iterable[Vocabulary], weights: Mapping[str, np.ndarray]
) -> tuple[EmbeddingTable, ...]:
    """The tables of a network as it has them."""
    return tuple(EmbeddingTable(part, weights[f"tables.{i}"]) for i, part in enumerate(vocabularies))


def raw_embeddings(learned: Learned) -> EmbeddingSet:
    """The tables of a network as it has them, beside standardised numbers."""
    inputs = learned.inputs
    tables = raw_tables((part.vocabulary for part in learned.tables), learned.weights)
    return EmbeddingSet(tables, inputs.columns_out("scale", np.ones(inputs.width)))


def learn(step: Step, problem: Problem, seed: int) -> tuple[Estimator, np.ndarray]:
    """An estimator fitted as a step says, and the training rows as it encodes them for the models."""
    kind = EntityEmbeddingRegressor if problem.kind == "regression" else EntityEmbeddingClassifier
    estimator = kind(problem.categorical, random_state=seed, device="cpu", **step.settings)
    rows = problem.X_train, problem.y_train
    if not step.raw:
        return estimator, estimator.fit_transform(*rows)
    if step.plain:
        learn_plainly(estimator, *rows)
    else:
        estimator.fit(*rows)
    estimator._publish(raw_embeddings(estimator._learned))
    return estimator, estimator.transform(problem.X_train)


def draw(problem: Problem, n_rows: int | None) -> Problem:
    """The rows of a problem that are learned from and judged on."""
    train = problem.sample(n_rows, random_state=0)
    test = np.random.RandomState(0).permutation(len(problem.X_test))[:MAX_TEST_ROWS]
    return replace(
        problem,
        X_train=problem.X_train.iloc[train],
        y_train=problem.y_train[train],
        X_test=problem.X_test.iloc[test],
        y_test=problem.y_test[test],
    )


def run_task(name: str, problem: Problem, seeds: int, threads: int) -> list[dict[str, Any]]:
    """Scores of all steps and models, for every seed."""
    print(f"{name}: {len(problem.X_train):,} rows to learn from, {len(problem.X_test):,} to be judged on")
    records = []
    for seed, step in itertools.product(range(seeds), STEPS):
        start = time.perf_counter()
        estimator, train = learn(step, problem, seed)
        test = estimator.transform(problem.X_test)
        scores = {"network": score_of(estimator, problem.X_test, problem)}
        for model_name in MODELS:
            model = make_model(model_name, problem.kind, scale=step.raw, random_state=seed, n_jobs=threads)
            scores[model_name] = score_of(model.fit(train, problem.y_train), test, problem)
        common = {"task": name, "metric": METRICS[problem.kind], "step": step.title, "seed": seed}
        common["n_columns"] = train.shape[1]
        records += [{**common, "model": model, "score": score} for model, score in scores.items()]
        found = ", ".join(f"{model} {score:.4f}" for model, score in scores.items())
        print(f"  seed {seed}, {step.title}: {found}; {time.perf_counter() - start:.0f} s", flush=True)
    return records


def as_markdown(scores: pd.DataFrame) -> str:
    """The tables to read: means over tasks and seeds, then each model by task."""
    lines = [
        "# Ablation",
        "",
        f"Scores on held-out rows, mean over {scores['seed'].nunique()} seed(s). Each row has one ingredient "
        "more than the row above; the best of a column is bold.",
        "",
        "## Mean over the tasks",
        "",
        *_rows(scores.pivot_table("score", "step", "model"), TITLES),
    ]
    metrics = dict(zip(scores["task"], scores["metric"], strict=True))
    names = {**{task: f"{task}, {metric}" for task, metric in metrics.items()}, "mean": "mean"}
    for model, title in TITLES.items():
        table = scores[scores["model"] == model].pivot_table("score", "step", "task")
        table["mean"] = table.mean(axis=1)
        lines += ["", f"## {title}", "", *_rows(table, names)]
    return "\n".join(lines) + "\n"


def _rows(table: pd.DataFrame, names: Mapping[str, str]) -> list[str]:
    table = table[list(names)].round(3)
    lines = [f"| | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for step in STEPS:
        found = table.loc[step.title]
        cells = [f"**{x:.3f}**" if x == table[name].max() else f"{x:.3f}" for name, x in found.items()]
        lines.append(f"| {step.title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", type=Path, required=True, help="TOML file of tasks")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--rows", type=int, help="training rows at most; all of them by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the networks and the models")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder for results")
    args = parser.parse_args()
    tasks = read_tasks(parser, args)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    records = []
    for task in tasks:
        if args.task is None or task["name"] in args.task:
            problem = draw(load(task, args.suite.parent), args.rows)
            records += run_task(task["name"], problem, args.seeds, args.threads)
            scores = pd.DataFrame(records)
            scores.to_parquet(args.out / "ablation.parquet")
            (args.out / "ablation.md").write_text(as_markdown(scores))
    print(f"\n{as_markdown(scores)}\nwrote {args.out}/ablation.md and ablation.parquet")


if __name__ == "__main__":
    main()
