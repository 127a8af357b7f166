"""Learning curves and speed of runs: `python -m ViT_imagenet.curves --runs results/cifar10_cpu`.

Reads the run folders below --runs and writes learning_curves.png, curves.csv and README.md beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from repro.config import parse_config
from repro.errors import run_main
from repro.files import write_atomic
from repro.report.records import load_records
from repro.report.tables import markdown_table

COLUMNS = {
    "run": "run",
    "method": "method",
    "metrics.test_accuracy": "test accuracy",
    "images_per_second": "images/s (wall)",
    "images_per_processor_second": "images per processor second",
    "processor_seconds": "processor seconds",
    "seconds": "wall seconds",
}


@dataclass
class Config:
    """What to draw."""

    runs: str
    """Folder whose sub-folders are runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure and write the note."""
    folder = Path(parse_config(Config, argv, prog="python -m ViT_imagenet.curves", description=str(__doc__)).runs)
    records = load_records([folder / "*" / "record.json"])
    records["run"] = [Path(path).parent.name for path in records["path"]]
    lines = {name: pd.read_json(folder / name / "metrics.jsonl", lines=True) for name in records["run"]}
    pd.concat(lines, names=["run"]).reset_index("run").to_csv(folder / "curves.csv", index=False)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, metric in zip(axes, ("train_loss", "test_accuracy"), strict=True):
        for name, run in lines.items():
            measured = run.dropna(subset=metric)
            axis.plot(measured["epoch"] + 1, measured[metric], marker="o", label=name)
        axis.set(xlabel="epoch", ylabel=metric.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(folder / "learning_curves.png", dpi=130)
    plt.close(figure)
    table = records.rename(columns=COLUMNS)[list(COLUMNS.values())]
    text = markdown_table(table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value))
    write_atomic(folder / "README.md", note(records, text).encode())
    print(text, end="")


def note(records: pd.DataFrame, table: str) -> str:
    """The Markdown note around the table; it says what a single seed is worth."""
    commands = "\n".join(records["command"])
    return (
        f"# Learning curves: {records['protocol'][0]}\n\n{table}\n"
        "![training loss and test accuracy per epoch](learning_curves.png)\n\n"
        f"Selection: {records['selection'][0]}; seeds: {sorted(set(records['seed']))}. One run per row: differences of "
        "a percent or two are within what another seed gives.\nThe machine may have been shared with other work: "
        "processor seconds (of training, evaluation left out) say more than wall seconds.\n\n"
        f"```\n{commands}\npython -m ViT_imagenet.curves --runs FOLDER      # this note\n```\n"
    )


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
