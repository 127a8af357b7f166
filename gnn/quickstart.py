"""The quickstart: five norms, four depths, two seeds on one graph; a table and two figures.

Every cell is an ordinary run with a folder and a record; finished cells are not repeated. The cells share a pool of
processes instead of taking one each, because loading torch and PyG takes longer than training a shallow network.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from gnn.config import Config, DataName
from repro.config import default_data_root, parse_config
from repro.errors import run_main

# Label → norm_mode, norm_scale, use_layer_norm. The last two rows tell what ContraNorm's LayerNorm contributes alone.
ROWS: dict[str, tuple[str, float | None, bool]] = {
    "none": ("None", None, False),
    "LN": ("LN", None, False),
    "PairNorm": ("PN", None, False),
    "ContraNorm (with LayerNorm)": ("CN", 1.0, True),
    "PairNorm with LayerNorm": ("PN", None, True),
    "LayerNorm alone": ("None", None, True),
}


@dataclass
class QuickConfig:
    """What the quickstart runs."""

    data: DataName = "digits"
    """The graph; digits is embedded in scikit-learn and needs no download."""

    depths: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """Numbers of layers; collapse shows from 8 on. The last one is also probed layer by layer."""

    seeds: int = 2
    """Runs per cell; two show the spread and keep the whole under five minutes on two cores."""

    epochs: int = 100
    """Epochs of each run; half of Table 3's, enough for the effect."""

    jobs: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes at once, one thread each; default: the cores of this machine."""

    data_root: str = field(default_factory=default_data_root)
    """Folder with graphs/...; default $CONTRANORM_DATA, else data/."""

    output_dir: str = "out/quickstart"
    """Where the runs and figures go, below a folder for the data set."""

    def __post_init__(self) -> None:
        if not self.depths or min(self.depths) < 2:
            raise ValueError(f"--depths needs numbers of at least 2 (one hidden layer), got {self.depths}")
        if self.seeds < 1 or self.jobs < 1:
            raise ValueError("--seeds and --jobs must be at least 1")


def cells(quick: QuickConfig) -> list[tuple[str, Config]]:
    """(label, settings) of every run, the longest first so that no process waits for the last one."""
    runs = []
    for depth in sorted(quick.depths, reverse=True):
        for label in sorted(ROWS, key=lambda name: ROWS[name][0] != "CN"):
            mode, scale, layer_norm = ROWS[label]
            for seed in range(quick.seeds):
                name = f"{mode}{'-LayerNorm' if layer_norm else ''}-depth{depth}-epochs{quick.epochs}-seed{seed}"
                runs.append(
                    (
                        label,
                        Config(
                            output_dir=str(Path(quick.output_dir) / quick.data / "runs" / name),
                            data=quick.data,
                            nlayer=depth,
                            norm_mode=mode,  # type: ignore[arg-type]
                            norm_scale=scale,
                            use_layer_norm=layer_norm,
                            epochs=quick.epochs,
                            seed=seed,
                            probe=depth == max(quick.depths),
                            device="cpu",
                            data_root=quick.data_root,
                        ),
                    )
                )
    return runs


def run_cell(config: Config) -> None:
    """One run, in a process of the pool."""
    import torch

    from gnn.train import train

    torch.set_num_threads(1)
    train(config, quiet=True)


def run_all(configs: Sequence[Config], jobs: int) -> None:
    """Run the cells that have no record yet, `jobs` at a time, under one progress bar."""
    todo = [c for c in configs if not (Path(c.output_dir) / "record.json").exists()]
    if not todo:
        return
    pool = ProcessPoolExecutor(min(jobs, len(todo)), mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in tqdm(as_completed([pool.submit(run_cell, c) for c in todo]), total=len(todo), unit="run"):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read(runs: Sequence[tuple[str, Config]]) -> pd.DataFrame:
    """One row per run: label, depth, seed, accuracy in percent, and the probe's lists where there are any."""
    rows: list[dict[str, Any]] = []
    for label, config in runs:
        record = json.loads((Path(config.output_dir) / "record.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "norm": label,
                "depth": config.nlayer,
                "seed": config.seed,
                "accuracy": 100 * record["metrics"]["test_accuracy"],
                **record.get("probe", {}),
            }
        )
    frame = pd.DataFrame(rows)
    frame["norm"] = pd.Categorical(frame["norm"], list(ROWS), ordered=True)
    return frame.sort_values(["norm", "depth", "seed"])


def table(frame: pd.DataFrame) -> str:
    """Test accuracy in percent, mean ± standard deviation over seeds; one line per norm, one column per depth."""
    grouped = frame.groupby(["norm", "depth"], observed=True)["accuracy"].agg(["mean", "std"])
    text = grouped.apply(lambda r: f"{r['mean']:.1f}" + (f" ± {r['std']:.1f}" if r["std"] == r["std"] else ""), axis=1)
    return str(text.unstack("depth").rename_axis(columns="depth").to_string())


def figures(frame: pd.DataFrame, folder: Path, data: str) -> list[Path]:
    """Accuracy against depth, and the collapse metrics against the layer at the largest depth; two PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def lines(axis: Any, column: str, subset: pd.DataFrame) -> None:
        for label, rows in subset.groupby("norm", observed=True):
            values = pd.DataFrame(rows[column].tolist())  # (seeds, layers)
            axis.plot(range(1, values.shape[1] + 1), values.mean(), marker=".", label=label)
        axis.set(xlabel="layer", title=column.replace("_", " "))

    figure, axis = plt.subplots(figsize=(8.5, 4), layout="constrained")
    for label, rows in frame.groupby("norm", observed=True):
        by_depth = rows.groupby("depth")["accuracy"].agg(["mean", "std"]).fillna(0.0)
        axis.errorbar(by_depth.index, by_depth["mean"], by_depth["std"], marker="o", capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(frame["depth"].unique()), [str(d) for d in sorted(frame["depth"].unique())])
    axis.set(xlabel="depth (convolutions)", ylabel="test accuracy (%)", title=f"{data}: accuracy against depth")
    figure.legend(loc="outside right upper")  # beside the curves, which fill the panel
    paths = [folder / "accuracy_by_depth.png", folder / "collapse_by_layer.png"]
    figure.savefig(paths[0], dpi=150)
    plt.close(figure)

    deepest = frame[frame["depth"] == frame["depth"].max()]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    lines(axes[0], "mean_cosine", deepest)
    lines(axes[1], "effective_rank", deepest)
    axes[0].set_ylabel("1 = all nodes point the same way")
    axes[1].set_ylabel("1 = one direction left")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{data}: features after each hidden layer, depth {deepest['depth'].max()}")
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, draw the figures."""
    quick = parse_config(
        QuickConfig, argv, prog="gnn.quickstart", description="Collapse of deep GCNs, and ContraNorm against it."
    )
    runs = cells(quick)
    run_all([config for _, config in runs], quick.jobs)
    frame = read(runs)
    print(f"test accuracy in % on {quick.data}, {quick.epochs} epochs, mean ± std over {quick.seeds} seeds")
    print(table(frame))
    for path in figures(frame, Path(quick.output_dir) / quick.data, quick.data):
        print(path)


if __name__ == "__main__":
    run_main(main)
