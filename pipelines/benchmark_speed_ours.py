"""embedkit's side of `benchmark_speed.py`: steps of training, lookups, the floor under both, and growth.

python pipelines/benchmark_speed_ours.py training job.json
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from benchmark_batch import peak_megabytes

from embedkit import EmbeddingSet, EmbeddingTable, EntityEmbeddingClassifier, EntityEmbeddingRegressor
from embedkit.frames import to_table
from embedkit.learning.data import Rows, make_rows
from embedkit.learning.gradients import product
from embedkit.learning.learned import NetworkShape
from embedkit.learning.network import EntityEmbeddingNetwork, embedding_dims
from embedkit.learning.targets import Head
from embedkit.learning.training import Trainer
from embedkit.vocabulary import Vocabulary


def best_of(repeats: int, call: Callable[[], object]) -> float:
    """Seconds of the fastest call: what else the machine does only ever adds to them."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def make_trainer(
    rows: Rows,
    sizes: Sequence[int],
    *,
    binary: bool = False,
    layers: Sequence[int] = (200, 100),
    batch_size: int = 512,
    dropout: float = 0.1,
    embedding_dropout: float = 0.2,
    dim: str | int = "auto",
    precision: str = "float32",
) -> Trainer:
    """A trainer of the network that the peers train, on tables of these sizes."""
    dims = embedding_dims([str(i) for i in range(len(sizes))], sizes, dim)
    shape = NetworkShape(tuple(sizes), dims, rows.numeric.shape[1], tuple(layers), 1)
    return Trainer(
        EntityEmbeddingNetwork(shape, dropout, embedding_dropout),
        [Head("y", "binary", np.array([0, 1])) if binary else Head("y", "continuous")],
        rows,
        priors=[0.1 * size / len(rows) for size in sizes],
        batch_size=batch_size,
        weight_decay=0.01,
        unknown_fraction=0.03,
        precision=precision,
        generator=torch.Generator().manual_seed(0),
    )


def training(job: dict[str, Any]) -> dict[str, Any]:
    """The job that `benchmark_speed_peers.py` gives to the peers; same answer."""
    train, held_out = (pd.read_parquet(job[name]) for name in ("train", "held_out"))
    names = [name for name in train if name != "y"]
    start = time.perf_counter()
    table = to_table(train[names])
    vocabularies = [
        Vocabulary.fit(table[name], name, min_frequency=None, max_categories=None) for name in names
    ]
    rows, watched = (_coded(frame, vocabularies) for frame in (train, held_out))
    settings = {
        name: job[name]
        for name in ("binary", "layers", "batch_size", "dropout", "embedding_dropout", "precision")
    }
    trainer = make_trainer(rows, [vocabulary.num_embeddings for vocabulary in vocabularies], **settings)
    prepared, seconds, curve = time.perf_counter() - start, 0.0, []
    for _ in range(job["epochs"]):
        start = time.perf_counter()
        for _ in range(trainer.steps_per_epoch):
            trainer.advance(job["lr"])
        seconds += time.perf_counter() - start
        loss = trainer.evaluate(watched)[0]
        curve.append((seconds, loss if job["binary"] else 2 * loss))  # half the squared error, in there
    return {"prepared": prepared, "curve": curve}


def _coded(frame: pd.DataFrame, vocabularies: Sequence[Vocabulary]) -> Rows:
    table = to_table(frame)
    codes = np.column_stack([vocabulary.encode(table[vocabulary.feature]) for vocabulary in vocabularies])
    n = len(frame)
    y = frame[["y"]].to_numpy(dtype=np.float32)
    return make_rows(codes, np.empty((n, 0), dtype=np.float32), y, np.ones(n))


def floor(width: int, layers: Sequence[int], batch_size: int) -> dict[str, float]:
    """Rows a second of a step's bare matrix products, forward and backward; by `torch.mm`, and by ours."""
    sizes = [width, *layers, 1]
    weights = [torch.randn(wide, narrow) for wide, narrow in itertools.pairwise(sizes)]
    inputs = [torch.randn(batch_size, size) for size in sizes]

    def step(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for x, weight, y in zip(inputs, weights, inputs[1:], strict=False):
            multiply(x, weight)
            multiply(x.T, y)
            multiply(y, weight.T)

    ways = {"torch.mm": torch.mm, "oneDNN": lambda a, b: product(a, b.T)}
    rates = {}
    for name, multiply in ways.items():
        step(multiply)
        rates[name] = 10 * batch_size / best_of(20, lambda way=multiply: [step(way) for _ in range(10)])
    return rates


def made_rows(cardinalities: Sequence[int], n_rows: int) -> Rows:
    """Codes at random, and a number that they say nothing about."""
    random = np.random.default_rng(0)
    codes = [random.integers(2, size + 2, n_rows, dtype=np.int32) for size in cardinalities]
    y = random.standard_normal((n_rows, 1), dtype=np.float32)
    numeric = np.empty((n_rows, 0), dtype=np.float32)
    return Rows(*map(torch.from_numpy, (np.column_stack(codes), numeric, y, np.ones_like(y[:, 0]))))


def steps_per_second(trainer: Trainer, steps: int = 150, repeats: int = 8) -> tuple[float, float]:
    """Rows a second of whole epochs, the drawing of their order included; and of the floor under them."""
    start = time.perf_counter()
    trainer.draw_epoch()
    drawing = time.perf_counter() - start
    steps = min(steps, trainer.steps_per_epoch)

    def run() -> None:
        trainer.position = 0
        for _ in range(steps):
            trainer.advance(1e-3)

    run()
    step = best_of(repeats, run) / steps
    rows = trainer.steps_per_epoch * trainer.batch_size
    shape = trainer.network.shape
    bare = floor(sum(shape.embedding_dims), shape.hidden_layer_sizes, trainer.batch_size)
    return rows / (drawing + trainer.steps_per_epoch * step), max(bare.values())


def growth(largest: int) -> list[dict[str, Any]]:
    """Training as rows, cardinality (both up to `largest`), columns or width grows: a record a point."""
    records = []

    def measure(
        what: str, value: int, n_rows: int, cardinalities: Sequence[int], dim: str | int = 16
    ) -> None:
        rows = made_rows(cardinalities, n_rows)
        trainer = make_trainer(rows, [size + 2 for size in cardinalities], dim=dim)
        rate, bare = steps_per_second(trainer)
        records.append({"growing": what, "value": value, "rows_per_second": rate, "floor": bare})
        print(f"  {what} {value:,}: {rate:,.0f} rows/s", flush=True)

    n_rows = min(100_000, largest)
    for n in (10**power for power in range(5, 9)):
        if n <= largest:
            measure("rows", n, n, [1000] * 8)
    for size in (10**power for power in range(2, 9)):
        if size <= largest:
            measure("cardinality", size, n_rows, [100] * 7 + [size])
    for k in (2, 4, 8, 16, 32, 64):
        measure("columns", k, n_rows, [1000] * k)
    for dim in (2, 4, 8, 16, 32, 64):
        measure("width", dim, n_rows, [1000] * 8, dim)
    return records


def transform(n_rows: int, repeats: int) -> list[dict[str, Any]]:
    """Lookups of four string columns to 83, and what bounds them: a record a way."""
    random = np.random.default_rng(0)
    frame, tables = strings(n_rows), []
    for name, width in zip(frame, (32, 24, 16, 11), strict=True):
        vocabulary = Vocabulary.fit(to_table(frame)[name], name, min_frequency=None, max_categories=None)
        vectors = random.standard_normal((vocabulary.num_embeddings, width), dtype=np.float32)
        tables.append(EmbeddingTable(vocabulary, vectors))
    embeddings = EmbeddingSet(tables)
    categories = frame.astype("category")
    table = to_table(frame)
    codes = [each.vocabulary.encode(table[each.feature]) for each in tables]
    out = np.empty((n_rows, embeddings.width), dtype=np.float32)

    def take() -> np.ndarray:
        """All lookups by numpy alone, codes known, into a block that is new as well."""
        return np.concatenate([each.vectors[code] for each, code in zip(tables, codes, strict=True)], axis=1)

    def take_on_threads() -> np.ndarray:
        """The same in blocks that stay in a cache, on all threads."""
        taken, size = np.empty((n_rows, embeddings.width), dtype=np.float32), 8192

        def fill(start: int) -> None:
            rows, column = slice(start, start + size), 0
            for each, code in zip(tables, codes, strict=True):
                taken[rows, column : column + each.embedding_dim] = each.vectors.take(
                    code[rows], axis=0, mode="clip"
                )
                column += each.embedding_dim

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, n_rows, size)))
        return taken

    ways = {
        "embedkit, strings": lambda: embeddings.transform(frame),
        "embedkit, pandas category": lambda: embeddings.transform(categories),
        "bare take, codes known": take,
        "bare take, codes known, in blocks on all threads": take_on_threads,
        "bare write of the output": lambda: out.fill(1.0),
    }
    records = []
    for name, call in ways.items():
        first = best_of(1, call)
        seconds = best_of(repeats, call)
        records.append(
            {"way": name, "columns": out.shape[1], "first": first, "rows_per_second": n_rows / seconds}
        )
    return records


def strings(n_rows: int) -> pd.DataFrame:
    """Four string columns of 10 to 3,000 categories."""
    random = np.random.default_rng(0)
    columns = {}
    for name, size in zip("abcd", (3000, 300, 30, 10), strict=True):
        columns[name] = np.array([f"{name}{i}" for i in range(size)], dtype=object)[
            random.integers(size, size=n_rows)
        ]
    return pd.DataFrame(columns)


def quality(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole fit, all of its choices included, and the held-out loss, for numbers of epochs."""
    train, held_out = (pd.read_parquet(job[name]) for name in ("train", "held_out"))
    names = [name for name in train if name != "y"]
    make = EntityEmbeddingClassifier if job["binary"] else EntityEmbeddingRegressor
    curve = []
    for epochs in job["epochs"]:
        model = make(names, max_epochs=epochs, random_state=0)
        start = time.perf_counter()
        model.fit(train[names], train["y"])
        seconds = time.perf_counter() - start
        curve.append((seconds, loss_of(model, held_out[names], held_out["y"].to_numpy())))
    return {"prepared": 0.0, "curve": curve}


def loss_of(model: Any, X: pd.DataFrame, y: np.ndarray) -> float:
    """Cross-entropy of a classifier, mean squared error of a regressor."""
    if hasattr(model, "predict_proba"):
        p = np.clip(model.predict_proba(X)[np.arange(len(y)), y.astype(int)], 1e-12, 1)
        return float(-np.log(p).mean())
    return float(np.square(model.predict(X) - y).mean())


def automatic(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a fit that is given its rate, of one that chooses it, and of an encoding of the rows that
    were learned from, where also the columns to cross-fit are chosen."""
    train = pd.read_parquet(job["train"])
    names = [name for name in train if name != "y"]
    make = EntityEmbeddingClassifier if job["binary"] else EntityEmbeddingRegressor
    X, y = train[names], train["y"]
    free = make(names, random_state=0)
    given = make(names, random_state=0, max_lr=free.fit(X, y).max_lr_)
    ways = {
        "fit, rate given": lambda: given.fit(X, y),
        "fit": lambda: free.fit(X, y),
        "fit_transform": lambda: free.fit_transform(X, y),
    }
    seconds = {name: [] for name in ways}
    for _ in range(job["repeats"]):
        for name, call in ways.items():
            seconds[name].append(best_of(1, call))
    return {name: min(times) for name, times in seconds.items()}


def memory(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of a fit of one epoch, from files or memory, and what that and a lookup of a million rows take.

    In megabytes beyond the imports, at the peak; pages of files that the system could take back count.
    """
    before = peak_megabytes()
    model = EntityEmbeddingRegressor(job["categorical"], max_epochs=1, random_state=0)
    start = time.perf_counter()
    if job["stream"]:
        model.fit(job["train"], "y", cache_dir=str(Path(job["train"]).parent))
    else:
        table = pq.read_table(job["train"])
        model.fit(table.drop_columns("y"), table["y"].to_pandas())
        del table
    seconds = time.perf_counter() - start
    rows = next(pq.ParquetFile(job["train"]).iter_batches(1_000_000))
    model.transform(pa.Table.from_batches([rows]).drop_columns("y"))
    return {"seconds": seconds, "megabytes": peak_megabytes() - before, "imports": before}


JOBS = {"training": training, "quality": quality, "automatic": automatic, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(JOBS))
    parser.add_argument("job", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    print(json.dumps(JOBS[args.what](job)))


if __name__ == "__main__":
    main()
