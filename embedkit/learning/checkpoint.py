"""Where a training is, on disk: one file, replaced as a whole, from which the training goes on bit for bit.

The file is safetensors; what is no tensor is JSON in its header. It is written beside the old one, synced and
renamed: whenever the process is killed, one of the two is there.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from embedkit.errors import InputError, OutputError, StoreError, require
from embedkit.learning.learned import Settings
from embedkit.learning.prepare import Preparation
from embedkit.store import sync

FILE = "training.safetensors"
FORMAT = 1
# A checkpoint that takes long to write is written less often: at most this share of the time goes into it.
MAX_SHARE = 0.05
_HASHED_ROWS = 65_536


class Checkpoint:
    """The checkpoint of one training.

    Parameters
    ----------
    directory : path
        Made with the first checkpoint if it is not there.
    fingerprint : dict
        What the training learns from, and how; see `fingerprint_of`.
    seconds : float, default=60.0
        How often to write, at most.

    Raises
    ------
    InputError
        If the directory holds the checkpoint of another training.
    StoreError
        If what it holds is damaged.
    OutputError
        If it cannot be written to.
    """

    def __init__(
        self, directory: str | os.PathLike, fingerprint: Mapping[str, Any], seconds: float = 60.0
    ) -> None:
        if not (isinstance(seconds, Real) and seconds >= 0):
            raise InputError(f"checkpoint_seconds must be a number of at least 0, got {seconds!r}")
        self.path = Path(directory) / FILE
        self.fingerprint, self.seconds = dict(fingerprint), seconds
        self.written, self.took = time.monotonic(), 0.0
        folder = self.path.parent
        existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise OutputError(f"cannot write a checkpoint to {folder}: {existing} is no writable directory")
        if self.path.exists():
            self._check()

    def due(self) -> bool:
        """Whether it is time to write."""
        wait = max(self.seconds, self.took / MAX_SHARE if self.seconds else 0.0)
        return time.monotonic() - self.written >= wait

    def write(self, state: Mapping[str, Any]) -> None:
        """Write a state: dicts, lists and tuples of tensors, numbers, strings and None.

        Raises
        ------
        OutputError
            If there is no room for it.
        """
        began = time.monotonic()
        tensors: dict[str, np.ndarray] = {}
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "state": _flatten(state, tensors)}
        partial = self.path.with_name(f"{FILE}.partial")
        safetensors = require("safetensors", "train")
        save_file = require("safetensors.numpy", "train").save_file
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"embedkit": json.dumps(header)})
            sync(partial)
            os.replace(partial, self.path)
            sync(self.path.parent)
        except (OSError, safetensors.SafetensorError) as error:  # the latter on a full disk, for one
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write a checkpoint to {self.path.parent}: {reason}") from error
        self.written = time.monotonic()
        self.took = self.written - began

    def read(self) -> dict[str, Any] | None:
        """The state written last, on the CPU; None if there is none."""
        if not self.path.exists():
            return None
        header, tensors = self._load(with_tensors=True)
        return _unflatten(header["state"], tensors)

    def _check(self) -> None:
        found = self._load(with_tensors=False)[0]["fingerprint"]
        names = sorted(found.keys() | self.fingerprint.keys())
        own = json.loads(json.dumps(self.fingerprint))
        differing = [name for name in names if found.get(name) != own.get(name)]
        if differing:
            raise InputError(
                f"the checkpoint in {self.path.parent} is of another training, {', '.join(differing)} "
                "differ(s): give the same as then, remove the checkpoint, or name another directory"
            )

    def _load(self, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        safetensors = require("safetensors", "train")
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                header = json.loads(file.metadata()["embedkit"])
                names = file.offset_keys() if with_tensors else ()
                tensors = {name: file.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.path} is damaged ({error}): remove it and start again") from error
        if header.get("format") != FORMAT:
            raise StoreError(f"{self.path} was written by another version of embedkit: remove it")
        return header, tensors


def remove(directory: str | os.PathLike, *, keep_directory: bool = False) -> None:
    """Remove a checkpoint, and its directory if nothing else is in it."""
    directory = Path(directory)
    for name in (FILE, f"{FILE}.partial"):
        (directory / name).unlink(missing_ok=True)
    if not keep_directory:
        with contextlib.suppress(OSError):  # it is not there, or not empty
            directory.rmdir()


def fingerprint_of(preparation: Preparation, settings: Settings) -> dict[str, Any]:
    """What a training learns from, and how: two with the same fingerprint go the same way.

    Parameters
    ----------
    preparation : Preparation
    settings : Settings
    """
    digest = hashlib.sha256()
    for vocabulary in preparation.vocabularies:
        batch = pa.record_batch([vocabulary.categories], names=[vocabulary.feature])
        digest.update(batch.schema.serialize())
        digest.update(batch.serialize())
    plain = [preparation.inputs.to_json(), *(head.to_json() for head in preparation.heads)]
    digest.update(json.dumps(plain, default=str).encode())
    for rows in (preparation.trainer.rows, preparation.watch):
        for batch in () if rows is None else rows.batches(_HASHED_ROWS):
            for part in (batch.codes, batch.numeric, batch.targets, batch.weights):
                digest.update(part.contiguous().cpu().numpy().data)
    values = asdict(settings)
    for name in ("progress", "embedding_dim", "device"):  # the shape of the network says what came of it
        del values[name]
    values["batch_size"] = preparation.trainer.batch_size  # of all processes together
    device = preparation.trainer.rows.device.type
    return {
        "data": digest.hexdigest(),
        "embedding_dim": list(preparation.trainer.network.shape.embedding_dims),
        "device": device,
        **json.loads(json.dumps(values, default=_plain)),
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _flatten(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    """A value as JSON can hold it, its tensors put aside."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = np.ascontiguousarray(value.detach().cpu().numpy())
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _flatten(part, tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flatten(part, tensors) for part in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unflatten(value: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return torch.from_numpy(np.array(tensors[content]))
    if kind == "dict":
        return {key: _unflatten(part, tensors) for key, part in content}
    return (tuple if kind == "tuple" else list)(_unflatten(part, tensors) for part in content)
