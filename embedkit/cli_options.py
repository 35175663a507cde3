"""The options that the commands that learn have in common."""

import os
from collections.abc import Callable

import click

from embedkit.console import Names, Number, Widths

NAMES = Names()


def learning_options(command: Callable) -> Callable:
    """Add the options that say what to learn from, and how wide and how fast."""
    options = [
        click.argument("data", type=click.Path()),
        click.option("--target", type=NAMES, required=True, help="Column to predict; or several: a,b."),
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
            help="Integer ids and dates to take as categories; texts and booleans always are.",
        ),
        click.option("--weight", help="Column that says how many rows each row stands for."),
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
        click.option(
            "--embedding-dim",
            type=Widths("auto"),
            default="auto",
            show_default=True,
            help="Width of the vectors: a number, or Store=10,DayOfWeek=4.",
        ),
        click.option(
            "--min-frequency", type=Number(), help="Rarer categories count as unknown (rows, or a fraction)."
        ),
        click.option("--max-categories", type=int, help="Most categories to keep of a column."),
        click.option(
            "--batch-size", type=Number("auto"), default="auto", show_default=True, help="Rows a step."
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
            help="CPU threads.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors, show no progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _use_threads(ctx: click.Context, param: click.Parameter, threads: int | None) -> None:
    # torch and Arrow read it when they are loaded, which no command has done yet.
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
