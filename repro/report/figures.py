"""Figures from records: a metric against depth, and the collapse metrics of every layer.

Example: python -m repro.report.figures results/table3/runs --kind depth --each data --output results/table3/depth.png
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import aggregate, ordered_labels, select_runs, split_names, text_of
from repro.report.records import find_records, load_records, records_flag

# Okabe and Ito's palette, told apart also without colour vision; markers and dashes say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
MAX_LINES = 8  # in one panel; more are shared out evenly over several
# Collapse metric → axis label with its unit, and the value that means collapsed (None: it depends on the scale).
COLLAPSE: dict[str, tuple[str, float | None]] = {
    "mean_cosine": ("mean cosine similarity of rows", 1.0),
    "effective_rank": ("effective rank (dimensions)", 1.0),
    "variance": ("feature variance (squared feature units)", 0.0),
}


@dataclass
class Config:
    """What to draw."""

    records: list[str] | str = field(default_factory=list)
    """Folders, files (record.json, records.jsonl) or glob patterns; also as the first words, without the flag."""
    output: str = "figure.png"
    """The file; its ending chooses the format (png, pdf, svg)."""
    kind: Literal["depth", "collapse"] = "depth"
    """depth: the metric against the depth; collapse: the collapse metrics of every layer (runs with a probe)."""
    metric: str = "test_accuracy"
    """What `depth` draws; a fraction, shown in percent."""
    x: str = "depth"
    """The field on the horizontal axis of `depth`; its values are the curves' points."""
    label: str = "method"
    """The field whose values are the curves; several, separated by commas, are joined: `family,scale`."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only runs whose fields have these values: `--where '{data: cora, depth: "16"}'`."""
    each: str | None = None
    """One figure for each value of this field (or of several, separated by commas), put into the file's name:
    depth.png becomes depth-cora.png."""

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("--records is missing: name a folder of runs")
        if Path(self.output).suffix.lower() not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--output {self.output}: the ending must be .png, .pdf or .svg")


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 5,
    }


def draw_depth(frame: pd.DataFrame, config: Config, panels: list[Axes]) -> None:
    """Mean of the metric per depth, one curve per label, with one standard deviation either way."""
    cells = aggregate(frame, [config.label, config.x], config.metric)
    depths = sorted(cells[config.x].unique())
    for panel, labels in zip(panels, _share_out(ordered_labels(cells, config.label)), strict=True):
        for index, label in enumerate(labels):
            line = cells[cells[config.label] == label].sort_values(config.x)
            spread = line["std"].fillna(0) * 100
            x = line[config.x].astype(float)
            panel.errorbar(x, line["mean"] * 100, yerr=spread, label=label, capsize=2, **_style(index))
        if depths[0] > 0:
            panel.set_xscale("log", base=2)
        panel.set_xticks(depths, [str(d) for d in depths])
        panel.minorticks_off()
        panel.set_xlabel("depth (layers)" if config.x == "depth" else config.x)
        panel.set_ylabel(f"{config.metric.replace('_', ' ')} (%)")


def draw_collapse(frame: pd.DataFrame, config: Config, panels: list[Axes]) -> None:
    """Each collapse metric against the layer, one curve per label: the mean over seeds. Three panels in a row."""
    for row, labels in enumerate(_share_out(ordered_labels(frame, config.label))):
        axes = panels[row * len(COLLAPSE) : (row + 1) * len(COLLAPSE)]
        axes[-1].set_yscale("symlog", linthresh=1e-6)  # before the lines, which set its limits
        for index, label in enumerate(labels):
            runs = [pd.DataFrame(lists) for lists in frame[frame[config.label] == label]["collapse"]]
            if len({len(run) for run in runs}) > 1:
                raise UserError(
                    f"{label}: runs of different depth in one curve: choose with --where '{{{config.x}: ...}}'"
                )
            numbers = [run[["layer", *run.columns.intersection(list(COLLAPSE))]].astype(float) for run in runs]
            mean = pd.concat(numbers).groupby("layer").mean()
            for panel, name in zip(axes, COLLAPSE, strict=True):
                if name in mean:
                    panel.plot(mean.index, mean[name], label=label, **_style(index))
        for panel, (text, collapsed) in zip(axes, COLLAPSE.values(), strict=True):
            panel.set_xlabel("layer")
            panel.set_ylabel(text)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            if collapsed is not None:
                panel.axhline(collapsed, color="#999999", linewidth=0.8, zorder=0)
        axes[-1].set_ylim(bottom=-5e-7)  # a variance of 0 is seen, negative ones need no room


def _share_out(labels: list[Any]) -> list[list[Any]]:
    """The labels in as few lists of at most MAX_LINES as there can be, of nearly equal length, in order."""
    size = math.ceil(len(labels) / math.ceil(len(labels) / MAX_LINES))
    return [labels[i : i + size] for i in range(0, len(labels), size)]


def draw(config: Config) -> list[Path]:
    """Draw the figure, or one for each value of `--each`; returns the paths.

    Raises:
        UserError: records are missing, damaged, mixed, or lack what is to be drawn.
    """
    curves, each = split_names(config.label), split_names(config.each)
    frame = load_records(config.records)
    for name in [*curves, *each]:
        if name not in frame:
            raise UserError(f"{name}: no field of these records")
    frame = select_runs(frame, config.where)
    if config.kind == "collapse":
        frame = frame[frame["collapse"].notna()] if "collapse" in frame else frame[:0]
        if frame.empty:
            raise UserError("no record holds collapse metrics: run the cells with --probe")
    if len(curves) > 1:
        joined = [" ".join(filter(None, map(text_of, row))) for row in frame[curves].to_numpy(dtype=object)]
        frame, config = frame.assign(label=joined), dataclasses.replace(config, label="label")
    paths = []
    for values, part in frame.groupby(each) if each else [((), frame)]:
        names = [str(value) for value in values]
        path = Path(config.output)
        path = path.with_stem("-".join([path.stem, *names]))
        figure = figure_of(part, config, " ".join(names))
        path.parent.mkdir(parents=True, exist_ok=True)
        undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower(), {})
        with matplotlib.rc_context({"svg.hashsalt": "contranorm"}):  # the same records give the same file
            figure.savefig(path, dpi=160, metadata=undated)
        paths.append(path)
    return paths


def figure_of(frame: pd.DataFrame, config: Config, title: str) -> Figure:
    """The figure of these runs."""
    shares = len(_share_out(ordered_labels(frame, config.label)))
    rows, columns, width = (1, shares, 6.5) if config.kind == "depth" else (shares, len(COLLAPSE), 4.2)
    figure = Figure(figsize=(width * columns, 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=config.kind == "depth")
    axes = list(grid.flat)
    if config.kind == "depth":
        draw_depth(frame, config, axes)
    else:
        draw_collapse(frame, config, axes)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if shares == 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    else:
        for panel in grid[0] if config.kind == "depth" else grid[:, 0]:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, records_flag(argv), prog="python -m repro.report.figures", description=__doc__ or "")
    find_records(config.records)  # a wrong path is the first thing to say
    for path in draw(config):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
