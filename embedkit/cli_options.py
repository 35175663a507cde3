"""The options that the commands that learn have in common, and those of long trainings."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.console import Names, Number, Widths

if TYPE_CHECKING:
    from embedkit.files import TrainingData

NAMES = Names()
SAVING = ("resume", "checkpoint", "checkpoint_seconds", "cache_dir")


def learning_options(command: Callable, *, weighted: bool = True) -> Callable:
    """Add the options that say what to learn from, weights included if `weighted`, and how wide and fast."""
    weight = click.option("--weight", help="Column that says how many rows each row stands for.")
    options = [
        click.argument("data", type=click.Path()),
        click.option(
            "--target",
            type=NAMES,
            required=True,
            help='Column to predict; or several: a,b or "a, with comma",b.',
        ),
        click.option(
            "--columns", type=NAMES, default="", help="Columns to learn from.  [default: all others]"
        ),
        click.option("--drop", type=NAMES, default="", help="Columns to leave out: ids, leaks."),
        click.option(
            "--categorical",
            "--categorical-features",
            "categorical_features",
            type=NAMES,
            default="",
            help="Integer ids and dates to take as categories; texts, booleans and keys of directories are.",
        ),
        *([weight] if weighted else []),
        click.option("--skip-missing-target", is_flag=True, help="Leave out rows that lack a target."),
        click.option(
            "--task",
            "--target-type",
            "task",
            type=click.Choice(["auto", "continuous", "binary", "multiclass"]),
            default="auto",
            show_default=True,
            help="What the target is; auto takes numbers of more than 20 distinct values as continuous.",
        ),
        *_encoding_options(),
        click.option(
            "--min-frequency", type=Number(), help="Rarer categories count as unknown (rows, or a fraction)."
        ),
        click.option("--max-categories", type=int, help="Most categories to keep of a column."),
        *_running_options(),
    ]
    return _with_options(command, *options)


def _encoding_options() -> list[Callable]:
    """What comes out of a column, and of two."""
    return [
        click.option(
            "--embedding-dim",
            type=Widths("auto"),
            default="auto",
            show_default=True,
            help="Width of the vectors: a number, or Store=10,DayOfWeek=4.",
        ),
        click.option(
            "--ranks/--no-ranks",
            default=True,
            show_default=True,
            help="Put the place of a category in sorted order beside its vector, for trees.",
        ),
        click.option(
            "--crosses",
            type=Number("auto"),
            default="auto",
            show_default=True,
            help="Most pairs of columns whose combinations get a number of their own; auto takes 8 where "
            "they are measured to pay, by evaluate and fit --train-features, and else none.",
        ),
    ]


def _running_options() -> list[Callable]:
    """How to learn, whatever it is."""
    return [
        click.option("--max-epochs", type=int, default=15, show_default=True, help="Passes over the data."),
        click.option(
            "--batch-size", type=Number("auto"), default="auto", show_default=True, help="Rows a step."
        ),
        click.option(
            "--precision",
            type=click.Choice(["float32", "bfloat16"]),
            default="float32",
            show_default=True,
            help="Of matrix products in training; bfloat16 is faster where the processor or GPU has it, and "
            "several times slower elsewhere.",
        ),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto."),
        click.option(
            "--seed",
            "random_state",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Random seed.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            expose_value=False,
            callback=_use_threads,
            help="CPU threads, at most: steps of a training take one where that is faster.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            callback=lambda ctx, param, quiet: quiet or not _is_first(),
            help="Print nothing but errors, show no progress.",
        ),
    ]


def _is_first() -> bool:
    """Whether this process is by itself, or the first of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def fitting_options(command: Callable) -> Callable:
    """Add the options of a training whose vectors are kept: how it goes, and what comes out."""
    schedules = ["one_cycle", "triangular", "triangular2", "exp_range", "cosine_restarts", "constant"]
    return _with_options(
        command,
        click.option(
            "--max-lr", type=Number("auto"), default="auto", show_default=True, help="Peak learning rate."
        ),
        click.option(
            "--schedule",
            type=click.Choice(schedules),
            default="one_cycle",
            show_default=True,
            help="Shape of the learning rate.",
        ),
        click.option(
            "--early-stopping", is_flag=True, help="Hold out rows and stop when these get no better."
        ),
        click.option(
            "--numeric",
            type=click.Choice(["scale", "passthrough", "drop"]),
            default="scale",
            show_default=True,
            help="What becomes of numbers when rows are transformed.",
        ),
        click.option(
            "--train-features",
            type=click.Path(dir_okay=False),
            help="Parquet file to write: the rows of DATA for a model to learn from, encoded without "
            "themselves where that is measured to pay. Takes about twice the time.",
        ),
        click.option(
            "--group",
            help="Column whose values are encoded without all of their rows in --train-features; it is not "
            "learned from.",
        ),
    )


def saving_options(command: Callable) -> Callable:
    """Add the options of trainings that take long: from files, and to be gone on with."""
    return _with_options(
        command,
        click.option(
            "--stream/--no-stream",
            default=None,
            help="Learn from Parquet without reading all of it into memory; then DATA may also be a pattern "
            "or a URI.  [default: above 5 million rows]",
        ),
        click.option(
            "--cache-dir",
            type=click.Path(file_okay=False),
            help="Where --stream keeps coded rows meanwhile.  [default: beside OUT]",
        ),
        click.option("--resume", is_flag=True, help="Go on with a training that was interrupted."),
        click.option(
            "--checkpoint",
            type=click.Path(file_okay=False),
            help="Directory for the state of the training.  [default: OUT.checkpoint]",
        ),
        click.option(
            "--checkpoint-seconds",
            type=click.FloatRange(0),
            default=60.0,
            show_default=True,
            help="How often to write it, at most.",
        ),
    )


def read_rows(data: str, options: dict[str, Any], train_features: str | None = None) -> "TrainingData":
    """Read DATA; the options that say what its columns are for are taken out of `options`."""
    from embedkit.files import open_training

    names = ("target", "columns", "drop", "skip_missing_target")
    roles = {name: options.pop(name) for name in names}
    roles |= {name: options.pop(name, None) for name in ("weight", "group")}
    if train_features is None and roles["group"] is not None:
        raise click.UsageError("--group is about the rows of --train-features: name a file for these")
    stream = options.pop("stream", False)
    rows = open_training(data, stream=stream, categorical=options["categorical_features"], **roles)
    if train_features is None:
        return replace(rows, table=None)  # columns that nobody needs take memory
    if rows.table is None:
        if not os.path.exists(data):
            raise click.UsageError("--train-features needs a local file or directory as DATA")
        raise click.UsageError("--train-features takes rows in memory: add --no-stream")
    return rows


def _with_options(command: Callable, *options: Callable) -> Callable:
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def saving(
    out: str,
    *,
    resume: bool,
    checkpoint: str | None,
    checkpoint_seconds: float,
    cache_dir: str | None,
) -> Iterator[dict[str, Any]]:
    """What `saving_options` make of the parameters of an estimator's `fit`.

    A checkpoint of before is removed unless it is to be gone on with, and so is this one when all is done.
    """
    from embedkit.learning.checkpoint import FILE, remove

    checkpoint = checkpoint_of(out, checkpoint)
    if "://" not in out:
        cache_dir = cache_dir or str(next(part for part in Path(out).absolute().parents if part.is_dir()))
    if checkpoint is None:
        if resume:
            raise click.UsageError("--resume needs a --checkpoint where OUT is a URI")
        yield {"cache_dir": cache_dir}
        return
    with _alone(checkpoint):
        if not resume:
            remove(checkpoint, keep_directory=True)
        try:
            yield {"cache_dir": cache_dir, "checkpoint": checkpoint, "checkpoint_seconds": checkpoint_seconds}
        except KeyboardInterrupt:
            if os.path.exists(os.path.join(checkpoint, FILE)):
                click.echo(f"\nThe training so far is in {checkpoint}: --resume goes on with it.", err=True)
            raise
        remove(checkpoint)


def checkpoint_of(out: str, checkpoint: str | None) -> str | None:
    """Where the training so far is kept; None where OUT is a URI and no place is named."""
    if checkpoint is None and "://" not in out:
        return f"{os.path.normpath(out)}.checkpoint"
    return checkpoint


@contextmanager
def _alone(checkpoint: str) -> Iterator[None]:
    """Keep other trainings away from a checkpoint; one that dies gives the lock back."""
    from embedkit.errors import OutputError
    from embedkit.serving.output import lock_or_refuse

    if not _is_first():  # the first of the processes that learn together has it
        yield
        return
    try:
        os.makedirs(checkpoint, exist_ok=True)
        lock = os.open(checkpoint, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write a checkpoint to {checkpoint}: {error.strerror}") from error
    try:
        lock_or_refuse(
            lock, f"another training is writing {checkpoint}: wait for it, or give a --checkpoint of its own"
        )
        try:
            yield
        finally:
            with suppress(OSError):  # not empty: it holds what --resume goes on with
                os.rmdir(checkpoint)
    finally:
        os.close(lock)


def _use_threads(ctx: click.Context, param: click.Parameter, threads: int | None) -> None:
    # torch and Arrow read these when they are loaded, which no command has done yet.
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
