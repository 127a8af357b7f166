"""What D-ContraNorm does in each layer over training: `python -m gnn.arxiv.activity --records RUNS --output FILE.png`.

Left the relative move ‖y - x‖ / ‖x‖, right the mean of 1 - A_aa, which is 0 where the softmax over features is the
identity matrix; one curve for each method, depth and layer: the mean over seeds, on an axis that is logarithmic above
1e-8 and linear below. Without `--output` a table: the relative move at initialization, its median over training, its
end.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report import figures
from repro.report.records import iterate_records
from repro.report.tables import markdown_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend first: no display is needed)

PANELS = {"relative_move": "relative move ‖y - x‖ / ‖x‖", "off_diagonal": "mean of 1 - A_aa"}
# Okabe and Ito's palette, told apart also without colour vision; a method has a colour, a layer its dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")


@dataclass
class Config:
    """What to draw."""

    records: str
    """Folder of runs, record file or glob pattern."""
    output: str | None = None
    """The figure; its ending chooses the format, without one .svg and .png are written. Unset: print a table."""
    mode: str = "teacher"
    """Which runs: teacher or student."""


Key = tuple[str, str, int]


def courses(records: str, mode: str) -> dict[Key, list[dict[str, Any]]]:
    """Data set, method and depth → the activity of each of its runs.

    Raises:
        UserError: no such run has any, or those of one cell have different lengths.
    """
    found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for _, record in iterate_records([records]):
        if "activity_history" in record and record["config"]["mode"] == mode:
            cell = record["cell"]
            found[cell["data"], cell["method"], cell["depth"]].append(record["activity_history"])
    if not found:
        raise UserError(f"{records}: no {mode} with D-ContraNorm there")
    for (data, method, depth), runs in found.items():
        if any(run["epoch"] != runs[0]["epoch"] for run in runs):
            raise UserError(f"{data}, {method}, {depth} layers: runs of different length: name fewer records")
    return dict(sorted(found.items()))


def draw(found: dict[Key, list[dict[str, Any]]]) -> plt.Figure:
    """A row of two panels for each depth."""
    rows = sorted({(data, depth) for data, _, depth in found})
    methods = sorted({method for _, method, _ in found})
    figure, axes = plt.subplots(len(rows), 2, figsize=(10, 3.2 * len(rows)), squeeze=False, layout="constrained")
    for (data, method, depth), runs in found.items():
        epochs = runs[0]["epoch"]
        for panel, (name, text) in zip(axes[rows.index((data, depth))], PANELS.items(), strict=True):
            mean = np.mean([run[name] for run in runs], axis=0)  # (epochs, layers)
            for layer, values in enumerate(mean.T):
                style = {"color": COLOURS[methods.index(method) % 4], "linestyle": DASHES[layer % 4]}
                panel.plot(epochs, values, label=f"{method}, layer {layer + 1}", **style)
            panel.set(title=f"{data}, {depth} layers", xlabel="epoch (0: initialization)", ylabel=text, ylim=(0, 10))
            panel.set_yscale("symlog", linthresh=1e-8)
    for row in axes:
        row[1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def table(found: dict[Key, list[dict[str, Any]]]) -> pd.DataFrame:
    """The relative move of each layer, mean over seeds."""
    rows = []
    for (data, method, depth), runs in found.items():
        moves = np.mean([run["relative_move"] for run in runs], axis=0)  # (epochs, layers)
        for layer, values in enumerate(moves.T, start=1):
            numbers = {"at initialization": values[0], "median": np.median(values), "at the end": values[-1]}
            row = {"data": data, "layers": depth, "method": method, "norm after layer": layer, "runs": len(runs)}
            rows.append(row | {name: f"{value:.1g}" for name, value in numbers.items()})
    return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m gnn.arxiv.activity", description=__doc__ or "")
    found = courses(config.records, config.mode)
    if config.output is None:
        print(
            f"Relative move of D-ContraNorm, mean over seeds; mode: {config.mode}.\n\n{markdown_table(table(found))}",
            end="",
        )
        return
    figure = draw(found)
    words = sys.argv[1:] if argv is None else argv
    for path in figures.write(figure, Path(config.output), shlex.join(["python", "-m", "gnn.arxiv.activity", *words])):
        print(f"written: {path}")
    plt.close(figure)


if __name__ == "__main__":
    run_main(main)
