"""A fitted estimator in a stored set: the network's weights and what it takes to predict with them."""

import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedkit import store
from embedkit.errors import StoreError, require
from embedkit.learning.learned import History, Learned, NetworkShape, Projection
from embedkit.learning.numeric import NumericInputs
from embedkit.learning.targets import Head
from embedkit.tables import EmbeddingSet

if TYPE_CHECKING:
    from embedkit.base import EntityEmbeddingBase

Estimator = TypeVar("Estimator", bound="EntityEmbeddingBase")

WEIGHTS = "network.safetensors"
PROJECTION = "projections."  # starts the names, in that file, of the maps from tables to published vectors
HISTORY = "report/history.parquet"
LR_FINDER = "report/lr_finder.parquet"
_LIBRARIES = ("torch", "numpy", "pyarrow", "scikit-learn")


def metadata(estimator: "EntityEmbeddingBase") -> dict[str, Any]:
    """What the manifest says of a fitted estimator, as JSON can hold it."""
    learned: Learned = estimator._learned
    content = {
        "estimator": type(estimator).__name__,
        "parameters": {
            name: value for name, value in estimator.get_params(deep=False).items() if _is_storable(value)
        },
        "feature_names_in": list(estimator._input_names()),
        "from_names": hasattr(estimator, "feature_names_in_"),
        "single_target": estimator._single,
        "heads": [head.to_json() for head in learned.heads],
        "numeric_inputs": learned.inputs.to_json(),
        "network": learned.shape.to_json(),
        "axes": {
            feature: {name: np.round(values, 6).tolist() for name, values in axes.items()}
            for feature, axes in learned.axes.items()
        },
        "prior_precisions": [projection.precision for projection in learned.projections],
        "noise": list(learned.noise),
        "max_lr": learned.max_lr,
        "cross_fit": learned.cross_fit,
        "history": learned.history.epochs,
        "best_epoch": learned.history.best_epoch,
        "restarts": learned.history.restarts,
        "library_versions": {
            "embedkit": importlib.metadata.version("embedkit"),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }
    return _plain(content)


def embedding_set(estimator: "EntityEmbeddingBase") -> EmbeddingSet:
    """What a fitted estimator transforms with."""
    learned: Learned = estimator._learned
    features = {part.feature for part in (*learned.tables, *learned.numerics)}
    return EmbeddingSet(
        learned.tables,
        learned.numerics,
        metadata(estimator),
        features_in=[name for name in estimator._input_names() if name in features],
        crosses=learned.crosses,
    )


def save_once(estimator: "EntityEmbeddingBase", path: str | os.PathLike) -> str:
    """`save`, by the first of the processes that learned together; the others wait until it is done."""
    version = [save(estimator, path) if is_writer() else None]
    if distributed := _group():
        distributed.broadcast_object_list(version)
    return version[0]


def is_writer() -> bool:
    """Whether this process is the first of those that learned together, or by itself."""
    distributed = _group()
    return distributed is None or distributed.get_rank() == 0


def _group() -> Any:
    """torch.distributed, where processes learn together."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def save(estimator: "EntityEmbeddingBase", path: str | os.PathLike) -> str:
    """Publish a fitted estimator as a new version of a stored set; the version's name."""
    numpy_format = require("safetensors.numpy", "train")
    learned: Learned = estimator._learned
    attachments = {
        WEIGHTS: numpy_format.save({**learned.weights, **_as_tensors(learned.projections)}),
        HISTORY: _parquet(pa.Table.from_pylist(learned.history.epochs)),
    }
    if learned.lr_finder is not None:
        finder = learned.lr_finder
        columns = {"lr": finder.lrs, "loss": finder.losses, "smoothed_loss": finder.smoothed_losses}
        if finder.accuracies is not None:
            columns["accuracy"] = finder.accuracies
        attachments[LR_FINDER] = _parquet(pa.table(columns))
    return store.publish(path, estimator.embeddings_, attachments=attachments)


def load(kind: type[Estimator], path: str | os.PathLike, version: str | None = None) -> Estimator:
    """Load an estimator of a kind from a stored set that `save` wrote.

    Raises
    ------
    StoreError
        If the set holds no estimator, or one of another kind, or is damaged.
    """
    numpy_format = require("safetensors.numpy", "train")
    if version is None:
        version = store.current_version(path)
    embeddings = store.load(path, version)
    content = embeddings.metadata
    if content.get("estimator") != kind.__name__:
        found = content.get("estimator", "embeddings only")
        raise StoreError(f"{os.fspath(path)} holds {found}, not {kind.__name__}: load it as what it is")
    parameters = content["parameters"]
    estimator = kind(**parameters)
    names = content["feature_names_in"]
    estimator.n_features_in_ = len(names)
    if content["from_names"]:
        estimator.feature_names_in_ = np.array(names, dtype=object)
    estimator._single = content["single_target"]
    tensors = numpy_format.load(store.read_attachment(path, WEIGHTS, version))
    estimator._learned = Learned(
        tables=tuple(embeddings.values()),
        numerics=embeddings.numerics,
        heads=tuple(Head.from_json(head) for head in content["heads"]),
        inputs=NumericInputs.from_json(content["numeric_inputs"]),
        shape=NetworkShape.from_json(content["network"]),
        weights={name: array for name, array in tensors.items() if not name.startswith(PROJECTION)},
        axes={
            feature: {name: np.array(values) for name, values in axes.items()}
            for feature, axes in content["axes"].items()
        },
        projections=tuple(
            Projection(tensors[f"{PROJECTION}{i}.center"], tensors[f"{PROJECTION}{i}.rotation"], precision)
            for i, precision in enumerate(content["prior_precisions"])
        ),
        noise=tuple(content["noise"]),
        history=History(content["history"], [], content["best_epoch"], content["restarts"]),
        lr_finder=None,
        max_lr=content["max_lr"],
        cross_fit=content.get("cross_fit"),
        crosses=embeddings.crosses,
    )
    estimator._publish(embeddings)
    return estimator


def _as_tensors(projections: Sequence[Projection]) -> dict[str, np.ndarray]:
    tensors = {}
    for i, projection in enumerate(projections):
        tensors[f"{PROJECTION}{i}.center"] = np.ascontiguousarray(projection.center)
        tensors[f"{PROJECTION}{i}.rotation"] = np.ascontiguousarray(projection.rotation)
    return tensors


def _is_storable(value: Any) -> bool:
    """Whether JSON can hold a parameter: no callable, no splitter, nor anything that has one in it."""
    try:
        json.dumps(_plain(value))
    except TypeError:
        return False
    return True


def _plain(value: Any) -> Any:
    """A parameter as JSON can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):  # in no order, which would differ from run to run
        return sorted(_plain(item) for item in value)
    if np.iterable(value) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
