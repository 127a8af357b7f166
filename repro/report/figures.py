"""Figures from records: a metric against depth, and the collapse metrics of every layer.

Example: python -m repro.report.figures --records results/table3/runs --kind depth --output results/table3/depth.png
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.records import load_records
from repro.report.tables import aggregate, label_order, names_in, prepare, text_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend first: no display is needed)
from matplotlib.axes import Axes  # noqa: E402

# Okabe and Ito's palette, told apart also without colour vision; markers and dashes say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
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
    """A folder, file (record.json, records.jsonl) or glob pattern; several as `--records '[a, b]'`."""
    output: str = "figure.png"
    """The file; its ending chooses the format (png, pdf, svg)."""
    kind: Literal["depth", "collapse"] = "depth"
    """depth: the metric against the depth; collapse: the collapse metrics of every layer (runs with a probe)."""
    metric: str = "test_accuracy"
    """What `depth` draws; a fraction, shown in percent."""
    x: str = "nlayer"
    """The config field on the horizontal axis of `depth`; its values are the curves' points."""
    label: str = "norm"
    """The field whose values are the curves; several, separated by commas, are joined: `norm,scale`."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only runs whose config fields have these values: `--where '{data: cora, nlayer: "16"}'`."""
    each: str | None = None
    """One figure for each value of this field (or of several, separated by commas), put into the file's name:
    depth.png becomes depth-cora.png."""
    title: str = ""
    """Printed above the figure."""

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


def draw_depth(frame: pd.DataFrame, settings: list[str], config: Config, axes: Axes) -> None:
    """Mean of the metric per depth, one curve per label, with one standard deviation either way."""
    cells = aggregate(frame, [config.label, config.x], config.metric, settings)
    for index, label in enumerate(label_order(cells, config.label)):
        line = cells[cells[config.label] == label].sort_values(config.x)
        spread = line["std"].fillna(0) * 100
        axes.errorbar(line[config.x], line["mean"] * 100, yerr=spread, label=label, capsize=2, **_style(index))
    depths = sorted(cells[config.x].unique())
    if depths[0] > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    axes.set_xlabel("depth (layers)" if config.x in ("nlayer", "depth") else config.x)
    axes.set_ylabel(f"{config.metric.replace('_', ' ')} (%)")


def draw_collapse(frame: pd.DataFrame, settings: list[str], config: Config, axes: list[Axes]) -> None:
    """Each collapse metric against the layer, one curve per label: the mean over seeds."""
    probed = frame.dropna(subset="layers")
    for index, label in enumerate(label_order(probed, config.label)):
        runs = [_by_layer(run) for run in probed[probed[config.label] == label]["layers"]]
        mean = pd.concat(runs).groupby("layer").mean()
        if len({len(run) for run in runs}) > 1:
            raise UserError(f"{label}: runs of different depth in one curve: choose with --where '{{{config.x}: ...}}'")
        for panel, name in zip(axes, COLLAPSE, strict=True):
            if name in mean:
                panel.plot(mean.index, mean[name], label=label, **_style(index))
    for panel, (text, collapsed) in zip(axes, COLLAPSE.values(), strict=True):
        panel.set_xlabel("layer")
        panel.set_ylabel(text)
        if collapsed is not None:
            panel.axhline(collapsed, color="#999999", linewidth=0.8, zorder=0)
    axes[-1].set_yscale("symlog", linthresh=1e-6)


def _layers(frame: pd.DataFrame) -> pd.Series[Any]:
    """The collapse metrics of each run, None where it was not probed."""
    key = next((k for k in ("collapse", "record.probe") if k in frame), None)
    if key is None:
        return pd.Series([None] * len(frame), index=frame.index)
    return frame[key].map(lambda value: value if isinstance(value, (dict, list)) else None)


def _by_layer(metrics: dict[str, list[Any]] | list[dict[str, Any]]) -> pd.DataFrame:
    """One row per layer, from lists by metric or mappings by layer; counted from 1 where the record has no numbers."""
    texts = pd.DataFrame(metrics).drop(columns=["module", "call"], errors="ignore")
    table = pd.DataFrame({name: pd.to_numeric(texts[name], errors="coerce") for name in texts})
    if "layer" not in table:
        table["layer"] = range(1, len(table) + 1)
    return table


def draw(config: Config) -> list[Path]:
    """Draw the figure, or one for each value of `--each`; returns the paths.

    Raises:
        UserError: records are missing, damaged, mixed, or lack what is to be drawn.
    """
    frame, settings = prepare(load_records(config.records))
    curves, each = names_in(config.label), names_in(config.each)
    for name in [*curves, *each, *config.where]:
        if name not in frame:
            raise UserError(f"{name}: no config field of these records")
    for name, wanted in config.where.items():
        frame = frame[frame[name].map(str) == str(wanted)]
    if config.kind == "collapse":
        frame = frame.assign(layers=_layers(frame)).dropna(subset="layers")
        if frame.empty:
            raise UserError("no record holds collapse metrics: run the cells with --probe")
    if frame.empty:
        raise UserError("no record is left after --where")
    if len(curves) > 1:
        joined = [" ".join(filter(None, map(text_of, row))) for row in frame[curves].to_numpy(dtype=object)]
        frame, config = frame.assign(label=joined), dataclasses.replace(config, label="label")
    output = Path(config.output)
    if not each:
        return [_draw_one(frame, settings, config, output, config.title)]
    paths = []
    for values, part in frame.groupby(each):
        title = " ".join(map(str, values))
        path = output.with_stem(f"{output.stem}-{'-'.join(map(str, values))}")
        paths.append(_draw_one(part, settings, config, path, f"{config.title} {title}".strip()))
    return paths


def _draw_one(frame: pd.DataFrame, settings: list[str], config: Config, output: Path, title: str) -> Path:
    panels = 1 if config.kind == "depth" else len(COLLAPSE)
    figure, grid = plt.subplots(1, panels, figsize=(6.5 if panels == 1 else 4.2 * panels, 4.2), squeeze=False)
    try:
        axes = list(grid[0])
        if config.kind == "depth":
            draw_depth(frame, settings, config, axes[0])
        else:
            draw_collapse(frame, settings, config, axes)
        for panel in axes:
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
        figure.suptitle(title)
        figure.set_layout_engine("constrained")
        output.parent.mkdir(parents=True, exist_ok=True)
        with plt.rc_context({"svg.hashsalt": "contranorm"}):  # SVG's element names would be random
            figure.savefig(output, dpi=160, metadata=_undated(output))
    finally:
        plt.close(figure)
    return output


def _undated(output: Path) -> dict[str, Any]:
    """The same records give the same file, byte for byte: no creation date in it."""
    return {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(output.suffix.lower(), {})


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.report.figures", description=__doc__ or "")
    for path in draw(config):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
