"""From a table to a trainer: vocabularies, codes, network and optimizers, ready for the first step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch

from embedkit.errors import InputError
from embedkit.frames import numeric_block
from embedkit.learning.data import Rows, hold_out, make_rows
from embedkit.learning.group import Group, join_group
from embedkit.learning.learned import NetworkShape, Settings, Task
from embedkit.learning.network import EntityEmbeddingNetwork, embedding_dims
from embedkit.learning.numeric import NumericInputs
from embedkit.learning.streaming import Stream, scan_columns, store_rows
from embedkit.learning.targets import Head, encode_targets
from embedkit.learning.training import Trainer
from embedkit.vocabulary import UNKNOWN, Vocabulary, encode_columns

# Rows of a stream that take less than this share of a GPU's free memory, twice in an epoch, stay there.
GPU_SHARE = 0.3


@dataclass(frozen=True)
class Preparation:
    """A trainer and what was decided on the way to it."""

    vocabularies: tuple[Vocabulary, ...]
    inputs: NumericInputs
    heads: tuple[Head, ...]
    counts: tuple[np.ndarray, ...]
    priors: tuple[float, ...]
    trainer: Trainer
    watch: Rows | None
    generator: torch.Generator


@dataclass(frozen=True)
class Coded:
    """What rows hold, and the rows in codes.

    Attributes
    ----------
    vocabularies : tuple of Vocabulary
    inputs : NumericInputs
    total : float
        Weight of all rows.
    rows : Rows
        To learn from.
    watch : Rows or None
        Held out.
    """

    vocabularies: tuple[Vocabulary, ...]
    inputs: NumericInputs
    total: float
    rows: Rows
    watch: Rows | None


def prepare(task: Task) -> Preparation:
    """Vocabularies, codes, network and optimizers, ready for the first step."""
    generator = torch.Generator().manual_seed(task.settings.seed)
    group = join_group(task.settings.device)
    device = choose_device(task.settings.device)
    code = _code_stream if isinstance(task.table, Stream) else _code_table
    return _assemble(task, code(task, device, generator), device, generator, group)


def _code_table(task: Task, device: torch.device, generator: torch.Generator) -> Coded:
    table, roles, settings = task.table, task.roles, task.settings
    weights = np.ones(table.num_rows) if task.sample_weight is None else task.sample_weight
    vocabularies = tuple(
        Vocabulary.fit(
            table[name],
            name,
            min_frequency=settings.min_frequency,
            max_categories=settings.max_categories,
            sample_weight=task.sample_weight,
        )
        for name in roles.categorical
    )
    codes = encode_columns(vocabularies, table)
    block = numeric_block(table, roles.numeric)
    inputs = NumericInputs.fit(block, roles.numeric, weights)
    targets = encode_targets(task.heads, task.targets, weights > 0)
    rows, watch = make_rows(codes, inputs.transform(block), targets, weights).to(device), None
    if settings.early_stopping:
        rows, watch = hold_out(rows, settings.validation_fraction, generator)
    return Coded(vocabularies, inputs, float(weights.sum()), rows.repeated(), watch)


def _code_stream(task: Task, device: torch.device, generator: torch.Generator) -> Coded:
    settings = task.settings
    vocabularies, inputs, total = scan_columns(task.table, task.roles, settings)
    held_out = settings.validation_fraction if settings.early_stopping else 0.0
    rows, watch = store_rows(task.table, vocabularies, inputs, task.heads, device, held_out, generator)
    if device.type == "cuda" and len(rows) * rows.row_bytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        rows = rows.take(slice(None))  # all of it at once: from here on it is like any table
    return Coded(vocabularies, inputs, total, rows, watch)


def _assemble(
    task: Task, coded: Coded, device: torch.device, generator: torch.Generator, group: Group | None
) -> Preparation:
    settings, heads, features = task.settings, task.heads, task.roles.categorical
    vocabularies, inputs, total, rows = coded.vocabularies, coded.inputs, coded.total, coded.rows
    if group is not None:
        group.check_same(len(rows), "the number of rows")
    sizes = [vocabulary.num_embeddings for vocabulary in vocabularies]
    shape = NetworkShape(
        num_embeddings=tuple(sizes),
        embedding_dims=embedding_dims(features, sizes, settings.embedding_dim),
        n_numeric=inputs.width,
        hidden_layer_sizes=tuple(settings.hidden_layer_sizes),
        n_outputs=sum(head.n_outputs for head in heads),
    )
    _check_names(features, shape.embedding_dims, inputs, settings)
    network = EntityEmbeddingNetwork(shape, settings.dropout, settings.embedding_dropout).to(device)
    priors = tuple(float(settings.shrinkage) * vocabulary.cardinality / total for vocabulary in vocabularies)
    trainer = Trainer(
        network,
        heads,
        rows,
        priors=priors,
        batch_size=choose_batch_size(settings.batch_size, len(rows), 1 if group is None else group.size),
        weight_decay=settings.weight_decay,
        unknown_fraction=settings.unknown_fraction,
        precision=settings.precision,
        generator=generator,
        group=group,
    )
    counts = tuple(_trained_counts(vocabulary, total, settings) for vocabulary in vocabularies)
    return Preparation(vocabularies, inputs, heads, counts, priors, trainer, coded.watch, generator)


def _check_names(
    features: Sequence[str], widths: Sequence[int], inputs: NumericInputs, settings: Settings
) -> None:
    """Raise InputError, before any training, where a numeric column has the name of another one's output."""
    if settings.numeric == "drop":
        return
    outputs = {}
    for feature, width in zip(features, widths, strict=True):
        most = len(str(width - 1))
        # How many axes come out, and so how many digits they are told apart by, is known after the training.
        for digits in [most] if settings.width_is_chosen(feature) else range(1, most + 1):
            axes = range(min(width, 10**digits))
            outputs |= {f"{feature}_{i:0{digits}}": feature for i in axes}
    if settings.numeric == "scale":
        flagged = compress(inputs.features, inputs.flagged)
        outputs |= {f"{feature}_missing": feature for feature in flagged}
    for name in inputs.features:
        if name in outputs:
            raise InputError(
                f"column {name!r} has a name that is also that of an output of column {outputs[name]!r}, and "
                "names of outputs must be unique: rename one of them"
            )


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU where there is one."""
    try:
        if not isinstance(device, (str, torch.device)):
            raise TypeError  # torch takes a number for a GPU
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {device!r} was asked for, but torch finds no GPU: use 'auto' or 'cpu'")
        torch.zeros(1, device=chosen).item()  # torch knows names of devices that are not there
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"device must be 'auto' or a torch device such as 'cpu', got {device!r}") from error
    return chosen


def choose_batch_size(batch_size: int | str, n_rows: int, n_processes: int = 1) -> int:
    """Rows a step of all processes together, a number of them for each.

    "auto" is a power of two that makes 128 to 256 steps an epoch, within 32 and 1,024.
    """
    if batch_size == "auto":
        wanted = int(np.clip(2 ** int(math.log2(max(n_rows / 128, 1))), 32, 1024))
    else:
        wanted = int(batch_size) * n_processes
    if n_processes == 1:
        return wanted
    return max(min(wanted, n_rows) // n_processes, 1) * n_processes


def _trained_counts(vocabulary: Vocabulary, total: float, settings: Settings) -> np.ndarray:
    """Counts of the vocabulary, where unknown also counts the values that are replaced by it in an epoch."""
    counts = vocabulary.counts.astype(np.float64)
    replaced = settings.unknown_fraction * total
    counts[UNKNOWN] += round(replaced) if replaced >= 1 else replaced  # few, or light, rows count too
    whole = vocabulary.counts.dtype == np.int64
    return np.ceil(counts).astype(np.int64) if whole else counts
