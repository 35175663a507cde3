"""Settings of a batch job from a file."""

import inspect
import os
import tomllib
from typing import Any, get_args, get_origin

from embedkit.errors import InputError, did_you_mean
from embedkit.serving.batch import transform_dataset


def load_job(path: str | os.PathLike) -> dict[str, Any]:
    """Read the settings of a batch job from a TOML file.

    Parameters
    ----------
    path : path
        Keys are the parameters of `transform_dataset`, and `quiet`, which the command line has beside them;
        any of them may be left out, no other may be there. Paths are relative to the working directory, as
        on the command line.

    Returns
    -------
    dict
        Keyword arguments for `transform_dataset`, and `quiet` if it is there.

    Raises
    ------
    InputError
        If the file cannot be read, has an unknown key, or a value of the wrong type.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            settings = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read as TOML: {error}") from error
    parameters = inspect.signature(transform_dataset).parameters
    kinds = {key: parameter.annotation for key, parameter in parameters.items()} | {"quiet": bool}
    unknown = [key for key in settings if key not in kinds]
    if unknown:
        hint = did_you_mean(unknown, kinds)
        raise InputError(f"{name} has unknown key(s) {unknown}{hint}: expected some of {list(kinds)}")
    for key, value in settings.items():
        if not _fits(value, kinds[key]):
            raise InputError(
                f"{name}: {key} must be {inspect.formatannotation(kinds[key])}, got {value!r}: "
                "text is in quotes, true and false are not"
            )
    places = ("store", "input", "output")
    return {key: os.path.expanduser(value) if key in places else value for key, value in settings.items()}


def _fits(value: Any, annotation: Any) -> bool:
    kinds = [get_origin(kind) or kind for kind in get_args(annotation) or (annotation,)]
    if isinstance(value, bool):  # which Python takes for a whole number
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))
