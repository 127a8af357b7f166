"""GLUE's metrics, under the keys of the benchmark."""

from __future__ import annotations

import warnings

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: pearsonr(predictions, references).statistic,
    "spearmanr": lambda references, predictions: spearmanr(predictions, references).statistic,
}
KEYS = dict.fromkeys(("mnli", "qnli", "rte", "sst2", "wnli", "classification"), ("accuracy",))
KEYS |= {"cola": ("matthews_correlation",), "mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1")}
KEYS |= dict.fromkeys(("stsb", "regression"), ("pearson", "spearmanr"))


def glue_metrics(task: str, predictions: Tensor, references: Tensor) -> dict[str, float]:
    """The task's metrics as fractions: accuracy, F1 of class 1, Matthews, Pearson and Spearman correlation.

    Args:
        task: a GLUE task, "classification" or "regression".
        predictions: class numbers or scores, (rows,).
        references: the labels, (rows,).

    Returns:
        By key. A correlation with constant predictions is undefined: NaN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy and scikit-learn warn of what the values already say (NaN, 0)
        return {key: float(METRICS[key](references.tolist(), predictions.tolist())) for key in KEYS[task]}
