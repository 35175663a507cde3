"""Typed errors: each says in one line what was found, what was expected and what to do."""

import difflib
import importlib
from collections import Counter
from collections.abc import Iterable
from types import ModuleType


class EmbedkitError(Exception):
    """Base class of every error that embedkit raises on purpose."""


class InputError(EmbedkitError, ValueError):
    """The data or the settings given by the caller cannot be used."""


class StoreError(EmbedkitError, ValueError):
    """A stored set is damaged, or was written in a format that this version cannot read."""


class StoreNotFoundError(FileNotFoundError, StoreError):  # its __new__ must be that of OSError
    """There is no stored set, no such version of it, or no such file in it."""


class OutputError(EmbedkitError, OSError):
    """A result cannot be written."""


class MissingExtraError(EmbedkitError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Parameters
    ----------
    module : str
        Name of the module, as in an import statement.
    extra : str
        The extra of embedkit that installs it.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    MissingExtraError
        If it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A module that is there but lacks a dependency of its own needs another cure than the extra.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(missing_extra(package, extra)) from error


def missing_extra(package: str, extra: str) -> str:
    """What to do where a package is not installed."""
    return f'{package} is not installed; in the folder of embedkit: pip install ".[{extra}]"'


def first_line(error: BaseException) -> str:
    """What an error says, without what follows its first line."""
    return (str(error) or type(error).__name__).partition("\n")[0]


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def did_you_mean(names: Iterable[str], candidates: Iterable[str]) -> str:
    """Hint at the candidates that resemble the given names: ``" (did you mean 'Store'?)"``, or ``""``."""
    candidates = list(candidates)
    near = [match for name in names for match in difflib.get_close_matches(name, candidates, n=2)]
    if not near:
        return ""
    return f" (did you mean {', '.join(repr(name) for name in dict.fromkeys(near))}?)"
