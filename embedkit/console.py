"""What the commands share: kinds of options, errors in one line, and what is printed."""

import csv
import errno
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from embedkit.errors import EmbedkitError, InputError

if TYPE_CHECKING:
    import pandas as pd

    from embedkit.base import EntityEmbeddingBase
    from embedkit.columns import EmbeddingTable
    from embedkit.learning.lr_finder import LRFinderResult
    from embedkit.tables import EmbeddingSet

LINE = 100  # characters
MAX_TEXT = 60  # of a category
MAX_NUMBERS = 6  # of a vector on one line of a terminal
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Commands(click.Group):
    """A group of commands whose errors are one line: exit code 1, 2 for usage, 130 for Ctrl-C.

    So are warnings, each given once.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():  # which puts back how they are shown
                warnings.showwarning = _warn_once()
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except (EmbedkitError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(text) from error


def _warn_once() -> Callable[..., None]:
    told = set()

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            click.echo(f"Warning: {message}", err=True)

    return show


class Names(click.ParamType):
    """Names with commas between them, those that have commas in double quotes; the option may be repeated."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(name for name in _split(value) if name)


def _split(value: str) -> list[str]:
    """What is between commas, but for those in double quotes."""
    return [part.strip() for line in csv.reader([value], skipinitialspace=True) for part in line]


class Number(click.ParamType):
    """A whole number, a number, or one of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(("number", *words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or value in self.words:
            return value
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        self.fail(f"{value!r} is no number{''.join(f' and not {word!r}' for word in self.words)}", param, ctx)


class Widths(Number):
    """One width for all features, or ``Store=10,DayOfWeek=4``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or "=" not in value:
            return super().convert(value, param, ctx)
        pairs = (pair.rpartition("=") for pair in _split(value))
        return {name.strip(): super(Widths, self).convert(width, param, ctx) for name, _, width in pairs}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line; the first is text, starts on the left and may be cut, the others are numbers."""
    rows = [[_shortened(first), *others] for first, *others in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in (header, *rows)
    ]
    return "\n".join(f"  {line}" for line in lines)


def _shortened(text: str) -> str:
    """On one line: line breaks and the like as Python writes them."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def fit_summary(estimator: "EntityEmbeddingBase", n_rows: int, seconds: float) -> str:
    """What was learned, from how much, and how well."""
    history, best = estimator.history_, estimator.history_[max(estimator.best_iter_ - 1, 0)]
    losses = [f"{epoch['train_loss']:.4g}" for epoch in (history[0], history[-1])]
    lines = [
        f"Learned from {n_rows:,} rows in {seconds:.1f} s ({estimator.n_iter_} epoch(s)).",
        set_summary(estimator.embeddings_),
        f"Training loss {' -> '.join(losses[: len(history)])}{_validation(best)}; "
        f"peak learning rate {estimator.max_lr_:.2g}{_origin(estimator.lr_finder_)}.",
    ]
    return "\n".join(lines)


def set_summary(embedding_set: "EmbeddingSet") -> str:
    """Targets, features with cardinality, width and reliability, and numbers of a set."""
    content = embedding_set.metadata
    heads = [f"{head['name']} ({_kind(head)})" for head in content.get("heads", ())]
    axes = content.get("axes", {})
    rows = [
        [
            name,
            f"{table.vocabulary.cardinality:,}",
            f"{table.embedding_dim if table.vectors.any() else 0}",
            _reliability(axes.get(name), table.learned_vectors.shape[1]) if table.vectors.any() else "-",
        ]
        for name, table in embedding_set.items()
    ]
    lines = [f"Predicts {', '.join(heads)}"] if heads else []
    lines.append(text_table(["feature", "categories", "width", "reliability"], rows))
    silent = sum(not table.vectors.any() for table in embedding_set.values())
    if silent:
        lines.append(f"Width 0: nothing reliable was learned of {silent} column(s), which come out as zeros.")
    if embedding_set.numerics:
        numbers = f"Numbers: {', '.join(column.feature for column in embedding_set.numerics)}"
        lines.append(textwrap.fill(numbers, LINE, subsequent_indent="  ", break_long_words=False))
    if embedding_set.crosses:
        pairs = ", ".join(" x ".join(cross.features) for cross in embedding_set.crosses)
        lines.append(textwrap.fill(f"Pairs: {pairs}", LINE, subsequent_indent="  ", break_long_words=False))
    lines.append(f"{embedding_set.width} columns come out of {len(embedding_set.features_in)}.")
    return "\n".join(lines)


def next_steps(root: str, embedding_set: "EmbeddingSet") -> str:
    """What to type next. Rows that were learned from are for `--train-features`, not for `transform`."""
    feature = max(
        embedding_set, key=lambda name: (embedding_set[name].vectors.any(), len(embedding_set[name].counts))
    )
    root, feature = map(shlex.quote, (root, feature))
    return (
        "Next:\n"
        f"  embedkit inspect {root} {feature}\n"
        f"  embedkit transform {root} NEW_ROWS.parquet features\n"
        f"  embedkit export {root} --format csv --out tables"
    )


def find_table(embedding_set: "EmbeddingSet", feature: str) -> "EmbeddingTable":
    """The table of a feature; InputError where it has none."""
    if feature in embedding_set.subset([feature]):
        return embedding_set[feature]
    raise InputError(f"{feature!r} is a number and has no table: the set has tables of {list(embedding_set)}")


def table_rows(table: "EmbeddingTable", limit: int) -> str:
    """The rows of a table that most data stands behind."""
    labels = table.vocabulary.labels()
    order = sorted(range(table.num_embeddings), key=lambda code: (code > 1, -table.counts[code]))
    shown = order[:limit]
    shown_numbers = table.learned_vectors[:, :MAX_NUMBERS]
    names = table.feature_names_out[: shown_numbers.shape[1]]
    more = table.learned_vectors.shape[1] - len(names)
    rows = [
        [labels[code], _count(table.counts[code])] + [f"{number:.3f}" for number in shown_numbers[code]]
        for code in shown
    ]
    notes = []
    if more:
        notes.append(f"{more} more numbers per row")
    if len(shown) < len(order):
        notes.append(f"{len(order) - len(shown):,} more rows (--rows)")
    text = text_table(["category", "count", *names], rows)
    return f"{text}\n  ... {', '.join(notes)}" if notes else text


def neighbor_rows(table: "EmbeddingTable", text: str, k: int) -> str:
    """The categories nearest to the one whose name is given as text; ``(missing)`` is one."""
    value = None if text == "(missing)" else _parse(table, text)
    found = table.neighbors(value, k)
    rows = [
        [str(category), f"{distance:.3f}", _count(count)]
        for category, distance, count in zip(*(found[name] for name in found), strict=True)
    ]
    return f"Nearest to {table.feature} {text}:\n{text_table(['category', 'distance', 'count'], rows)}"


def finder_summary(result: "LRFinderResult") -> str:
    """What each rule suggests, and what to use."""
    rows = [
        [rule, f"{lr:.2e}", "<- used" if result.reliable and lr == result.suggestion else ""]
        for rule, lr in result.suggestions.items()
    ]
    lines = [text_table(["rule", "rate", ""], rows)] if rows else []
    lines.append(f"The curve is {'clear' if result.reliable else 'NOT clear'}: {result.reason}.")
    lines.append(f"Use --max-lr {result.suggestion:.2g}{'' if result.reliable else ', a default'}.")
    return "\n".join(lines)


def worst(store: str, version: str | None, data: str, target: Sequence[str], limit: int) -> str:
    """The rows of a file that a stored network predicts worst, and the categories behind them."""
    from embedkit import files
    from embedkit.predictors import load_predictor

    predictor = load_predictor(store, version)
    learned = predictor.embeddings_
    target = target or [head["name"] for head in learned.metadata["heads"]]
    rows = files.read_training(
        data,
        target,
        columns=learned.metadata["feature_names_in"],
        types=_target_types(target, learned.metadata["heads"]) | learned.types_in,
    )
    lines = ["Rows with the highest loss:", _frame(predictor.top_losses(rows.X, rows.y, limit))]
    lines += ["Categories that cost the most above the average:"]
    return "\n".join([*lines, _frame(predictor.category_losses(rows.X, rows.y).head(limit))])


def _target_types(names: Sequence[str], heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What to read targets of a CSV file as: classes of text may look like numbers."""
    import numpy as np
    import pyarrow as pa

    types = {"U": pa.string(), "f": pa.float64()}
    kinds = [np.dtype(head["classes_dtype"] or float).kind for head in heads]
    return {name: types[kind] for name, kind in zip(names, kinds, strict=False) if kind in types}


def drift_summary(changes: "pd.DataFrame", limit: int) -> str:
    """How many categories were added, are gone and were kept, and those that moved the most."""
    lines = []
    for feature, rows in changes.groupby("feature", sort=False):
        count = {change: int((rows["change"] == change).sum()) for change in ("added", "gone", "kept")}
        kept = rows[rows["change"] == "kept"]
        lines.append(
            f"{feature}: {count['added']:,} added, {count['gone']:,} gone, {count['kept']:,} kept"
            + (f", moved by {kept['moved'].median():.3g} of the spread (median)" if len(kept) else "")
        )
        shown = rows[(rows["change"] != "kept") | (rows["distance"] > 0)].groupby("change").head(limit)
        if len(shown):
            lines.append(_frame(shown.drop(columns="feature")))
    return "\n".join(lines)


def threads() -> int:
    """How many threads models may use: those of --threads, or all."""
    import pyarrow as pa

    return pa.cpu_count()


def on_terminal(quiet: bool) -> bool:
    """Whether to show a progress bar."""
    return not quiet and sys.stderr.isatty()


def _frame(frame: "pd.DataFrame") -> str:
    text = frame.to_string(index=False, na_rep="", float_format=lambda number: f"{number:.4g}")
    return textwrap.indent(text, "  ")


def _count(count: float) -> str:
    """Rows, or their weight: a fraction matters where there are few."""
    return f"{count:,.0f}" if count >= 100 or count == int(count) else f"{count:.3g}"


def _kind(head: Mapping[str, Any]) -> str:
    if head["kind"] == "multiclass":
        return f"{len(head['classes'])} classes"
    if head["kind"] == "binary":
        return " or ".join(map(str, head["classes"]))
    mean = head["center"]
    return f"a number, mean {mean:,.0f}" if abs(mean) >= 1000 else f"a number, mean {mean:.4g}"


def _reliability(axes: Mapping[str, Sequence[float]] | None, width: int) -> str:
    """Mean of the published axes, which are the most reliable ones, each by its share of the variance."""
    if axes is None:
        return "-"
    kept = sorted(zip(axes["reliability"], axes["share"], strict=True), reverse=True)[:width]
    total = sum(share for _, share in kept)
    return f"{sum(share * value for value, share in kept) / total:.2f}" if total else "-"


def _validation(epoch: Mapping[str, float | None]) -> str:
    loss = epoch.get("validation_loss")
    return "" if loss is None else f", validation loss {loss:.4g} at its best"


def _origin(finder: "LRFinderResult | None") -> str:
    if finder is None:
        return ""
    return " from the range test" if finder.reliable else f" (no clear range test: {finder.reason})"


def _parse(table: "EmbeddingTable", text: str) -> Any:
    import pyarrow as pa

    try:
        return pa.array([text]).cast(table.categories.type)[0].as_py()
    except (pa.ArrowException, OverflowError, ValueError):
        raise InputError(
            f"column {table.feature!r} holds {table.categories.type}, which {text!r} is not: "
            "give a category as inspect lists it"
        ) from None
