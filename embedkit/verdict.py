"""What a comparison over folds says: by how much embeddings are better, how sure that is, and what to do."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from embedkit.comparison import OURS

# A difference is taken for real from this probability on.
SURE = 0.95
ENCODING_NAMES = {
    "ordinal": "ordinal codes",
    "onehot": "one-hot",
    "target": "target encoding",
    "native": "native categories",
    "embedkit": "embeddings",
    "embedkit+native": "embeddings + native categories",
}
MODEL_NAMES = {
    "knn": "KNN",
    "forest": "Random Forest",
    "lightgbm": "LightGBM",
    "network": "the network itself",
}


@dataclass(frozen=True)
class Verdict:
    """Embeddings against the best other encoding, under one model or over all of them.

    Attributes
    ----------
    subject : str
        Name of the model, or "All models".
    ours, rival : str
        What is compared: encodings, or models on encodings.
    score, rival_score : float
        Their mean over the folds.
    difference, error : float
        Mean difference over the folds, paired, and its standard error.
    probability : float
        That embeddings are better.
    """

    subject: str
    ours: str
    rival: str
    score: float
    rival_score: float
    difference: float
    error: float
    probability: float

    @property
    def outcome(self) -> str:
        """ "better", "worse", or "open" where neither is sure."""
        if self.probability >= SURE:
            return "better"
        return "worse" if self.probability <= 1 - SURE else "open"

    def __str__(self) -> str:
        numbers = (
            f"{self.score:.4f} against {self.rival_score:.4f}, {self.difference:+.4f} ± {self.error:.4f}"
        )
        if self.outcome == "better":
            return f"{self.subject}: {self.ours} beat {self.rival}, {numbers} ({self.probability:.1%} sure)"
        if self.outcome == "worse":
            return (
                f"{self.subject}: {self.rival} beat {self.ours}, {numbers} ({1 - self.probability:.1%} sure)"
            )
        return (
            f"{self.subject}: too close to call between {self.ours} and {self.rival}, {numbers} "
            f"({self.probability:.0%} for {self.ours})"
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    scores : DataFrame
        One row per fold, encoding and model: columns ``fold, n_train, n_test`` and those of
        `embedkit.comparison.compare`.
    """

    scores: pd.DataFrame

    @property
    def metric(self) -> str:
        """What the scores are: "R2", "AUC" or "macro AUC" (one class against the rest); higher is better."""
        return self.scores["metric"].iloc[0]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Mean and spread over the folds of each model and encoding, and what embeddings gain over it.

        Columns ``model, encoding, score, spread`` (standard deviation), ``gain`` (of embeddings under that
        model, the mean of paired differences), ``error`` (of the gain), ``probability`` (that it is one),
        ``n_columns``, ``seconds`` (encoding and model).
        """
        records = []
        for (model, encoding), rows in self.scores.groupby(["model", "encoding"], sort=False):
            gain = error = probability = np.nan
            if encoding != "embedkit":
                gain, error, probability = self._difference((model, "embedkit"), (model, encoding))
            times = rows[["fit_seconds", "transform_seconds", "model_seconds"]].sum(axis=1)
            records.append(
                {
                    "model": model,
                    "encoding": encoding,
                    "score": rows["score"].mean(),
                    "spread": rows["score"].std(ddof=1),
                    "gain": gain,
                    "error": error,
                    "probability": probability,
                    "n_columns": rows["n_columns"].mean(),
                    "seconds": times.mean(),
                }
            )
        return pd.DataFrame(records)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Per model, embeddings against the best other encoding; then the best of all of either."""
        found = []
        ours = self.summary["encoding"].isin(OURS)
        for model in self.summary.loc[~ours, "model"].unique():
            under = self.summary["model"] == model
            found.append(
                self._verdict(MODEL_NAMES[model], self.summary[under & ours], self.summary[under & ~ours])
            )
        return [*found, self._verdict("All models", self.summary[ours], self.summary[~ours])]

    @property
    def advice(self) -> str:
        """What to do, in a sentence."""
        *models, overall = self.verdicts
        helped = [verdict.subject for verdict in models if verdict.outcome == "better"]
        if overall.outcome == "better":
            return f"Use embeddings here: {overall.ours} is best of all."
        alone = {
            "worse": f"{overall.rival} is best of all",
            "open": f"nothing proves them better than {overall.rival}",
        }[overall.outcome]
        if helped:
            return f"Use embeddings for {' and '.join(helped)} only: over all models, {alone}."
        return f"Don't use embeddings here: {alone}."

    def __str__(self) -> str:
        wide = self.summary.assign(
            cell=[f"{s:.4f} ± {d:.4f}" for s, d in self.summary[["score", "spread"]].to_numpy()]
        ).pivot(index="model", columns="encoding", values="cell")
        wide = wide.reindex([name for name in MODEL_NAMES if name in wide.index])
        wide = wide[[name for name in ENCODING_NAMES if name in wide.columns]].fillna("")
        wide = wide.rename(index=MODEL_NAMES, columns=ENCODING_NAMES).rename_axis(index=None, columns=None)
        folds = self.scores["fold"].nunique()
        lines = [
            f"{self.metric}, mean ± standard deviation over {folds} folds; higher is better",
            "",
            wide.to_string(),
            "",
            *map(str, self.verdicts),
            "",
            self.advice,
        ]
        return "\n".join(lines)

    def _by_fold(self, model: str, encoding: str) -> np.ndarray:
        rows = self.scores[(self.scores["model"] == model) & (self.scores["encoding"] == encoding)]
        return rows.sort_values("fold")["score"].to_numpy()

    def _difference(self, ours: tuple[str, str], rival: tuple[str, str]) -> tuple[float, float, float]:
        folds = self.scores.drop_duplicates("fold")
        return paired_difference(
            self._by_fold(*ours) - self._by_fold(*rival), (folds["n_test"] / folds["n_train"]).mean()
        )

    def _verdict(self, subject: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> Verdict:
        mine, rival = (rows.loc[rows["score"].idxmax()] for rows in (ours, theirs))
        chosen = [(row["model"], row["encoding"]) for row in (mine, rival)]
        names = [
            ENCODING_NAMES[encoding] if subject != "All models" else _combination(model, encoding)
            for model, encoding in chosen
        ]
        return Verdict(subject, *names, mine["score"], rival["score"], *self._difference(*chosen))


def paired_difference(differences: np.ndarray, test_share: float) -> tuple[float, float, float]:
    """Mean of paired differences over folds, its standard error, and the probability that it is above zero.

    Folds share training rows, so their differences are not independent: the variance of the mean is
    ``(1 / n_folds + n_test / n_train)`` times that of a fold, not ``1 / n_folds``, under Student's t.

    Parameters
    ----------
    differences : array of shape (n_folds,)
        At least two.
    test_share : float
        Test rows over training rows of a fold.

    References
    ----------
    Nadeau & Bengio, "Inference for the Generalization Error", Machine Learning 52, 2003, section 3.
    """
    from scipy.stats import t

    n_folds, mean = len(differences), float(np.mean(differences))
    error = float(np.sqrt(np.var(differences, ddof=1) * (1 / n_folds + test_share)))
    if error == 0:
        return mean, error, float(np.heaviside(mean, 0.5))
    return mean, error, float(t.cdf(mean / error, n_folds - 1))


def _combination(model: str, encoding: str) -> str:
    return MODEL_NAMES[model] if model == "network" else f"{MODEL_NAMES[model]} on {ENCODING_NAMES[encoding]}"
