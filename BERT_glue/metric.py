"""GLUE's metrics as a local `evaluate` module: no network, the keys of the benchmark.

Use `GlueMetric(config_name="mrpc").compute(predictions=..., references=...)`, or
`evaluate.load("BERT_glue/metric.py", "mrpc")`.
"""

import warnings

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

KEYS = {
    "cola": ("matthews_correlation",),
    "mnli": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "wnli": ("accuracy",),
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
}


class GlueMetric(evaluate.Metric):
    """Accuracy, F1 of class 1, Matthews correlation, Pearson and Spearman correlation, by task.

    All are fractions. A correlation with constant predictions is undefined and reported as NaN.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in KEYS:
            raise KeyError(f"unknown task {self.config_name!r}; there are {', '.join(KEYS)}")
        kind = "float32" if "pearson" in KEYS[self.config_name] else "int64"
        return evaluate.MetricInfo(
            description="Metrics of the GLUE benchmark.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019.",
            inputs_description="predictions and references: class numbers, or scores for stsb and regression.",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy and scikit-learn warn of what the values already say (NaN, 0)
            functions = {
                "accuracy": lambda: accuracy_score(references, predictions),
                "f1": lambda: f1_score(references, predictions, zero_division=0),
                "matthews_correlation": lambda: matthews_corrcoef(references, predictions),
                "pearson": lambda: pearsonr(predictions, references).statistic,
                "spearmanr": lambda: spearmanr(predictions, references).statistic,
            }
            return {key: float(functions[key]()) for key in KEYS[self.config_name]}
