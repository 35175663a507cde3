"""Tables as they would be without some of the rows, in the space of the tables learned from all.

With the network held at its optimum, the vector ``e`` of a category without some of its rows is to first
order ::

    e + inv(A - B + Q) g

with ``A`` the curvature of the loss of the category's rows, ``B`` the part of the rows left out, ``g`` the
gradient of that part and ``Q`` the prior (the infinitesimal jackknife, Giordano et al., AISTATS 2019): one
pass over the data for any choice of rows, and no axes to align.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from embedkit.frames import numeric_block
from embedkit.learning.axes import outer
from embedkit.learning.data import Rows
from embedkit.learning.derivatives import PASS_BATCH, Derivatives, add_up, derivatives
from embedkit.learning.learned import Learned, Settings, Task
from embedkit.learning.losses import row_losses
from embedkit.learning.network import build
from embedkit.learning.targets import encode_targets
from embedkit.vocabulary import UNKNOWN, encode_columns

# A category that keeps a smaller share of its rows than this has lost them all.
GONE = 1e-6
SCALES = (1.0, 0.5, 0.25)
HELD_OUT_BATCH = 1 << 16


@dataclass(frozen=True)
class Evidence:
    """What the rows say of the vectors of one table, by cells of rows that stay or leave together.

    Attributes
    ----------
    vectors : tensor of shape (num_embeddings, width)
        Published vectors, learned from all rows.
    counts : tensor of shape (n_cells, num_embeddings)
        Weight of the rows.
    gradients : tensor of shape (n_cells, num_embeddings, width)
        Of their summed loss.
    curvature : tensor of shape (num_embeddings, width, width)
        Of the summed loss of all rows.
    precision : tensor of shape (width, width) or None
        Of the prior. None where nothing of the column is published.
    """

    vectors: torch.Tensor
    counts: torch.Tensor
    gradients: torch.Tensor
    curvature: torch.Tensor
    precision: torch.Tensor | None

    def without(self, excluded: np.ndarray) -> np.ndarray:
        """The table without some cells, float32 of shape (num_embeddings, width).

        Parameters
        ----------
        excluded : bool array of shape (n_cells,)
        """
        result = self.vectors.clone()
        if self.precision is None:
            return result.numpy()
        out = torch.as_tensor(excluded)
        left_out, total = self.counts[out].sum(dim=0), self.counts.sum(dim=0)
        left_out[UNKNOWN] = 0  # rows of all categories were made unknown on purpose and trained its vector
        touched = torch.nonzero(left_out > 0)[:, 0]
        kept = 1 - left_out[touched] / total[touched]
        # Rows of one category are taken as equally curved.
        bread = self.curvature[touched].double() * kept[:, None, None] + self.precision
        gradient = self.gradients[out][:, touched].sum(dim=0).double()
        solved, singular = torch.linalg.solve_ex(bread, gradient[:, :, None])
        steps, singular = solved[:, :, 0].float(), singular > 0
        if singular.any():  # without a prior, or on axes that the network does not look at
            least = torch.linalg.pinv(bread[singular], hermitian=True) @ gradient[singular][:, :, None]
            steps[singular] = least[:, :, 0].float()
        # Losing rows cannot take a vector further than the rows have brought it.
        reach = (result[touched] - result[UNKNOWN]).norm(dim=1)
        steps *= (reach / steps.norm(dim=1).clamp(min=torch.finfo().tiny)).clamp(max=1)[:, None]
        result[touched] += steps
        result[touched[kept <= GONE]] = self.vectors[UNKNOWN]
        return result.numpy()


def coded_rows(learned: Learned, task: Task) -> Rows:
    """Rows of a table as the network sees them, in their own order."""
    table = task.table
    weights = np.ones(table.num_rows) if task.sample_weight is None else task.sample_weight
    codes = encode_columns([part.vocabulary for part in learned.tables], table)
    encoded = encode_targets(learned.heads, task.targets, weights > 0)
    numeric = learned.inputs.transform(numeric_block(table, learned.inputs.features))
    parts = (codes, numeric.astype(np.float32), encoded, weights.astype(np.float32))
    return Rows(*map(torch.as_tensor, parts))


def gather_evidence(
    learned: Learned, rows: Rows, cells: np.ndarray, n_cells: int, seed: int
) -> list[Evidence]:
    """One pass over the rows that were learned from.

    Parameters
    ----------
    learned : Learned
    rows : Rows
    cells : int array of shape (n_rows,)
        Cell of each row, from 0 to under `n_cells`.
    seed : int
        Of the draws that estimate the curvature where a target has several classes.

    Returns
    -------
    list of Evidence
        One per table.
    """
    network = build(learned.shape, learned.weights).float()
    inverses = [_inverse(part.rotation) for part in learned.projections]
    noise, place = torch.tensor(learned.noise), torch.as_tensor(cells.astype(np.int64))
    result = [
        _no_evidence(torch.tensor(table.learned_vectors), n_cells, inverse, part.precision)
        for table, inverse, part in zip(learned.tables, inverses, learned.projections, strict=True)
    ]
    places = iter(place.split(PASS_BATCH))

    def add(batch: Rows, parts: list[Derivatives]) -> None:
        cell = next(places)
        for i, (evidence, part) in enumerate(zip(result, parts, strict=True)):
            codes = batch.codes[:, i].long()
            slots = cell * len(evidence.vectors) + codes
            evidence.counts.view(-1).index_add_(0, slots, batch.weights)
            gradient = part.gradient * batch.weights.sqrt()[:, None]
            evidence.gradients.flatten(0, 1).index_add_(0, slots, gradient)
            for root in part.roots:
                evidence.curvature.flatten(1).index_add_(0, codes, outer(root))

    generator = torch.Generator().manual_seed(seed)
    add_up(derivatives(network, learned.heads, rows, inverses, noise, generator), add, rows.device)
    return result


def _inverse(rotation: np.ndarray) -> torch.Tensor:
    """From published vectors to those of the network's table; axes of zeros lead nowhere."""
    return torch.as_tensor(np.linalg.pinv(rotation) * rotation.any(axis=0)[:, None])


def _no_evidence(vectors: torch.Tensor, n_cells: int, inverse: torch.Tensor, precision: float) -> Evidence:
    rows, width = vectors.shape
    return Evidence(
        vectors,
        torch.zeros(n_cells, rows),
        torch.zeros(n_cells, rows, width),
        torch.zeros(rows, width, width),
        precision * inverse @ inverse.T if inverse.any() else None,
    )


def find_useless(learned: Learned, rows: Rows, features: Collection[str]) -> list[str]:
    """Those of some columns whose vectors do not improve what the network predicts for rows it has not seen.

    A table that was learned too eagerly may help only if taken with caution, so fractions of its vectors are
    tried too; none of them helps where the loss does not fall by more than one standard error.

    Parameters
    ----------
    learned : Learned
    rows : Rows
        That it was not learned from.
    features : collection of str
        The columns in question.
    """
    network = build(learned.shape, learned.weights).float()
    noise = torch.tensor(learned.noise)
    share = rows.weights / rows.weights.sum()

    def losses(column: int, scale: float) -> torch.Tensor:
        center = torch.as_tensor(learned.projections[column].center, dtype=torch.float32)
        found = []
        for batch in rows.batches(HELD_OUT_BATCH):
            parts = list(network.lookup(batch.codes).split(learned.shape.embedding_dims, dim=1))
            parts[column] = center + scale * (parts[column] - center)
            outputs = network(torch.cat(parts, dim=1), batch.numeric)
            found.append(row_losses(learned.heads, outputs, batch.targets, noise))
        return torch.cat(found)

    def helps(column: int, scale: float) -> bool:
        gain = without - losses(column, scale)
        mean = gain @ share
        return bool(mean > ((gain - mean).square() @ share.square()).sqrt())

    found = []
    with torch.no_grad():
        for i, table in enumerate(learned.tables):
            if table.feature in features:
                without = losses(i, 0.0)
                if not any(helps(i, scale) for scale in SCALES):
                    found.append(table.feature)
    return found


def silence(learned: Learned, features: Sequence[str], settings: Settings) -> Learned:
    """Publish zeros for some columns, as many as the user chose, or one; the network keeps what it has."""
    tables, projections = [], []
    for table, projection in zip(learned.tables, learned.projections, strict=True):
        if table.feature in features:
            width = None if settings.width_is_chosen(table.feature) else 1
            table = replace(table, vectors=np.zeros_like(table.vectors[:, :width]), ranked=False)
            projection = replace(projection, rotation=np.zeros_like(projection.rotation[:, :width]))
        tables.append(table)
        projections.append(projection)
    return replace(learned, tables=tuple(tables), projections=tuple(projections))


def alignment_residual(full: np.ndarray, without: np.ndarray) -> float:
    """How far vectors without a row's own fold lie from the full ones, relative to the spread of these.

    Parameters
    ----------
    full, without : array of shape (n_rows, width)

    Returns
    -------
    float
        Root of the mean squared distance over that of the full vectors from their mean; 0 without a spread.
    """
    spread = np.square(full - full.mean(axis=0), dtype=np.float64).sum()
    moved = np.square(without - full, dtype=np.float64).sum()
    return float(np.sqrt(moved / spread)) if spread > 0 else 0.0
