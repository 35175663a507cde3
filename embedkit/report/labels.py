"""Labels beside the marks of a scatter plot that do not run into one another."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_SIZE, LINE_HEIGHT = 8, 10.5  # points
RINGS = (0.0, 10.0, 22.0, 36.0)  # extra distance between a mark and its label, in points
LEADER = {"arrowstyle": "-", "color": "#6c757d", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}


def place_labels(
    axes: "Axes",
    points: np.ndarray,
    areas: np.ndarray,
    labels: Sequence[str],
    order: np.ndarray,
    max_labels: int,
) -> None:
    """Label points of a drawing, each where it covers the fewest marks and no other label.

    Parameters
    ----------
    axes : matplotlib Axes
        The drawing, finished but for the labels; its layout is fixed here.
    points : ndarray of shape (n_points, 1 or 2)
        Their places, in the units of the axes.
    areas : ndarray of shape (n_points,)
        Of their marks, in square points.
    labels : sequence of n_points str
        What to write; a label that fits nowhere is left out.
    order : ndarray of shape (n_points,)
        Indices of points, the most important first.
    max_labels : int
        How many labels at most.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    figure.draw_without_rendering()  # the places of marks in pixels are known from here on, and kept
    figure.set_layout_engine("none")
    axes.autoscale(False)
    renderer, font, dot = figure.canvas.get_renderer(), FontProperties(size=LABEL_SIZE), figure.dpi / 72
    on_plane = np.column_stack([points, np.zeros(len(points))])[:, :2]
    room = _Room(
        frame=np.array(axes.get_window_extent().extents),
        marks=axes.transData.transform(on_plane),
        radii=np.sqrt(areas / np.pi) * dot,
        worth=np.where(np.isin(np.arange(len(points)), order[:max_labels]), np.inf, 3.0),
        dot=dot,
    )
    labelled = []
    for i in order[: 5 * max_labels]:
        if len(labelled) == max_labels:
            break
        width = renderer.get_text_width_height_descent(labels[i], font, ismath=False)[0]
        place = room.take(i, np.array([width + 4 * dot, LINE_HEIGHT * dot]))
        if place is None:
            continue
        offset, has_leader = place
        labelled.append(i)
        axes.annotate(
            labels[i], on_plane[i], offset / dot,
            textcoords="offset points", ha="center", va="center", font=font, parse_math=False,
            arrowprops=LEADER if has_leader else None,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
    if len(labelled) < len(points):
        axes.scatter(*on_plane[labelled].T, 6, "black", linewidths=0)


@dataclass
class _Room:
    """Where labels can still go; all lengths in pixels."""

    frame: np.ndarray  # (4,): left, bottom, right, top
    marks: np.ndarray  # (n_marks, 2), their middles; leaders are added as rows of small marks
    radii: np.ndarray  # (n_marks,)
    worth: np.ndarray  # (n_marks,), what it costs to cover one
    dot: float
    boxes: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))  # of the labels placed

    def take(self, i: int, size: np.ndarray) -> tuple[np.ndarray, bool] | None:
        """Offset of the label of mark `i` and whether it needs a leader; None where no place is free."""
        lowest_cost, offset, leader = np.inf, None, None
        for ring, extra in enumerate(RINGS):
            for angle in np.radians([0, 180, 90, 270, 45, 135, 225, 315]):
                direction = np.array([np.cos(angle), np.sin(angle)])
                edge = direction * (self.radii[i] + (1 + extra) * self.dot)
                start = direction * self.radii[i]
                way = self.marks[i] + np.linspace(start, edge, 6 if ring else 0)  # (n_way, 2)
                cost = ring + self._cost(self.marks[i] + edge + direction * size / 2, size, way)
                if cost < lowest_cost:
                    lowest_cost, offset, leader = cost, edge + direction * size / 2, way
        if offset is None:
            return None
        middle = self.marks[i] + offset
        self.boxes = np.vstack([self.boxes, [*(middle - size / 2), *(middle + size / 2)]])
        self.marks = np.vstack([self.marks, leader])
        self.radii = np.append(self.radii, np.ones(len(leader)))
        self.worth = np.append(self.worth, np.full(len(leader), 3))
        return offset, len(leader) > 0

    def _cost(self, middle: np.ndarray, size: np.ndarray, leader: np.ndarray) -> float:
        """Worth of the marks covered, and marks crossed by the leader; infinite where they meet a label."""
        low, high = middle - size / 2, middle + size / 2
        outside = (low < self.frame[:2]).any() or (high > self.frame[2:]).any()
        meets = ((low < self.boxes[:, 2:]) & (self.boxes[:, :2] < high)).all(axis=1).any()
        cut = (self.boxes[:, None, :2] < leader) & (leader < self.boxes[:, None, 2:])
        if outside or meets or cut.all(axis=2).any():
            return np.inf
        nearest = np.clip(self.marks, low, high)  # the point of the label that is nearest to each mark
        covered = np.hypot(*(nearest - self.marks).T) < self.radii
        crossed = sum(np.count_nonzero(np.hypot(*(self.marks - point).T) < self.radii) for point in leader)
        return float(self.worth[covered].sum()) + crossed
