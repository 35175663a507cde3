"""The models that encodings are judged by, with the settings that all encodings share."""

from typing import Any

import numpy as np

from embedkit.errors import InputError, require

MODELS = ("knn", "forest", "lightgbm")


def make_model(
    name: str, kind: str, *, scale: bool = True, random_state: int = 0, n_jobs: int | None = None
) -> Any:
    """A model with the settings that all encodings share.

    KNN with 20 neighbours weighted by inverse distance (on standardised columns if `scale`), a forest of 100
    trees, LightGBM with 400 trees of 31 leaves at rate 0.05; all else at the libraries' defaults.
    """
    regression = kind == "regression"
    if name == "knn":
        from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        neighbors = KNeighborsRegressor if regression else KNeighborsClassifier
        model = neighbors(20, weights="distance", n_jobs=n_jobs)
        return make_pipeline(StandardScaler(with_mean=False), model) if scale else model
    if name == "forest":
        from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

        forest = RandomForestRegressor if regression else RandomForestClassifier
        return forest(100, n_jobs=n_jobs, random_state=random_state)
    if name == "lightgbm":
        lightgbm = require("lightgbm", "train")
        boosting = lightgbm.LGBMRegressor if regression else lightgbm.LGBMClassifier
        return boosting(
            n_estimators=400, learning_rate=0.05, random_state=random_state, n_jobs=n_jobs, verbose=-1
        )
    raise InputError(f"model must be one of {', '.join(MODELS)}, got {name!r}")


def macro_auc(y: np.ndarray, probabilities: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the classes of the area under the ROC curve of each against the rest.

    A class with no row has no such area and is left out. One that the model does not know counts one half.
    Two classes have the same area each.

    Parameters
    ----------
    y : ndarray of shape (n_rows,)
        Labels.
    probabilities : ndarray of shape (n_rows, n_classes)
    classes : ndarray of shape (n_classes,)
        Labels of the columns of `probabilities`.

    Raises
    ------
    InputError
        If all rows are of one class.
    """
    from sklearn.metrics import roc_auc_score

    columns = dict(zip(classes, probabilities.T, strict=True))
    present = np.unique(y)
    if len(present) < 2:
        raise InputError(
            f"all {len(y)} rows to be judged on are of class {str(present[0])!r}: give more rows"
        )
    areas = [roc_auc_score(y == label, columns[label]) if label in columns else 0.5 for label in present]
    return float(np.mean(areas[-1:] if len(classes) == len(present) == 2 else areas))
