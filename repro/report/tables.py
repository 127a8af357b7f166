"""Records become tables: mean ± std (n) of every cell, and beside them the published numbers and the reference code's.

Example: python -m repro.report.tables --preset table3 --records results/table3/runs
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from scipy.stats import ttest_ind_from_stats

from repro.config import LOCATION_FIELDS, parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report.published import PAPER, Entry, load_entries
from repro.report.records import load_records

# Fields that do not change what a run computes, up to rounding: they may differ inside a cell.
HOW_FIELDS = (
    *LOCATION_FIELDS,
    "seed",
    "device",
    "implementation",
    "checkpoint_every",
    "eval_every",
    "probe",
    "num_workers",
    "preprocessing_num_workers",
    "cache",
    "channels_last",
    "compact_embeddings",
    "fused_optimizer",
)
GNN_SCALED = ("PN", "PN-SI", "PN-SCS")  # their scale is 1 where it is not given
# What tells the runs of one cell apart: it is averaged over all of them. Graphs with ten splits have runs of each.
REPLICATES = ("seed", "split")


@dataclass
class Config:
    """What to read, and how to arrange it."""

    records: list[str] | str = field(default_factory=list)
    """A folder, file (record.json, records.jsonl) or glob pattern; several as `--records '[a, b]'`."""
    preset: Literal["table1", "table2", "table3"] | None = None
    """Rows, columns and metric of one of the paper's tables; flags given beside it win."""
    rows: str | None = None
    """Comma-separated config fields that make the rows."""
    columns: str | None = None
    """The config field that makes the columns; empty for a single column."""
    metric: str | None = None
    """Name in the records' metrics."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only runs whose config fields have these values: `--where '{data: cora}'`."""
    best: str | None = None
    """A field to choose per cell (say norm_scale): the value with the highest mean of `--by` is shown, and named in
    brackets."""
    by: str | None = None
    """The metric that chooses: one of a validation set, as choosing by test would overstate what is reached."""
    average: str | None = None
    """Comma-separated columns whose mean becomes a further column, run by run (those of equal seed belong together);
    where some row lacks one of them, it is taken over the columns that all rows have, and named so."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """How the table is written."""
    percent: bool = True
    """Show fractions times 100."""
    output: str | None = None
    """File to write the table to, beside printing it."""

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("--records is missing: name a folder of runs")
        if (self.best is None) != (self.by is None):
            raise ValueError("--best and --by belong together: the field to choose, and the metric that chooses")
        if self.by is not None and "test" in self.by:
            raise ValueError(f"--by {self.by}: a choice by test numbers is none; name a validation metric")
        if self.average and self.columns == "":
            raise ValueError("--average needs --columns: it is the mean over some of them")


PRESETS: dict[str, dict[str, str]] = {
    "table1": {
        "rows": "model,norm",
        "columns": "task",
        "metric": "score",
        "average": "cola,mnli,mrpc,qnli,qqp,rte,sst2,stsb",  # all of GLUE but WNLI, as in the paper
    },
    "table2": {"rows": "data_set,model,norm,scale", "columns": "depth", "metric": "test_accuracy"},
    "table3": {"rows": "data,norm", "columns": "nlayer", "metric": "test_accuracy"},
}


AVERAGE = "average"  # column name; also how paper.yaml names a mean over tasks


def names_in(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


# -- the cells -------------------------------------------------------------------------------------------------------


def prepare(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Config fields under their own names, and which those are.

    A result that is named as a setting becomes `record.<name>`. The gnn records also get `norm`, a row label made of
    mode, scale and LayerNorm.
    """
    settings = [c.removeprefix("config.") for c in frame.columns if c.startswith("config.")]
    names = {c: f"record.{c}" for c in frame.columns if c in settings and c != "seed"}  # a result named as a setting
    plain = frame.drop(columns="seed") if "seed" in settings and "seed" in frame else frame
    plain = plain.rename(columns=names | {f"config.{name}": name for name in settings})
    if "split" in plain:  # whole numbers, which pandas makes floats of where some runs have none
        plain["split"] = pd.Series([_whole(value) for value in plain["split"]], index=plain.index, dtype=object)
    if "norm_mode" in plain:
        unset = plain["norm_scale"].isna() & plain["norm_mode"].isin(GNN_SCALED)
        plain["norm_scale"] = plain["norm_scale"].astype(object).mask(unset, 1.0)
        plain["norm"] = [_gnn_label(row) for _, row in plain.iterrows()]
    return plain, settings


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _gnn_label(row: pd.Series[Any]) -> str:
    label = str(row["norm_mode"])
    if label == "CN" or (label in GNN_SCALED and row["norm_scale"] != 1):
        label += f" s={row['norm_scale']:g}"
    return label + (" + LayerNorm" if row.get("use_layer_norm") else "")


def choose(frame: pd.DataFrame, keys: list[str], best: str, by: str) -> pd.DataFrame:
    """Keep, in each group of `keys`, the runs of the value of `best` with the highest mean of metric `by`."""
    if f"metrics.{by}" not in frame:
        raise UserError(f"--by {by}: no record has that metric; there are {_metrics(frame)}")
    means = frame.groupby([*keys, best], dropna=False, sort=False)[f"metrics.{by}"].mean()
    if means.isna().any():
        raise UserError(f"--by {by}: some runs have no such metric")
    winners = means.reset_index().sort_values(f"metrics.{by}", ascending=False).drop_duplicates(keys)
    return frame.merge(winners[[*keys, best]], on=[*keys, best])


def aggregate(frame: pd.DataFrame, keys: list[str], metric: str, settings: list[str]) -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for one run) and number of runs per cell.

    Raises:
        UserError: a cell mixes protocols, selections or settings, or holds one seed (of one split) twice with
            different numbers.
    """
    column = f"metrics.{metric}"
    if column not in frame:
        raise UserError(f"--metric {metric}: no record has it; there are {_metrics(frame)}")
    for name in keys:
        if name not in frame:
            raise UserError(f"{name}: no config field of these records")
    cells = []
    for values, group in frame.groupby(keys, dropna=False, sort=False):
        labels = dict(zip(keys, values, strict=True))
        where = ", ".join(f"{k}={v}" for k, v in labels.items())
        _check_unmixed(group, [s for s in settings if s not in (*keys, *REPLICATES)], where)
        numbers = pd.to_numeric(_one_per_replicate(group, column, where)[column])
        if numbers.isna().any():
            raise UserError(
                f"cell {where}: {metric} is missing or not a number in {_first(group[group[column].isna()])}"
            )
        known = {name: group[name].iloc[0] for name in frame.columns if "." not in name and name not in labels}
        cells.append({**known, **labels, "mean": numbers.mean(), "std": numbers.std(ddof=1), "n": len(numbers)})
    return pd.DataFrame(cells)


def add_average(
    cells: pd.DataFrame, frame: pd.DataFrame, rows: list[str], columns: str, metric: str, wanted: list[str]
) -> pd.DataFrame:
    """The cells, and for each row one more: the mean over `wanted` columns of each replicate's runs, over replicates.

    Its column is called `average`, or `average of a, b` when these are all of `wanted` that every row has: such a mean
    is not comparable with a published one. No column is added when that leaves fewer than two.
    """
    groups = list(frame.groupby(rows, dropna=False, sort=False))
    shared = [w for w in wanted if all((group[columns].astype(str) == w).any() for _, group in groups)]
    if len(shared) < 2:
        return cells
    name = AVERAGE if len(shared) == len(wanted) else f"{AVERAGE} of {', '.join(shared)}"
    added = []
    for values, group in groups:
        part = group[group[columns].astype(str).isin(shared)]
        part = part.assign(replicate=replicate(part))
        by_run = part.pivot_table(index="replicate", columns=columns, values=f"metrics.{metric}").dropna().mean(axis=1)
        if len(by_run):
            labels = dict(zip(rows, values, strict=True))
            known = {k: part[k].iloc[0] for k in ("protocol", "selection", "experiment")}
            spread = {"mean": by_run.mean(), "std": by_run.std(ddof=1), "n": len(by_run)}
            added.append({**known, **labels, columns: name, **spread})
    return pd.concat([cells, pd.DataFrame(added)], ignore_index=True)


def _check_unmixed(group: pd.DataFrame, settings: list[str], where: str) -> None:
    for name in ("protocol", "selection", "experiment", *settings):
        values = sorted({str(v) for v in group[name]})
        if len(values) > 1 and name not in HOW_FIELDS:
            raise UserError(f"cell {where} mixes {name}: {', '.join(values)}; add it to --rows, or choose with --where")


def replicate(frame: pd.DataFrame) -> pd.Series[Any]:
    """(seed, split) of each run; a split that is not set is the first one. None without a seed."""
    splits = (
        pd.to_numeric(frame["split"], errors="coerce").fillna(0)
        if "split" in frame
        else pd.Series(0, index=frame.index)
    )
    pairs = zip(frame["seed"], splits, strict=True)
    return pd.Series([None if pd.isna(seed) else (seed, int(split)) for seed, split in pairs], index=frame.index)


def _one_per_replicate(group: pd.DataFrame, column: str, where: str) -> pd.DataFrame:
    """The same run found twice (say, in two result folders) counts once; two different ones are an error."""
    runs = replicate(group)
    if runs.isna().any() or not runs.duplicated().any():
        return group
    for (seed, split), same in group[runs.duplicated(keep=False)].groupby(runs):
        if same[column].nunique() > 1:
            which = f"seed {seed}" + (f" of split {split}" if "split" in group and group["split"].notna().any() else "")
            raise UserError(f"cell {where}: {which} is there twice with different numbers: {', '.join(same['path'])}")
    return group[~runs.duplicated()]


def _metrics(frame: pd.DataFrame) -> str:
    return ", ".join(c.removeprefix("metrics.") for c in frame.columns if c.startswith("metrics.")) or "none"


def _first(group: pd.DataFrame) -> str:
    return str(group["path"].iloc[0]) if len(group) else "a record"


# -- beside other numbers --------------------------------------------------------------------------------------------


def p_value(a: tuple[float, float | None, int | None], b: tuple[float, float | None, int | None]) -> float | None:
    """Welch's t-test from two (mean, std, n); None unless both have a std from at least two runs."""
    for _, std, n in (a, b):
        if std is None or pd.isna(std) or n is None or n < 2:
            return None
    if a[1] == 0 and b[1] == 0:
        return None
    return float(ttest_ind_from_stats(a[0], a[1], a[2], b[0], b[1], b[2], equal_var=False).pvalue)


def compare(
    cells: pd.DataFrame, keys: list[str], metric: str, entries: list[Entry], percent: bool, best: str | None = None
) -> pd.DataFrame:
    """One row per cell that has a number from elsewhere: published | reference code as run | ours | difference | p."""
    rows = []
    for _, cell in cells.iterrows():
        known = {str(k): v for k, v in cell.to_dict().items()}
        found = {kind: [e for e in entries if e.kind == kind and e.fits(known, metric)] for kind in _KIND_TITLES}
        if not any(found.values()):
            continue
        row: dict[str, str] = {key: text_of(cell[key]) for key in [*keys, *([best] if best else [])]}
        for kind, title in _KIND_TITLES.items():
            row[title] = " / ".join(show(e.mean, e.std, e.n, percent) for e in found[kind])
        row["ours"] = show(cell["mean"], cell["std"], cell["n"], percent)
        # Against the released code where it was run here (it has a spread), else against the published number.
        other = (found["reference-run"] or found["published"])[0]
        row["difference"] = f"{(cell['mean'] - other.mean) * (100 if percent else 1):+.{2 if percent else 4}f}"
        p = p_value((cell["mean"], cell["std"], int(cell["n"])), (other.mean, other.std, other.n))
        row["p (Welch)"] = "" if p is None else f"{p:.2g}"
        rows.append(row)
    return pd.DataFrame(rows)


_KIND_TITLES = {"published": "published", "reference-run": "reference code as run"}


def show(mean: float, std: float | None, n: int | None, percent: bool = True) -> str:
    """`81.73 ± 0.26 (5)`; what is not known is left out."""
    factor, digits = (100, 2) if percent else (1, 4)
    text = f"{mean * factor:.{digits}f}"
    if std is not None and not pd.isna(std):
        text += f" ± {std * factor:.{digits}f}"
    return text if n is None else f"{text} ({int(n)})"


def text_of(value: Any) -> str:
    """A field's value; nothing where it is not set."""
    return "" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value)


def pivot(cells: pd.DataFrame, rows: list[str], columns: str, percent: bool, best: str | None = None) -> pd.DataFrame:
    """The cells as text, rows in order of appearance, columns in their natural order; the chosen value in brackets."""

    def text(cell: pd.Series[Any]) -> str:
        chosen = text_of(cell[best]) if best else ""
        return show(cell["mean"], cell["std"], cell["n"], percent) + (f" [{chosen}]" if chosen else "")

    texts = cells.assign(text=[text(cell) for _, cell in cells.iterrows()])
    if not columns:
        labels = texts[rows].map(text_of)
        return labels.assign(**{"mean ± std (n)": texts["text"]})
    present = list(dict.fromkeys(texts[columns]))
    averages = [c for c in present if str(c).startswith(AVERAGE)]
    order = sorted(c for c in present if c not in averages) + averages
    table = []
    for values, group in texts.groupby(rows, dropna=False, sort=False):
        by_column = dict(zip(group[columns], group["text"], strict=True))
        line = dict(zip(rows, map(text_of, values), strict=True))
        table.append(line | {f"{columns} {value}": by_column.get(value, "") for value in order})
    return pd.DataFrame(table)


# -- writing ---------------------------------------------------------------------------------------------------------


def render(table: pd.DataFrame, style: str) -> str:
    """A table of strings as Markdown, CSV or LaTeX."""
    if style == "csv":
        return str(table.to_csv(index=False))
    head, body = [str(c) for c in table.columns], table.astype(str).to_numpy().tolist()
    if style == "latex":
        lines = [r"\begin{tabular}{" + "l" * len(head) + "}", r"\toprule", _latex(head), r"\midrule"]
        return "\n".join([*lines, *map(_latex, body), r"\bottomrule", r"\end{tabular}"]) + "\n"
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *body]]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _latex(row: list[str]) -> str:
    escaped = [c.replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$") for c in row]
    return " & ".join(escaped) + r" \\"


def _caption(frame: pd.DataFrame, config: Config) -> str:
    seeds = sorted({int(s) for s in frame["seed"].dropna()}) if "seed" in frame else []
    parts = [
        f"{config.metric}{' in %' if config.percent else ''}, mean ± sample standard deviation (number of runs)",
        f"protocol: {', '.join(sorted(set(frame['protocol'])))}",
        f"reported: {', '.join(sorted(set(frame['selection'])))}",
        f"{len(frame)} runs, seeds {', '.join(map(str, seeds)) or 'not recorded'}{_splits(frame)}",
    ]
    if config.best:
        parts.append(f"in brackets: {config.best} chosen per cell by the highest mean {config.by}")
    return "; ".join(parts) + "."


def _splits(frame: pd.DataFrame) -> str:
    """Which splits of the data the runs are of, where that is more than one."""
    given = pd.to_numeric(frame["split"], errors="coerce") if "split" in frame else pd.Series(dtype=float)
    found = sorted({int(split) for split in given.fillna(0)})
    return f", splits {', '.join(map(str, found))}" if len(found) > 1 else ""


def build(config: Config, entries: list[Entry]) -> str:
    """The whole text: caption, table, and the comparison where numbers from elsewhere exist."""
    frame, settings = prepare(load_records(config.records))
    for name, wanted in config.where.items():
        if name not in frame:
            raise UserError(f"--where {name}: no config field of these records")
        frame = frame[frame[name].map(str) == str(wanted)]
    if frame.empty:
        raise UserError("no record is left after --where")
    rows, columns = names_in(config.rows), config.columns or ""
    keys = [*rows, columns] if columns else rows
    metric = str(config.metric)
    if config.best and config.by:
        if config.best not in frame:
            raise UserError(f"--best {config.best}: no config field of these records")
        frame = choose(frame, keys, config.best, config.by)
    cells = aggregate(frame, keys, metric, settings)
    if len(set(cells["protocol"])) > 1 and "protocol" not in keys:
        raise UserError(
            f"the records mix protocols ({', '.join(sorted(set(cells['protocol'])))}): add protocol to --rows, "
            "or choose one with --where '{protocol: ...}'"
        )
    cells = _sorted(cells, rows)
    if config.average and columns:
        cells = add_average(cells, frame, rows, columns, metric, names_in(config.average))
    best = None if config.best in keys else config.best
    table = render(pivot(cells, rows, columns, config.percent, best), config.format)
    beside = compare(cells, keys, metric, entries, config.percent, best)
    if config.format == "csv":
        return table if beside.empty else f"{table}\n{render(beside, 'csv')}"
    mark = "% " if config.format == "latex" else ""
    text = f"{mark}{_caption(frame, config)}\n\n{table}"
    return text if beside.empty else f"{text}\n{render(beside, config.format)}"


NORM_ORDER = ("None", "LN", "PN", "PN-SI", "PN-SCS", "BatchNorm", "CN")


def _sorted(cells: pd.DataFrame, rows: list[str]) -> pd.DataFrame:
    """Rows as a reader expects them: baselines first, without the LayerNorm before with it, scales ascending."""
    if "norm_mode" not in cells:
        return cells.sort_values(rows, kind="stable", key=lambda column: column.map(_sortable))
    rank = {name: index for index, name in enumerate(NORM_ORDER)}
    order = pd.DataFrame(
        {
            "data": cells["data"],
            "mode": [rank.get(str(m), len(rank)) for m in cells["norm_mode"]],
            "scale": pd.to_numeric(cells["norm_scale"]).fillna(0.0),
            "layer_norm": cells["use_layer_norm"],
        }
    )
    return cells.loc[order.sort_values(list(order.columns), kind="stable").index]


def _sortable(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts; what is not set, and what says `none`, first."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not pd.isna(value):
        return 1, float(value), ""
    text = text_of(value)
    return (0, 0.0, text) if text.lower() in ("", "none", "vanilla", "layer") else (2, 0.0, text)


def label_order(cells: pd.DataFrame, label: str) -> list[Any]:
    """The values of a field in the order in which tables and figures list them."""
    return list(dict.fromkeys(_sorted(cells.reset_index(drop=True), [label])[label]))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.report.tables", description=__doc__ or "")
    preset = PRESETS.get(config.preset or "", {})
    given: dict[str, Any] = {k: v if getattr(config, k) is None else getattr(config, k) for k, v in preset.items()}
    config = dataclasses.replace(config, **given)
    missing = [f"--{name}" for name in ("rows", "metric") if not getattr(config, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: give them, or a --preset ({', '.join(PRESETS)})")
    entries = [e for e in load_entries(PAPER) if config.preset in (None, e.table)]
    text = build(config, entries)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.output), text.encode())
        print(f"wrote {config.output}", file=sys.stderr)
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
