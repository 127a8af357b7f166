"""Figures from records, fit for print: at most eight lines in a panel, told apart without colour, the method on top.

Kinds: `depth`, a metric against the depth, published cells as open markers; `scale`, against s' for each depth, both
forms of the step on one axis; `collapse`, its metrics per layer; `curves`, per epoch; `spectrum`, singular values;
`prefix`, likelihood of a token by the number of those before it.

Example: python -m repro.report.figures results/table3 --kind depth --each data --output results/table3/depth
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import (
    aggregate,
    no_field,
    ordered_labels,
    rows_of,
    select_best,
    select_runs,
    sortable,
    split_names,
    text_of,
)
from repro.report.published import METHOD, load_entries
from repro.report.records import RecordsConfig, curve_of, find_records, load_records, records_flag

# Okabe and Ito's palette without the yellow, told apart also without colour vision; vermilion is the method's.
COLOURS = ("#000000", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
METHOD_COLOURS = ("#D55E00", "#8F3F00", "#F28E4B", "#5E2900")
MARKERS, DASHES = "osD^vPX*<>phd8", ("-", "--", "-.", ":")
MAX_LINES = 8  # in one panel; more are shared out evenly over several
COLUMNS = 3  # panels side by side
# Collapse metric → axis label with its unit, and the value that means collapsed (None: it depends on the scale).
COLLAPSE: dict[str, tuple[str, float | None]] = {
    "mean_cosine": ("mean cosine similarity of rows", 1.0),
    "effective_rank": ("effective rank (dimensions)", 1.0),
    "variance": ("feature variance (squared feature units)", 0.0),
    "attention_similarity": ("similarity of attention maps", 1.0),
}
ROUNDING = 1e-7  # of float32: singular values below this share of the largest are noise
ENDINGS = (".svg", ".png", ".pdf")
CAPTIONS = {
    "depth": "mean over n runs; bands: one standard deviation either way",
    "scale": "s' = s/(1+s) for (1+s)x − sAx, s' = s for Eq. 6's x − sAx; mean over n runs, ± one standard deviation",
    "collapse": "mean over n runs; bands: smallest to largest run; grey line: collapsed",
    "curves": "mean over n runs; bands: one standard deviation either way",
    "spectrum": f"mean over n runs; bands: smallest to largest run; below {ROUNDING:.0e}, drawn there: rounding",
    "prefix": "mean over n runs; bands: smallest to largest run",
}


@dataclass
class Config(RecordsConfig):
    """What to draw."""

    output: str = "figure.png"
    """The file; its ending chooses the format (svg, png, pdf). Without an ending both .svg and .png are written."""
    kind: Literal["depth", "scale", "collapse", "curves", "spectrum", "prefix"] = "depth"
    """depth: the metric against --x; scale: against the step's scale, a panel per depth; collapse: its metrics per
    layer (runs with a probe); curves: loss and accuracy per epoch; spectrum: singular values of the last features;
    prefix: negative log-likelihood of the next token."""
    metric: str = "test_accuracy"
    """What `depth` and `scale` draw; a fraction, shown in percent."""
    x: str = "depth"
    """The field on the horizontal axis of `depth`; its values are the curves' points."""
    label: str = "method"
    """The field whose values are the curves; several, separated by commas, are joined: `family,scale`."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keep only runs whose fields have these values: `--where '{data: cora, depth: 16}'`."""
    best: str | None = None
    """Draw, for each curve and point, only the value of this field (say scale) with the highest mean of --by."""
    by: str | None = None
    """The metric that chooses: one of a validation set."""
    each: str | None = None
    """One figure for each value of this field (or of several, separated by commas), put into the file's name:
    depth.png becomes depth-cora.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.output).suffix.lower() not in ("", *ENDINGS):
            raise ValueError(f"--output {self.output}: the ending must be {', '.join(ENDINGS)}, or none")
        if (self.best is None) != (self.by is None) or "test" in (self.by or ""):
            raise ValueError("--best and --by belong together: a field, and the validation metric that chooses it")


@dataclass
class Series:
    """One line: points (x, mean), a band from low to high, the number of runs at each, and published points."""

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: list[int]
    published: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Panel:
    """What one pair of axes shows."""

    series: list[Series]
    xlabel: str
    ylabel: str
    title: str = ""
    xticks: list[float] | None = None  # on an axis of powers of two; None: whole numbers
    log: bool = False
    collapsed: float | None = None


def series_of(label: str, points: pd.DataFrame, factor: float = 1.0, spread: str = "std") -> Series:
    """Mean and band at each index of `points`, a column per run: ± one standard deviation, or smallest to largest."""
    mean, std = points.mean(axis=1), points.std(axis=1, ddof=1).fillna(0)
    low, high = (points.min(axis=1), points.max(axis=1)) if spread == "range" else (mean - std, mean + std)
    mid, bottom, top = ((side * factor).tolist() for side in (mean, low, high))
    return Series(label, [float(x) for x in points.index], mid, bottom, top, points.notna().sum(axis=1).tolist())


# -- the kinds ---------------------------------------------------------------------------------------------------------


def depth_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """The metric against depth: one row of panels, as many as the lines need."""
    cells = aggregate(frame, [config.label, config.x], config.metric)
    ticks = sorted(set(cells[config.x]), key=sortable)
    entries = [e for e in load_entries() if e.kind == "authors" and e.metric == config.metric]
    lines = []
    for label in ordered_labels(cells, config.label):
        line = cells[cells[config.label] == label].sort_values(config.x)
        points = pd.DataFrame([cell["values"].reset_index(drop=True) for _, cell in line.iterrows()])
        series = series_of(label, points.set_axis([float(x) for x in line[config.x]]), 100)
        for cell in rows_of(line):
            for entry in [entry for entry in entries if entry.fits(cell)]:
                series.published.append((float(cell[config.x]), entry.mean * 100))
                entries.remove(entry)  # one marker, also where several scales answer to it
        lines.append(series)
    xlabel = "depth (layers)" if config.x == "depth" else config.x
    return [[Panel(part, xlabel, percent(config.metric), xticks=ticks) for part in share_out(lines)]]


def scale_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """The metric against s', a panel per depth; norms without the step are level lines."""
    if "identity" not in frame or frame["identity"].isna().all():
        raise UserError("no record has a scale of the step: --kind scale draws ContraNorm's runs")
    panels = []
    for depth, part in frame.groupby("depth"):
        cells = aggregate(part, ["method"], config.metric)
        steps = cells[cells["identity"].notna() & cells["scale"].notna()]
        lines, ends = [], set()
        for family in ordered_labels(steps, "family"):
            line = steps[steps["family"] == family]
            x = [s / (1 + s) if identity else s for s, identity in zip(line["scale"], line["identity"], strict=True)]
            points = pd.DataFrame([cell["values"].reset_index(drop=True) for _, cell in line.iterrows()])
            lines.append(series_of(family, points.set_axis(x).sort_index(), 100))
            ends.add(family.partition(" + ")[2])
        level = []
        for method in ordered_labels(cells, "method"):
            (cell,) = rows_of(cells[cells["method"] == method])
            if pd.isna(cell["identity"]) and method == cell["family"] and method.partition(" + ")[2] in ends:
                values = pd.DataFrame([cell["values"].reset_index(drop=True)] * 2, index=[0.0, 1.0])
                level.append(series_of(method, values, 100))
        lines = [*level[: MAX_LINES - len(lines)], *lines]
        panels.append(Panel(lines, "scale s'", percent(config.metric), f"depth {depth}", xticks=[]))
    return [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]


def collapse_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """Each collapse metric against the layer, before training where that is recorded, and after; a row per share."""
    rows = []
    for column, title in states(frame, "collapse"):
        by_metric: dict[str, list[Series]] = {}
        for label in ordered_labels(frame, config.label):
            found = frame[frame[config.label] == label][column].dropna()
            runs = [pd.DataFrame(lists).set_index("layer") for lists in found]
            if len({len(run) for run in runs}) > 1:
                raise UserError(f"{label}: runs of different depth in one curve: choose with --where '{{depth: ...}}'")
            for name in COLLAPSE:
                values = pd.DataFrame({n: run[name] for n, run in enumerate(runs) if name in run}).astype(float)
                values = values.dropna(how="all")
                if len(values):
                    by_metric.setdefault(name, []).append(series_of(label, values, spread="range"))
        shares = {name: share_out(series) for name, series in by_metric.items()}
        for index in range(max(map(len, shares.values()))):
            drawn = {name: parts[index] for name, parts in shares.items() if index < len(parts)}
            rows.append([
                Panel(series, "layer", COLLAPSE[name][0], title, log=name == "variance", collapsed=COLLAPSE[name][1])
                for name, series in drawn.items()
            ])  # fmt: skip
    return rows


def states(frame: pd.DataFrame, column: str) -> list[tuple[str, str]]:
    """The columns that hold a measurement of the untrained and the trained model, with their titles."""
    if f"{column}_untrained" not in frame or frame[f"{column}_untrained"].isna().all():
        return [(column, "")]
    return [(f"{column}_untrained", "before training"), (column, "after training")]


def curve_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """Loss, and the first accuracy that there is, per epoch."""
    curves = {path: curve_of(path, curve) for path, curve in zip(frame["path"], _column(frame, "curve"), strict=True)}
    names = {name for curve in curves.values() for name in curve}
    loss = [name for name in ("loss", "train_loss") if name in names]
    scores = [n for n in ("validation_accuracy", "test_accuracy", "accuracy", "score", "knn_accuracy") if n in names]
    if not (loss or scores):
        raise UserError("no run has a metrics.jsonl beside its record, and no record a packed curve")
    by_name: dict[str, list[Series]] = {}
    for label in ordered_labels(frame, config.label):
        for name in [*loss[:1], *scores[:1]]:
            own = [curves[path] for path in frame[frame[config.label] == label]["path"]]
            runs = {n: pd.Series(c[name], index=c["epoch"], dtype=float) for n, c in enumerate(own) if name in c}
            if runs:
                points = pd.DataFrame(runs).dropna(how="all").sort_index()
                if len(points) > 1:  # measured at the end only: no curve
                    by_name.setdefault(name, []).append(series_of(label, points, 1 if name in loss else 100))
    if not by_name:
        raise UserError("no curve: the runs have one epoch each")
    shares = itertools.zip_longest(*(share_out(series) for series in by_name.values()))
    labels = {name: "training loss" if name in loss else percent(name) for name in by_name}
    return [[Panel(s, "epoch", labels[name]) for name, s in zip(by_name, row, strict=True) if s] for row in shares]


def spectrum_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """Singular values of the last features, relative to the largest, before training where recorded, and after."""
    panels = []
    for column, title in states(frame, "spectrum"):
        lines = []
        for label in ordered_labels(frame, config.label):
            runs = [np.asarray(values, dtype=float) for values in frame[frame[config.label] == label][column].dropna()]
            if runs:
                points = pd.DataFrame({n: pd.Series(values / values.max()) for n, values in enumerate(runs)})
                points = points.clip(lower=ROUNDING).set_axis(np.arange(1, len(points) + 1))
                lines.append(series_of(label, points, spread="range"))
        labels = "singular value", "σ relative to the largest", title
        panels += [Panel(part, *labels, log=True) for part in share_out(lines)]
    return [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]


def prefix_panels(frame: pd.DataFrame, config: Config) -> list[list[Panel]]:
    """Negative log-likelihood of the next token against the number of those before it."""
    lines = []
    for label in ordered_labels(frame, config.label):
        runs = [pd.Series(values, dtype=float) for values in frame[frame[config.label] == label]["prefix_nll"]]
        points = pd.DataFrame(dict(enumerate(runs)))
        lines.append(series_of(label, points.set_axis(range(1, len(points) + 1)), spread="range"))
    return [[Panel(part, "tokens before", "negative log-likelihood (nats)") for part in share_out(lines)]]


KINDS = {
    "depth": depth_panels,
    "scale": scale_panels,
    "collapse": collapse_panels,
    "curves": curve_panels,
    "spectrum": spectrum_panels,
    "prefix": prefix_panels,
}


def percent(metric: str) -> str:
    """Axis label of a fraction shown in percent."""
    return f"{metric.replace('_', ' ')} (%)"


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    return frame[name].tolist() if name in frame else [None] * len(frame)


def share_out(lines: Sequence[Series]) -> list[list[Series]]:
    """At most MAX_LINES in a panel: lines of one ending (` + LayerNorm`) together, evenly where these are too many.

    The method is in every panel that has room for it.
    """
    if len(lines) <= MAX_LINES:
        return [list(lines)]
    groups: dict[str, list[Series]] = {}
    for line in lines:
        groups.setdefault(line.label.partition(" + ")[2], []).append(line)
    panels = []
    for group in groups.values():
        size = math.ceil(len(group) / math.ceil(len(group) / MAX_LINES))
        panels += [group[i : i + size] for i in range(0, len(group), size)]
    method = [line for line in lines if line.label.startswith(METHOD)]
    for panel in panels:
        missing = [line for line in method if line not in panel]
        panel += missing if len(panel) + len(missing) <= MAX_LINES else []
    return panels


# -- drawing -----------------------------------------------------------------------------------------------------------


def style_of(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """One marker and dash for each label of a figure, also without colour; the method thicker and on top."""
    method = [name for name in labels if name.startswith(METHOD)]
    index = [*method, *(name for name in labels if name not in method)].index(label)
    own = label in method
    colours, place = (METHOD_COLOURS, index) if own else (COLOURS, index - len(method))
    return {
        "color": colours[place % len(colours)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[(index + index // len(MARKERS)) % len(DASHES)],
        "linewidth": 2.4 if own else 1.2,
        "markersize": 6 if own else 4.5,
        "zorder": 4 if own else 3,
    }


def draw_panel(axes: Axes, panel: Panel, labels: Sequence[str]) -> None:
    """Bands, lines and published points of one panel."""
    values = np.array([v for line in panel.series for side in (line.mean, line.low, line.high) for v in side])
    if panel.log:  # before the lines, which set its limits
        positive = values[values > 0]
        if len(positive) == np.isfinite(values).sum():
            if positive.max(initial=0) > 10 * positive.min(initial=np.inf):  # less than a decade has no tick
                axes.set_yscale("log")
        else:  # zeros are shown too
            least = float(positive.min()) if len(positive) else 1e-12
            axes.set_yscale("symlog", linthresh=least)
            decades = np.arange(math.ceil(math.log10(least)), math.ceil(math.log10(values.max() or 1)) + 1)
            axes.set_yticks([0, *10.0 ** decades[:: -max(1, len(decades) // 6)]])
            axes.set_ylim(bottom=-least / 2)
    for line in sorted(panel.series, key=lambda line: line.label.startswith(METHOD)):
        style = style_of(line.label, labels)
        every = max(1, len(line.x) // 12)
        axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(line.x, line.mean, label=line.label, markevery=every, **style)
        for x, y in line.published:
            open_marker: dict[str, Any] = {"marker": style["marker"], "markerfacecolor": "#ffffff", "markersize": 8}
            axes.plot([x], [y], color=style["color"], linestyle="", zorder=5, **open_marker)
    if panel.collapsed is not None:
        axes.axhline(panel.collapsed, color="#999999", linewidth=0.8, zorder=0)
    if panel.xticks:
        if min(panel.xticks) > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(panel.xticks, [text_of(x) for x in panel.xticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    elif panel.xticks is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panel.xticks == []:
        axes.set_xlim(-0.03, 1.03)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def figure_of(frame: pd.DataFrame, config: Config, title: str) -> Figure:
    """The figure of these runs."""
    rows = KINDS[config.kind](frame, config)
    panels = [panel for row in rows for panel in row]
    found = {line.label: line for panel in panels for line in panel.series}
    labels = [label for label in ordered_labels(frame, config.label) if label in found]
    labels += [label for label in found if label not in labels]
    runs = {label: [n for p in panels for line in p.series if line.label == label for n in line.n] for label in labels}
    counts = {label: f"{min(n)}–{max(n)}" if min(n) < max(n) else str(max(n)) for label, n in runs.items()}
    columns = max(map(len, rows))
    published = any(line.published for line in found.values())
    figure = Figure(figsize=((4.2 if columns > 1 else 6) * columns, 3.6 * len(rows) + 1), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey=config.kind in ("depth", "scale"))
    for axes, row in zip(grid, rows, strict=True):
        for ax, panel in zip(axes, row, strict=False):
            draw_panel(ax, panel, labels)
            if config.kind in ("depth", "scale") and ax is not axes[0]:
                ax.set_ylabel("")  # shared
        for ax in axes[len(row) :]:
            ax.set_visible(False)
    lines = [Line2D([], [], label=f"{label} (n = {counts[label]})", **style_of(label, labels)) for label in labels]
    if published:
        open_marker: dict[str, Any] = {"marker": "o", "markerfacecolor": "#ffffff", "markersize": 8}
        lines.append(Line2D([], [], linestyle="", color="#000000", label="published", **open_marker))
    caption = CAPTIONS[config.kind]
    if config.best and config.by:
        caption += f"; {config.best} chosen by {config.by.replace('_', ' ')}"
    long = max(len(str(line.get_label())) for line in lines) > 45  # two would not fit below one panel
    figure.legend(
        handles=lines, loc="outside lower center", ncols=columns + (columns == 1 and not long), handlelength=3.2,
        frameon=False, title=caption, fontsize=8, title_fontsize=7,
    )  # fmt: skip
    figure.suptitle(title)
    return figure


def draw(config: Config, command: str = "") -> list[Path]:
    """Draw the figure, or one for each value of `--each`; returns the paths. The files hold the command.

    Raises:
        UserError: records are missing, damaged, mixed, or lack what is to be drawn.
    """
    label = "family" if config.best == "scale" and config.label == "method" else config.label
    if config.kind == "scale":
        label = "family"
    curves, each = split_names(label), split_names(config.each)
    frame = load_records(config.records)
    for name in [*curves, *each]:
        if name not in frame:
            raise no_field(name, frame)
    frame = select_runs(frame, config.where)
    if held := {"collapse": "collapse", "spectrum": "spectrum", "prefix": "prefix_nll"}.get(config.kind):
        frame = frame[[bool(values) for values in frame[held].fillna("")]] if held in frame else frame[:0]
        if frame.empty:
            hint = "" if config.kind == "prefix" else ": run the cells with --probe"
            raise UserError(f"no record holds {held} metrics{hint}")
    if len(curves) > 1:
        joined = [" ".join(filter(None, map(text_of, row))) for row in frame[curves].to_numpy(dtype=object)]
        frame, label = frame.assign(label=joined), "label"
    if frame[label].isna().any():
        raise UserError(f"--label {label}: not set in {frame['path'][frame[label].isna()].iloc[0]}")
    if config.best and config.by:
        frame = select_best(frame, [*each, label, config.x], config.best, config.by)
    config = dataclasses.replace(config, label=label)
    if config.kind == "scale" and each and "identity" in frame:  # draw those of `each` that have a scale at all
        frame = frame.groupby(each).filter(lambda part: part["identity"].notna().any())
    paths = []
    for values, part in frame.groupby(each) if each else [((), frame)]:
        names = [str(value) for value in values]
        figure = figure_of(part, config, " ".join(names))
        path = Path(config.output)
        path = path.with_name("-".join([path.stem, *names]) + path.suffix)
        paths += write(figure, path, command)
    return paths


def write(figure: Figure, path: Path, command: str) -> list[Path]:
    """Save as .svg and .png, or as the ending says; the same records give the same bytes, with the command inside."""
    notes: dict[str, dict[str, str | None]] = {
        ".svg": {"Date": None, "Creator": None, "Description": command},
        ".png": {"Software": None, "Description": command},
        ".pdf": {"CreationDate": None, "Subject": command},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # laid out once for all files: with an engine, each file is drawn twice
    paths = [path] if path.suffix else [path.with_name(path.name + ending) for ending in (".svg", ".png")]
    for file in paths:
        with matplotlib.rc_context({"svg.hashsalt": "contranorm", "svg.fonttype": "none"}):
            figure.savefig(file, dpi=160, metadata=notes[file.suffix.lower()])
    return paths


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = sys.argv[1:] if argv is None else argv
    config = parse_config(Config, records_flag(words), prog="python -m repro.report.figures", description=__doc__ or "")
    find_records(config.records)  # a wrong path is the first thing to say
    for path in draw(config, shlex.join(["python", "-m", "repro.report.figures", *words])):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
