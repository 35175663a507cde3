"""Pictures: the range test, the training, the map of one table.

Every function takes a finished result and returns a matplotlib Figure that belongs to the caller;
pyplot and its global state are not touched. With a `path` the figure is also written as a PNG, and
the same input gives the same bytes.
"""

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from embedkit.errors import InputError, OutputError, require
from embedkit.report.labels import place_labels
from embedkit.vocabulary import FIRST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from embedkit.learning.lr_finder import LRFinderResult
    from embedkit.tables import EmbeddingTable

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#d1701f", "#3a7d44", "#6c757d"
WHOLE_NUMBERS = {"integer": True, "min_n_ticks": 1}
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "borderaxespad": 0}
CHOSEN_LINE = {"color": ORANGE, "linestyle": "--", "linewidth": 1, "zorder": 1}
STYLE = {
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
}
# For labels that DejaVu Sans has no letters for; those that are not installed are left out.
OTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "Yu Gothic",
    "Microsoft YaHei",
    "Arial",
)
LABEL_LENGTH = 24
# Areas of marks, in square points: many marks share the ink, so that they do not run into one another.
INK, LARGEST_AREA, SMALLEST_AREA, RESERVED_AREA = 16_000.0, 260.0, 9.0, 60.0


def plot_lr_finder(result: "LRFinderResult", path: str | PathLike | BinaryIO | None = None) -> "Figure":
    """The range test: rate against iteration; loss, accuracy and suggestions against the rate.

    Parameters
    ----------
    result : LRFinderResult
        What `embedkit.learning.lr_finder.find_lr` returned.
    path : path or binary file, optional
        Where to write the PNG.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        The result has no points.
    OutputError
        The file cannot be written.
    MissingExtraError
        matplotlib is not installed.
    """
    if not len(result.lrs):
        raise InputError(f"there is no curve to draw: {result.reason}")
    verdict = f"use {result.suggestion:.2g}" if result.reliable else "not to be relied on"
    with _figure(path, 10, 4.8 if result.accuracies is None else 6) as figure:
        heading = textwrap.fill(f"Learning-rate range test: {verdict} ({result.reason})", 125)
        figure.suptitle(heading, fontsize=10.5, x=0.01, ha="left")
        parts = {"loss": (_draw_loss, 3.4)}
        if result.accuracies is not None:
            parts["accuracy"] = (_draw_accuracy, 1.7)
        if result.suggestions:
            parts["rules"] = (_draw_suggestions, 1.5)
        heights = [height for _, height in parts.values()]
        grid = figure.add_gridspec(len(parts), 2, width_ratios=[1, 2.2], height_ratios=heights)
        rates = figure.add_subplot(grid[:, 0])
        rates.plot(np.arange(1, len(result.lrs) + 1), result.lrs, color=BLUE)
        rates.set(yscale="log", xlabel="iteration", ylabel="learning rate")
        rates.xaxis.get_major_locator().set_params(**WHOLE_NUMBERS)
        if result.reliable:
            rates.axhline(result.suggestion, **CHOSEN_LINE)
        axes = None
        for row, (draw, _) in enumerate(parts.values()):
            axes = figure.add_subplot(grid[row, 1], sharex=axes)
            draw(axes, result)
            axes.tick_params(labelbottom=row == len(parts) - 1)
            if result.reliable:
                axes.axvline(result.suggestion, **CHOSEN_LINE)
        axes.set_xlabel("learning rate")
    return figure


def plot_history(
    history: Sequence[Mapping[str, Any]],
    path: str | PathLike | BinaryIO | None = None,
    *,
    lrs: Sequence[float] = (),
) -> "Figure":
    """The training: loss and every other score per epoch, and the learning rate per step.

    Parameters
    ----------
    history : list of dict, one per epoch
        ``train_<score>`` and ``validation_<score>`` share a panel per score; None where an epoch has
        none. ``epoch`` is its number. Other keys are not drawn.
    path : path or binary file, optional
        Where to write the PNG.
    lrs : sequence of float, optional
        Learning rate of each step.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        The history holds no score.
    OutputError
        The file cannot be written.
    MissingExtraError
        matplotlib is not installed.
    """
    known = [key for epoch in history for key, value in epoch.items() if value is not None]
    parts = [key.partition("_") for key in known if key.startswith(("train_", "validation_"))]
    scores = list(dict.fromkeys(score for _, _, score in parts))
    if not scores:
        raise InputError(f"a history needs epochs with a train_loss, got {len(history)} epochs without")
    n_panels = len(scores) + (len(lrs) > 0)
    with _figure(path, 1.2 + 3.6 * n_panels, 3.6) as figure:
        panels = np.ravel(figure.subplots(1, n_panels))
        for axes, score in zip(panels, scores, strict=False):
            _draw_score(axes, history, score)
        if len(lrs):
            panels[-1].plot(
                np.arange(1, len(lrs) + 1), lrs, color=GREEN, marker="o" if len(lrs) == 1 else None
            )
            panels[-1].set(xlabel="step", ylabel="learning rate", xlim=(0.5, len(lrs) + 0.5), ylim=(0, None))
            panels[-1].xaxis.get_major_locator().set_params(**WHOLE_NUMBERS)
    return figure


def plot_embedding_map(
    table: "EmbeddingTable", path: str | PathLike | BinaryIO | None = None, *, max_labels: int = 40
) -> "Figure":
    """The categories of one table on its two main axes (on a line, where it has only one).

    The axes are the principal components, each category weighted by its rows. A mark's area is the
    number of rows; the missing and the unknown row are shown hollow, where rows trained them. The
    most frequent categories are labelled, as far as the labels fit without overlap.

    Parameters
    ----------
    table : EmbeddingTable
        The table.
    path : path or binary file, optional
        Where to write the PNG.
    max_labels : int, default=40
        How many labels at most.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        No row of the table was trained.
    OutputError
        The file cannot be written.
    MissingExtraError
        matplotlib is not installed.
    """
    shown = np.flatnonzero(np.asarray(table.counts) > 0)
    if not len(shown):
        raise InputError(f"there is nothing to draw: no row of table {table.feature!r} was trained")
    counts = np.asarray(table.counts, dtype=float)[shown]
    reserved = shown < FIRST
    points, shares = _principal_components(table.learned_vectors[shown], counts)
    labels = table.vocabulary.labels()
    most = counts[~reserved].max(initial=0)
    largest = np.clip(INK / len(shown), SMALLEST_AREA, LARGEST_AREA)
    by_rows = np.clip(largest * counts / max(most, 1), SMALLEST_AREA, largest)
    areas = np.where(reserved, RESERVED_AREA, by_rows)
    extent = np.ptp(points, axis=0)
    height = 2.6 if len(shares) == 1 else np.clip(8 * extent[1] / max(extent[0], 1e-12), 4.5, 7.5)
    with _figure(path, 8.5, float(height)) as figure:
        axes = figure.subplots()
        _draw_points(axes, points, areas, reserved)
        size = f"area by rows (at most {most:,.0f})"
        axes.set_title(
            f"{_shortened(table.feature)}: {np.sum(~reserved):,} categories, {size}", parse_math=False
        )
        for axis, number, share in zip((axes.xaxis, axes.yaxis), "12", shares, strict=False):
            axis.set_label_text(f"component {number} ({share:.0%} of the variance)")
        by_count = np.argsort(-counts, kind="stable")
        place_labels(axes, points, areas, [_shortened(labels[i]) for i in shown], by_count, max_labels)
    return figure


@contextmanager
def _figure(path: str | PathLike | BinaryIO | None, width: float, height: float) -> Iterator["Figure"]:
    """A figure in the house style, whatever the user's own style is; written when the block ends."""
    require("matplotlib", "plot")
    from matplotlib import font_manager, style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in OTHER_FONTS if font in installed)]
    with style.context(["default", STYLE | {"font.family": fonts}]), warnings.catch_warnings():
        # A letter that no installed font has becomes a box, which is no reason to stop a training.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        if path is not None:
            try:
                figure.savefig(path, format="png", metadata={"Software": None})
            except OSError as error:
                raise OutputError(f"cannot write the picture {path}: {error.strerror or error}") from error


def _draw_loss(axes: "Axes", result: "LRFinderResult") -> None:
    axes.plot(result.lrs, result.losses, color=BLUE, alpha=0.4, linewidth=0.9, label="of each step")
    axes.plot(result.lrs, result.smoothed_losses, color=BLUE, linewidth=2, label="smoothed")
    if len(result.lrs) > 2:
        label = "running median, as judged above"
        axes.plot(result.lrs, result.median_losses, color=GREEN, linewidth=1.2, label=label)
    # The explosion at the end would press all the rest flat.
    before = max(int(np.argmin(result.smoothed_losses)) + 1, len(result.lrs) // 5, 1)
    low, high = float(result.losses.min()), float(result.losses[:before].max())
    high = min(high + 0.4 * (high - low), float(result.losses.max()))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set(xscale="log", ylabel="loss", ylim=(low - margin, high + margin))
    axes.legend(**ABOVE | {"ncols": 3})


def _draw_accuracy(axes: "Axes", result: "LRFinderResult") -> None:
    axes.plot(result.lrs, result.accuracies, color=GREEN, linewidth=0.9)
    axes.set_ylabel("accuracy")


def _draw_suggestions(axes: "Axes", result: "LRFinderResult") -> None:
    """One row per rule, so that rules that agree do not hide one another."""
    single = {rule: lr for rule, lr in result.suggestions.items() if not rule.startswith("smith")}
    bounds = [result.suggestions["smith_base"], result.suggestions["smith_max"]]
    for row, lr in enumerate(single.values()):
        axes.plot(lr, row, "o", color=GREY, markersize=5)
    axes.plot(bounds, [len(single)] * 2, "|-", color=GREY, linewidth=2.5, markersize=8)
    chosen = result.suggestion if result.reliable else None
    values = [[lr] for lr in single.values()] + [bounds]
    for row, rates in enumerate(values):
        if chosen in rates:
            axes.plot(chosen, row, "o", color=ORANGE, markersize=6)
        text = " to ".join(f"{rate:.2g}" for rate in rates)
        axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_yticks(range(len(values)), [*single, "Smith"])
    axes.tick_params(axis="y", length=0)


def _draw_score(axes: "Axes", history: Sequence[Mapping[str, Any]], name: str) -> None:
    epochs = [epoch.get("epoch", i) for i, epoch in enumerate(history, start=1)]
    marker = "o" if len(epochs) <= 30 else None
    for part, color, label in (("train", BLUE, "training"), ("validation", ORANGE, "validation")):
        values = [epoch.get(f"{part}_{name}") for epoch in history]
        values = np.array([np.nan if value is None else value for value in values], dtype=float)
        if np.isfinite(values).any():
            axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=label)
    axes.set(xlabel="epoch", ylabel=name.replace("_", " "), xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.get_major_locator().set_params(**WHOLE_NUMBERS)
    axes.legend(**ABOVE)


def _principal_components(vectors: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions on the first two components (the only one, for a width of 1) and their shares of variance."""
    weights = weights / weights.sum()
    centred = vectors.astype(float) - weights @ vectors
    _, scale, axes = np.linalg.svd(np.sqrt(weights)[:, None] * centred, full_matrices=False)
    # An SVD knows its axes up to the sign; this choice makes the picture repeat.
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]
    share = scale**2 / max(float((scale**2).sum()), np.finfo(float).tiny)
    n_axes = min(2, vectors.shape[1])
    points = np.zeros((len(vectors), n_axes))
    points[:, : len(axes[:n_axes])] = centred @ axes[:n_axes].T  # (n_points, n_axes)
    return points, share[:n_axes]


def _draw_points(axes: "Axes", points: np.ndarray, areas: np.ndarray, reserved: np.ndarray) -> None:
    x, y = points[:, 0], points[:, 1] if points.shape[1] == 2 else np.zeros(len(points))
    axes.scatter(x[~reserved], y[~reserved], areas[~reserved], BLUE, alpha=0.55, linewidths=0)
    axes.scatter(x[reserved], y[reserved], areas[reserved], "none", edgecolors=ORANGE, linewidths=1.4)
    axes.margins(0.1)
    if points.shape[1] == 1:
        axes.set(yticks=[], ylim=(-1, 1))
        axes.spines.left.set_visible(False)
    else:
        axes.set_aspect("equal", adjustable="datalim")  # distances are what the map is about


def _shortened(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"
