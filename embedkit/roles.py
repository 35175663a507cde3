"""Which columns of a table are categories, and which are numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embedkit.errors import InputError, did_you_mean
from embedkit.frames import type_family


@dataclass(frozen=True)
class Roles:
    """What each column is for.

    Attributes
    ----------
    categorical : tuple of str
        Columns whose values get a vector, in the order of the table.
    numeric : tuple of str
        Columns that enter as numbers, in the order of the table.
    """

    categorical: tuple[str, ...]
    numeric: tuple[str, ...]


def column_roles(table: pa.Table, categorical_features: str | Sequence[str] = "from_dtype") -> Roles:
    """Decide which columns are categories and which are numbers.

    Parameters
    ----------
    table : pa.Table
        The data, from `to_table`.
    categorical_features : "from_dtype" or sequence of str
        Columns to take as categorical beside those that can be nothing else. From their type, strings,
        dictionaries (pandas or polars category) and booleans are categorical; integers, floats and decimals
        are numeric. Integer ids and dates have to be named here.

    Returns
    -------
    Roles

    Raises
    ------
    InputError
        If a named column does not exist, a date is not named, or a column is nested.
    """
    if isinstance(categorical_features, str):
        if categorical_features != "from_dtype":
            raise InputError(
                f"categorical_features must be 'from_dtype' or a list of names, got {categorical_features=}"
            )
        categorical_features = ()
    if not np.iterable(categorical_features):
        raise InputError(
            f"categorical_features must be 'from_dtype' or a list of names, got {categorical_features=}"
        )
    categorical_features = tuple(categorical_features)
    missing = [name for name in categorical_features if name not in table.column_names]
    if missing:
        hint = did_you_mean(map(str, missing), table.column_names)
        raise InputError(f"categorical_features names {missing}, which the data does not have{hint}")
    categorical, numeric = [], []
    for field in table.schema:
        family = type_family(field.type)
        if family == "other":
            raise InputError(
                f"column {field.name!r} holds {field.type}: a category argument must be a string "
                "or a number; turn its cells into strings or drop it"
            )
        if family == "number" and not pa.types.is_dictionary(field.type):
            (categorical if field.name in categorical_features else numeric).append(field.name)
        elif family != "time" or pa.types.is_dictionary(field.type) or field.name in categorical_features:
            categorical.append(field.name)
        else:
            raise InputError(
                f"column {field.name!r} is {field.type}, neither category nor number: "
                "name it in categorical_features or drop it"
            )
    return Roles(tuple(categorical), tuple(numeric))


def choose_roles(table: pa.Table, categorical_features: str | Sequence[str], *, typed: bool) -> Roles:
    """The roles to learn by: as `column_roles`, but "from_dtype" takes columns without types as categorical.

    Parameters
    ----------
    table : pa.Table
    categorical_features : "from_dtype" or sequence of str
    typed : bool
        Whether the types of the columns say what they are; those of an array do not.

    Raises
    ------
    InputError
        If no column is categorical, or as `column_roles` does.
    """
    if not typed and isinstance(categorical_features, str) and categorical_features == "from_dtype":
        categorical_features = table.column_names
    roles = column_roles(table, categorical_features)
    if not roles.categorical:
        raise InputError(
            f"no categorical column among {table.column_names}: "
            "name integer ids and dates in categorical_features"
        )
    return roles
