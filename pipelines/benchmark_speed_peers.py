"""One training for `benchmark_speed.py`, in a process of its own, with any Python that has the peer.

    python pipelines/benchmark_speed_peers.py fastai job.json

The job names Parquet files of the rows to learn from and those held out (categorical columns and `y`), and
how to learn. The last line of the output is JSON: seconds of preparation, and after every epoch the seconds
of training so far and the held-out loss (mean squared error, or cross-entropy in natural logarithms).

Each peer goes through its own data preparation and loaders, in this process, without progress bars. The
network is the same for all: embeddings, linear layers with batch norm, ReLU and dropout.
"""

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn


class Clock:
    """Seconds of training: what happens between `stop` and `start` does not count."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.perf_counter()

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> float:
        self.seconds += time.perf_counter() - self.since
        return self.seconds


class Job:
    """What to learn from, and how; attributes are those of the JSON file."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.binary: bool = content["binary"]
        self.lr: float = content["lr"]
        self.epochs: int = content["epochs"]
        self.batch_size: int = content["batch_size"]
        self.layers: list[int] = content["layers"]
        self.dropout: float = content["dropout"]
        self.embedding_dropout: float = content["embedding_dropout"]
        self.train = pd.read_parquet(content["train"])
        self.held_out = pd.read_parquet(content["held_out"])
        self.columns = [name for name in self.train if name != "y"]
        for frame in (self.train, self.held_out):
            frame["y"] = frame["y"].astype("int64" if self.binary else "float32")

    def tables(self) -> dict[str, tuple[int, int]]:
        """Rows and width of each table: two rows more than categories, as embedkit has, and fastai's rule."""
        sizes = {name: self.train[name].nunique() + 2 for name in self.columns}
        return {name: (rows, min(50, round(1.6 * rows**0.56))) for name, rows in sizes.items()}


def run_fastai(job: Job) -> dict[str, Any]:
    from fastai.tabular.all import (
        Callback,
        Categorify,
        CategoryBlock,
        RegressionBlock,
        TabularPandas,
        tabular_config,
        tabular_learner,
    )

    start = time.perf_counter()
    both = pd.concat([job.train, job.held_out], ignore_index=True)
    n = len(job.train)
    block = CategoryBlock() if job.binary else RegressionBlock()
    splits = (list(range(n)), list(range(n, len(both))))
    table = TabularPandas(both, [Categorify], job.columns, [], "y", y_block=block, splits=splits)
    loaders = table.dataloaders(bs=job.batch_size, val_bs=16_384, device="cpu", num_workers=0)
    config = tabular_config(ps=job.dropout, embed_p=job.embedding_dropout)
    widths = {name: width for name, (_, width) in job.tables().items()}
    learner = tabular_learner(loaders, layers=job.layers, emb_szs=widths, config=config)
    prepared, clock, curve = time.perf_counter() - start, Clock(), []

    class Watch(Callback):
        order = 60  # after fastai's Recorder, which has the losses

        def before_train(self) -> None:
            clock.start()

        def after_train(self) -> None:
            clock.stop()

        def after_epoch(self) -> None:
            curve.append((clock.seconds, float(self.recorder.values[-1][1])))

    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(job.epochs, job.lr, cbs=[Watch()])
    return {"prepared": prepared, "curve": curve}


def run_widedeep(job: Job) -> dict[str, Any]:
    from pytorch_widedeep import Trainer
    from pytorch_widedeep.callbacks import Callback
    from pytorch_widedeep.models import TabMlp, WideDeep
    from pytorch_widedeep.preprocessing import TabPreprocessor

    start = time.perf_counter()
    columns = [(name, width) for name, (_, width) in job.tables().items()]
    preprocessor = TabPreprocessor(cat_embed_cols=columns, verbose=0)
    codes = preprocessor.fit_transform(job.train)
    held_out = preprocessor.transform(job.held_out)
    model = WideDeep(
        deeptabular=TabMlp(
            column_idx=preprocessor.column_idx,
            cat_embed_input=preprocessor.cat_embed_input,
            cat_embed_dropout=job.embedding_dropout,
            mlp_hidden_dims=job.layers,
            mlp_dropout=job.dropout,
            mlp_batchnorm=True,
            mlp_linear_first=True,
        )
    )
    prepared, clock, curve = time.perf_counter() - start, Clock(), []

    class Watch(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            clock.start()

        def on_eval_begin(self, logs: Any = None) -> None:
            clock.stop()

        def on_epoch_end(self, epoch: int, logs: Any = None, metric: Any = None) -> None:
            curve.append((clock.seconds, float(logs["val_loss"])))

    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    steps = job.epochs * math.ceil(len(codes) / job.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, job.lr, total_steps=steps)
    trainer = Trainer(
        model,
        objective="binary" if job.binary else "regression",
        optimizers=optimizer,
        lr_schedulers=schedule,
        callbacks=[Watch()],
        device="cpu",
        num_workers=0,
        verbose=0,
    )
    trainer.fit(
        X_train={"X_tab": codes, "target": job.train["y"].to_numpy()},
        X_val={"X_tab": held_out, "target": job.held_out["y"].to_numpy()},
        n_epochs=job.epochs,
        batch_size=job.batch_size,
    )
    return {"prepared": prepared, "curve": curve}


def run_tabular(job: Job) -> dict[str, Any]:
    from pytorch_lightning import Callback
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    logging.getLogger("pytorch_tabular").setLevel(logging.ERROR)
    start = time.perf_counter()
    steps = job.epochs * math.ceil(len(job.train) / job.batch_size)
    model = TabularModel(
        data_config=DataConfig(target=["y"], categorical_cols=job.columns, num_workers=0),
        model_config=CategoryEmbeddingModelConfig(
            task="classification" if job.binary else "regression",
            layers="-".join(map(str, job.layers)),
            embedding_dims=list(job.tables().values()),
            embedding_dropout=job.embedding_dropout,
            dropout=job.dropout,
            use_batch_norm=True,
            learning_rate=job.lr,
        ),
        optimizer_config=OptimizerConfig(
            optimizer="AdamW",
            lr_scheduler="OneCycleLR",
            lr_scheduler_params={"max_lr": job.lr, "total_steps": steps},
            lr_scheduler_interval="step",
        ),
        trainer_config=TrainerConfig(
            batch_size=job.batch_size,
            max_epochs=job.epochs,
            accelerator="cpu",
            auto_select_gpus=False,
            checkpoints=None,
            early_stopping=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"num_sanity_val_steps": 0},
        ),
        verbose=False,
        suppress_lightning_logger=True,
    )
    data = model.prepare_dataloader(train=job.train, validation=job.held_out, seed=0)
    network = model.prepare_model(data)
    prepared, clock, curve = time.perf_counter() - start, Clock(), []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            clock.start()

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            clock.stop()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            curve.append((clock.seconds, float(trainer.callback_metrics["valid_loss"])))

    model.train(network, data, callbacks=[Watch()])
    return {"prepared": prepared, "curve": curve}


def run_torch(job: Job) -> dict[str, Any]:
    """A plain loop over tensors in memory, as a user of torch writes it by hand."""
    start = time.perf_counter()
    tables = job.tables()
    codes, held_out = [], []
    for name in job.columns:
        categories = pd.Index(job.train[name].unique())
        codes.append(torch.tensor(categories.get_indexer(job.train[name]) + 1))
        held_out.append(torch.tensor(categories.get_indexer(job.held_out[name]) + 1))
    codes, held_out = torch.stack(codes, dim=1), torch.stack(held_out, dim=1)
    y, y_held_out = (torch.tensor(frame["y"].to_numpy()).float() for frame in (job.train, job.held_out))
    embeddings = nn.ModuleList(nn.Embedding(*table) for table in tables.values())
    width, layers = sum(dim for _, dim in tables.values()), [nn.Dropout(job.embedding_dropout)]
    for units in job.layers:
        layers += [nn.Linear(width, units), nn.BatchNorm1d(units), nn.ReLU(), nn.Dropout(job.dropout)]
        width = units
    network = nn.Sequential(*layers, nn.Linear(width, 1))
    loss_of = nn.BCEWithLogitsLoss() if job.binary else nn.MSELoss()
    parameters = [*embeddings.parameters(), *network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=job.lr, fused=True)
    n_batches = len(y) // job.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, job.lr, total_steps=job.epochs * n_batches)
    prepared, clock, curve = time.perf_counter() - start, Clock(), []

    def outputs(batch: torch.Tensor) -> torch.Tensor:
        return network(torch.cat([table(batch[:, i]) for i, table in enumerate(embeddings)], dim=1))[:, 0]

    for _ in range(job.epochs):
        clock.start()
        network.train()
        for rows in torch.randperm(len(y))[: n_batches * job.batch_size].split(job.batch_size):
            loss = loss_of(outputs(codes[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        clock.stop()
        network.eval()
        with torch.no_grad():
            parts = torch.cat([outputs(part) for part in held_out.split(16_384)])
            curve.append((clock.seconds, loss_of(parts, y_held_out).item()))
    return {"prepared": prepared, "curve": curve}


def run_encoder(content: dict[str, Any]) -> dict[str, Any]:
    """Rows a second of a target encoder's `transform`, and its columns."""
    if content["encoder"] == "category_encoders":
        from category_encoders import TargetEncoder
    else:
        from sklearn.preprocessing import TargetEncoder
    frame = pd.read_parquet(content["train"]).astype(object)
    y = frame.pop("y").astype(float)
    encoder = TargetEncoder().fit(frame, y)
    seconds = []
    for _ in range(content["repeats"]):
        start = time.perf_counter()
        encoded = encoder.transform(frame)
        seconds.append(time.perf_counter() - start)
    return {"rows_per_second": len(frame) / min(seconds), "columns": encoded.shape[1], "first": seconds[0]}


PEERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "fastai": run_fastai,
    "pytorch-widedeep": run_widedeep,
    "pytorch-tabular": run_tabular,
    "torch": run_torch,
}
ENCODERS = ("TargetEncoder", "category_encoders")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=[*PEERS, *ENCODERS])
    parser.add_argument("job", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    content = json.loads(args.job.read_text())
    if args.peer in ENCODERS:
        print(json.dumps(run_encoder({**content, "encoder": args.peer})))
        return
    torch.set_num_threads(content["threads"])
    torch.manual_seed(0)
    print(json.dumps(PEERS[args.peer](Job(content))))


if __name__ == "__main__":
    main()
