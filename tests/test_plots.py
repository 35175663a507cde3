"""Pictures: what is drawn and where, that nothing is clipped or written over, that bytes repeat."""

import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from embedkit.errors import InputError, MissingExtraError, OutputError
from embedkit.learning.lr_finder import LRFinderResult, find_lr
from embedkit.report.plots import plot_embedding_map, plot_history, plot_lr_finder
from embedkit.tables import EmbeddingTable
from embedkit.vocabulary import Vocabulary


class Curve:
    """A trainable with a good loss curve; `accuracy` where it is asked for."""

    def __init__(self, with_accuracy: bool) -> None:
        self.with_accuracy = with_accuracy
        self.rng = np.random.default_rng(0)

    def snapshot(self) -> None: ...

    def restore(self, snapshot: object) -> None: ...

    def step(self, lr: float) -> tuple[float, float | None]:
        fall = float(np.interp(np.log10(lr), [-4, -1], [1.0, 0.3]))
        loss = fall + max(0.0, lr - 0.1) * 5 + float(self.rng.normal(scale=0.02))
        return loss, max(0.5, 1 - loss / 2) if self.with_accuracy else None


def range_test(with_accuracy: bool = False, **options: Any) -> LRFinderResult:
    return find_lr(Curve(with_accuracy), **options)


HISTORY = [
    {"epoch": 1, "train_loss": 0.9, "validation_loss": 1.0, "validation_accuracy": 0.6, "seconds": 1.0},
    {"epoch": 2, "train_loss": 0.7, "validation_loss": None, "validation_accuracy": 0.7, "seconds": 1.0},
    {"epoch": 3, "train_loss": 0.6, "validation_loss": 0.8, "validation_accuracy": 0.8, "seconds": 1.0},
]


def table(
    vectors: np.ndarray,
    counts: list[int] | None = None,
    labels: list[str] | None = None,
    feature: str = "Store",
) -> EmbeddingTable:
    """A table whose first two vectors are the missing and the unknown row."""
    n = len(vectors) - 2
    categories = sorted(labels or [f"c{i:05d}" for i in range(n)])
    counts = np.array([0, 0, *range(n, 0, -1)] if counts is None else counts)
    return EmbeddingTable(Vocabulary(feature, pa.array(categories, pa.string()), counts), vectors)


def random_table(n: int, dim: int, **options: Any) -> EmbeddingTable:
    return table(np.random.default_rng(0).normal(size=(n + 2, dim)).astype(np.float32), **options)


def marks(axes: Axes) -> np.ndarray:
    """Middles of the marks of the categories, in the units of the axes."""
    return np.asarray(axes.collections[0].get_offsets())


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def label_boxes(figure: Figure) -> np.ndarray:
    """Left, bottom, right and top of every label of a map, in pixels."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    # An annotation's own extent would include its leader.
    return np.array([Text.get_window_extent(text, renderer).extents for text in figure.axes[0].texts])


def assert_nothing_is_clipped(figure: Figure) -> None:
    figure.draw_without_rendering()
    needed = figure.get_tightbbox(figure.canvas.get_renderer())  # inches, from the lower left corner
    assert needed.x0 >= 0
    assert needed.y0 >= 0
    assert needed.x1 <= figure.get_figwidth()
    assert needed.y1 <= figure.get_figheight()


PICTURES = {
    "lr_finder": lambda path=None: plot_lr_finder(range_test(with_accuracy=True), path),
    "history": lambda path=None: plot_history(HISTORY, path, lrs=[0.1, 0.3, 0.2]),
    "map": lambda path=None: plot_embedding_map(random_table(60, 5), path),
    "line": lambda path=None: plot_embedding_map(random_table(8, 1), path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_bytes_repeat_whatever_the_users_style(name: str, tmp_path: Path) -> None:
    PICTURES[name](tmp_path / "a.png")
    stream = io.BytesIO()
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 50, "axes.facecolor": "red"}):
        PICTURES[name](stream)
    assert (tmp_path / "a.png").read_bytes() == stream.getvalue()


@pytest.mark.parametrize("name", PICTURES)
def test_a_png_holds_nothing_but_the_picture(name: str, tmp_path: Path) -> None:
    PICTURES[name](tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = set(), 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.add(data[at + 4 : at + 8])
        at += 12 + length
    assert chunks == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text, no time


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_clipped(name: str) -> None:
    assert_nothing_is_clipped(PICTURES[name]())


@pytest.mark.parametrize("name", PICTURES)
def test_an_unwritable_path_is_one_clear_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write the picture .*nowhere.*: No such file"):
        PICTURES[name](tmp_path / "nowhere" / "a.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[plot\]"'):
        plot_history(HISTORY)


def test_pyplot_and_the_global_style_are_left_alone() -> None:
    # Only some settings are compared: reading the one called "backend" imports pyplot.
    code = """
import sys
from embedkit.report.plots import plot_history
assert "matplotlib" not in sys.modules
import matplotlib
names = ["figure.dpi", "font.family", "font.size", "axes.grid", "axes.spines.top", "legend.frameon"]
before = [matplotlib.rcParams[name] for name in names]
plot_history([{"train_loss": 1.0}])
assert [matplotlib.rcParams[name] for name in names] == before
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_lr_finder_has_both_plots() -> None:
    result = range_test(with_accuracy=True)
    rates, loss, accuracy, rules = plot_lr_finder(result).axes
    assert (rates.get_xlabel(), rates.get_ylabel(), rates.get_yscale()) == (
        "iteration",
        "learning rate",
        "log",
    )
    np.testing.assert_array_equal(rates.lines[0].get_ydata(), result.lrs)
    assert (loss.get_ylabel(), loss.get_xscale()) == ("loss", "log")
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), result.losses)
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), result.smoothed_losses)
    assert accuracy.get_ylabel() == "accuracy"
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), result.accuracies)
    assert rules.get_xlabel() == "learning rate"
    assert len(plot_lr_finder(range_test(with_accuracy=False)).axes) == 3


def test_what_the_heading_of_a_range_test_says_is_drawn() -> None:
    result = range_test()
    figure = plot_lr_finder(result)
    drawn = figure.axes[1].lines[2]
    assert drawn.get_label().startswith("running median")
    assert f"its lowest is {drawn.get_ydata()[len(result.lrs) // 5 :].min():.4g}" in figure.get_suptitle()


def test_lr_finder_marks_every_suggestion_and_the_chosen_one() -> None:
    result = range_test()
    figure = plot_lr_finder(result)
    rates, loss, rules = figure.axes
    rows = [label.get_text() for label in rules.get_yticklabels()]
    assert rows == ["minimum", "steepest", "valley", "slide", "balanced", "fall", "Smith"]
    drawn = {rows[int(line.get_ydata()[0])]: line.get_xdata()[0] for line in rules.lines[:6]}
    assert drawn == {rule: result.suggestions[rule] for rule in rows[:6]}
    bounds = [result.suggestions["smith_base"], result.suggestions["smith_max"]]
    assert list(rules.lines[6].get_xdata()) == bounds
    assert labels(rules)[2] == f"{result.suggestions['valley']:.2g}"
    assert list(loss.lines[-1].get_xdata()) == [result.suggestion] * 2
    assert list(rates.lines[-1].get_ydata()) == [result.suggestion] * 2
    assert f"use {result.suggestion:.2g}" in figure.get_suptitle()


def test_lr_finder_shows_the_curve_and_not_the_explosion() -> None:
    result = range_test(stop_factor=1e3)
    loss = plot_lr_finder(result).axes[1]
    low, high = loss.get_ylim()
    assert result.losses.max() > 10
    assert low < result.losses.min() < result.losses[:50].max() < high < 2


def test_lr_finder_says_when_the_curve_is_no_good() -> None:
    result = range_test(end_lr=1e-5)
    figure = plot_lr_finder(result)
    assert "not to be relied on" in figure.get_suptitle()
    assert result.reason.split(":")[0] in " ".join(figure.get_suptitle().split())
    assert len(figure.axes[1].lines) == 3  # no line for a chosen rate
    assert_nothing_is_clipped(figure)
    short = range_test(num_iter=5)
    assert short.suggestions == {}
    assert len(plot_lr_finder(short).axes) == 2


def test_lr_finder_without_points_is_refused() -> None:
    empty = np.array([])
    result = LRFinderResult(empty, empty, empty, None, {}, 1e-3, False, "the loss diverges after 0 steps")
    with pytest.raises(InputError, match="there is no curve to draw: the loss diverges after 0 steps"):
        plot_lr_finder(result)


def test_history_draws_every_score_and_the_rate() -> None:
    loss, accuracy, lr = plot_history(HISTORY, lrs=[0.1, 0.3, 0.2]).axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, lr)] == ["loss", "accuracy", "learning rate"]
    assert [axes.get_xlabel() for axes in (loss, accuracy, lr)] == ["epoch", "epoch", "step"]
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [0.9, 0.7, 0.6])
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), [1.0, np.nan, 0.8])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [0.6, 0.7, 0.8])
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["validation"]
    np.testing.assert_array_equal(lr.lines[0].get_ydata(), [0.1, 0.3, 0.2])


def test_history_leaves_out_what_there_is_not() -> None:
    history = [{"train_loss": 1.0, "validation_loss": None, "validation_accuracy": None}]
    (loss,) = plot_history(history).axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training"]


@pytest.mark.parametrize("history", [[], [{}], [{"epoch": 1, "train_loss": None}]])
def test_an_empty_history_is_refused(history: list[dict]) -> None:
    with pytest.raises(InputError, match="a history needs epochs with a train_loss, got"):
        plot_history(history, lrs=[0.1])


def naive_components(vectors: np.ndarray, weights: np.ndarray, n_axes: int) -> np.ndarray:
    """PCA by the eigenvectors of the weighted covariance, every row as often as its count."""
    rows = np.repeat(vectors, weights, axis=0).astype(float)
    values, axes = np.linalg.eigh(np.cov(rows.T, ddof=0).reshape(rows.shape[1], -1))
    return (vectors - rows.mean(axis=0)) @ axes[:, np.argsort(-values)[:n_axes]]


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_map_shows_the_principal_components(dim: int) -> None:
    shown = random_table(12, dim)
    drawn = marks(plot_embedding_map(shown).axes[0])[:, : min(dim, 2)]
    expected = naive_components(shown.vectors[2:], shown.counts[2:], min(dim, 2))
    np.testing.assert_allclose(np.abs(drawn), np.abs(expected), atol=1e-5)


def test_a_map_states_its_share_of_the_variance() -> None:
    vectors = np.zeros((6, 3), dtype=np.float32)
    vectors[2:, 0], vectors[2:, 1] = [3, 3, -3, -3], [1, -1, 1, -1]  # variances 9 and 1
    axes = plot_embedding_map(table(vectors, counts=[0, 0, 5, 5, 5, 5])).axes[0]
    assert axes.get_xlabel() == "component 1 (90% of the variance)"
    assert axes.get_ylabel() == "component 2 (10% of the variance)"
    assert axes.get_title(loc="left") == "Store: 4 categories, area by rows (at most 5)"


def test_a_marks_area_is_its_rows_and_distances_are_true() -> None:
    axes = plot_embedding_map(random_table(3, 2, counts=[0, 0, 100, 50, 25])).axes[0]
    areas = axes.collections[0].get_sizes()
    np.testing.assert_allclose(areas / areas[0], [1, 0.5, 0.25])
    assert axes.get_aspect() == 1


def test_only_trained_rows_are_shown() -> None:
    shown = random_table(4, 2, counts=[0, 7, 3, 0, 2, 1])
    axes = plot_embedding_map(shown).axes[0]
    assert sorted(labels(axes)) == ["(unknown)", "c00000", "c00002", "c00003"]
    assert len(marks(axes)) == 3
    reserved = axes.collections[1]
    assert len(reserved.get_offsets()) == 1
    assert len(reserved.get_facecolors()) == 0  # hollow
    with pytest.raises(InputError, match="no row of table 'Store' was trained"):
        plot_embedding_map(random_table(2, 2, counts=[0, 0, 0, 0]))


def test_the_most_frequent_are_labelled() -> None:
    axes = plot_embedding_map(random_table(400, 6), max_labels=10).axes[0]
    assert len(labels(axes)) == 10
    assert labels(axes)[0] == "c00000"
    assert all(label < "c00050" for label in labels(axes))  # none far down the list
    assert labels(plot_embedding_map(random_table(9, 6), max_labels=0).axes[0]) == []


@given(
    n=st.integers(1, 300),
    dim=st.integers(1, 4),
    spread=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=8, deadline=None)
def test_labels_overlap_neither_one_another_nor_the_frame(n: int, dim: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.normal(size=(3, dim))[rng.integers(3, size=n + 2)]
    vectors = (clusters + spread * rng.normal(size=(n + 2, dim))).astype(np.float32)
    figure = plot_embedding_map(table(vectors))
    boxes = label_boxes(figure)
    frame = figure.axes[0].get_window_extent().extents
    assert len(boxes) >= 1
    assert (boxes[:, :2] >= frame[:2] - 1).all()
    assert (boxes[:, 2:] <= frame[2:] + 1).all()
    low, high = boxes[:, None, :2], boxes[None, :, 2:]
    overlap = np.minimum(high, boxes[:, None, 2:]) - np.maximum(low, boxes[None, :, :2])
    touching = (overlap > 1).all(axis=2) & ~np.eye(len(boxes), dtype=bool)  # a pixel for rounding
    assert not touching.any()


def test_every_label_of_a_small_table_is_there() -> None:
    assert len(labels(plot_embedding_map(random_table(12, 4)).axes[0])) == 12


def test_strange_names_are_drawn_as_they_are() -> None:
    names = ["$5 - $10", "a\nb\tc", "x" * 100, "東京", "\x00\x07", "\U000f0000", "", r"$\frac"]
    figure = plot_embedding_map(random_table(8, 2, labels=names, feature=r"$\alpha"), io.BytesIO())
    drawn = labels(figure.axes[0])
    assert {"$5 - $10", "a b c", "x" * 23 + "…", "東京", r"$\frac"} <= set(drawn)
    assert not any(text.get_parse_math() for text in figure.axes[0].texts)
    assert r"$\alpha: 8 categories" in figure.axes[0].get_title(loc="left")
    assert_nothing_is_clipped(figure)


@pytest.mark.parametrize(("n", "dim"), [(0, 3), (1, 1), (1, 3), (2, 2)])
def test_tiny_tables_can_be_drawn(n: int, dim: int, tmp_path: Path) -> None:
    counts = [4, 2, *range(1, n + 1)]
    figure = plot_embedding_map(random_table(n, dim, counts=counts), tmp_path / "a.png")
    assert len(labels(figure.axes[0])) == n + 2


def test_a_table_of_equal_vectors_can_be_drawn(tmp_path: Path) -> None:
    figure = plot_embedding_map(table(np.ones((5, 3), dtype=np.float32)), tmp_path / "a.png")
    np.testing.assert_allclose(marks(figure.axes[0]), 0, atol=1e-6)
