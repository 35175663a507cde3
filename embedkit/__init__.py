"""Entity embeddings for tabular data: learn once with torch, use everywhere without it."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that `import embedkit` costs next to nothing and never imports torch.
_PUBLIC = {
    "EmbedkitError": "errors",
    "EmbeddingSet": "tables",
    "EmbeddingTable": "tables",
    "EntityEmbeddingClassifier": "predictors",
    "EntityEmbeddingEncoder": "encoder",
    "EntityEmbeddingRegressor": "predictors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "OutputError": "errors",
    "PretrainedEmbeddingEncoder": "encoder",
    "StoreError": "errors",
    "StoreNotFoundError": "errors",
    "drift": "changes",
    "evaluate": "evaluation",
    "transform_dataset": "serving.batch",
    "verify": "store",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
