"""Learning curves and speed of runs: `python -m ViT_imagenet.curves --runs results/cifar10_cpu`.

Reads the run folders below --runs and writes learning_curves.png, curves.csv and README.md beside them; every number in
the note comes from the records.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report.records import iterate_records


@dataclass
class Config:
    """What to draw."""

    runs: str
    """Folder whose sub-folders are runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the note."""
    config = parse_config(Config, argv, prog="ViT_imagenet.curves", description=str(__doc__))
    folder = Path(config.runs)
    if not any(folder.glob("*/record.json")):
        raise UserError(f"--runs {folder}: no */record.json there")
    records = {Path(where).parent.name: record for where, record in iterate_records([folder / "*" / "record.json"])}
    curves = pd.concat(
        [pd.read_json(folder / name / "metrics.jsonl", lines=True).assign(run=name) for name in records],
        ignore_index=True,
    )
    write_atomic(folder / "curves.csv", curves.to_csv(index=False).encode())
    draw(curves, folder / "learning_curves.png")
    write_atomic(folder / "README.md", note(records).encode())
    print(table(records).to_string(index=False))


def draw(curves: pd.DataFrame, path: Path) -> None:
    """Training loss and test accuracy over epochs, one line per run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, rows in curves.groupby("run"):
        tested = rows.dropna(subset="test_accuracy")
        axes[0].plot(rows["epoch"] + 1, rows["train_loss"], marker="o", label=name)
        axes[1].plot(tested["epoch"] + 1, tested["test_accuracy"], marker="o", label=name)
    for axis, label in zip(axes, ("training loss", "test accuracy"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(records: dict[str, Any]) -> pd.DataFrame:
    """One row per run: accuracy, speed, and the collapse of the last block where it was probed."""
    rows = []
    for name, record in records.items():
        row = {
            "run": name,
            "method": record["cell"]["method"],
            "test accuracy": f"{record['metrics']['test_accuracy']:.4f}",
            "images/s (wall)": f"{record['images_per_second']:.0f}",
            "images per processor second": f"{record['images_per_processor_second']:.0f}",
            "processor seconds": f"{record['processor_seconds']:.0f}",
            "wall seconds": f"{record['seconds']:.0f}",
        }
        if "collapse" in record:
            row["mean cosine, last block"] = f"{record['collapse']['mean_cosine'][-1]:.3f}"
            row["effective rank, last block"] = f"{record['collapse']['effective_rank'][-1]:.1f}"
        rows.append(row)
    return pd.DataFrame(rows)


def note(records: dict[str, Any]) -> str:
    """The Markdown note; it says what a single seed is worth."""
    frame = table(records)
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
    one = next(iter(records.values()))
    commands = "\n".join(record["command"] for record in records.values())
    seeds = sorted({record["seed"] for record in records.values()})
    return (
        f"# Learning curves: {one['protocol']}\n\n"
        + "\n".join(lines)
        + "\n\n![training loss and test accuracy per epoch](learning_curves.png)\n\n"
        + f"Selection: {one['selection']}; seeds: {seeds}. One run per row: differences of a percent or two are within "
        "what another seed gives.\nThe machine may have been shared with other work: processor seconds (of training, "
        "evaluation left out) say more than wall seconds.\n\n"
        f"```\n{commands}\npython -m ViT_imagenet.curves --runs FOLDER      # this note\n```\n"
    )


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
