"""Settings of a batch job from a file."""

import inspect
import os
import tomllib
from typing import Any

from embedkit.errors import InputError, did_you_mean
from embedkit.serving.batch import transform_dataset


def load_job(path: str | os.PathLike) -> dict[str, Any]:
    """Read the settings of a batch job from a TOML file.

    Parameters
    ----------
    path : path
        Keys are the parameters of `transform_dataset`; any of them may be left out, no other may be there.
        Paths are relative to the working directory, as on the command line.

    Returns
    -------
    dict
        Keyword arguments for `transform_dataset`.

    Raises
    ------
    InputError
        If the file cannot be read, or has an unknown key.
    """
    try:
        with open(path, "rb") as file:
            settings = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)} cannot be read as TOML: {error}") from error
    known = list(inspect.signature(transform_dataset).parameters)
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise InputError(
            f"{os.fspath(path)} has unknown key(s) {unknown}{did_you_mean(unknown, known)}: "
            f"expected some of {known}"
        )
    return settings
