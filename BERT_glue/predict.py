"""Predictions in the form that the GLUE server takes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from BERT_glue.tasks import Task
from repro.files import write_atomic


def as_predictions(logits: Tensor, task: Task) -> Tensor:
    """Class numbers (B,) from logits (B, classes), or scores (B,) from (B, 1) for regression."""
    return logits.argmax(dim=-1) if task.labels else logits[:, 0].float()


def tsv(predictions: Tensor, task: Task, file: str) -> str:
    """One file: the server wants label names for entailment tasks, else numbers, scores from 0 to 5 for STS-B.

    For own data, classes are written by name.
    """
    lines = ["index\tprediction"]
    for index, value in enumerate(predictions.tolist()):
        if not task.labels:
            value = f"{min(max(value, 0.0), 5.0):.3f}" if file == "STS-B" else f"{value:.6g}"
        elif task.server_names or not task.server_files:
            value = task.labels[value]
        lines.append(f"{index}\t{value}")
    return "\n".join(lines) + "\n"


def write_predictions(folder: Path, predictions: dict[str, Tensor], task: Task) -> None:
    """Write one TSV per test set; `predictions` are by file name without .tsv, (rows,) each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in predictions.items():
        write_atomic(folder / f"{name}.tsv", tsv(values, task, name).encode())
