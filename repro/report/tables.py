"""Records become tables: mean ± std (n) of every cell, and beside them the published numbers and the reference code's.

Example: python -m repro.report.tables results/table3/runs --preset table3
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from scipy.stats import ttest_ind_from_stats

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report.published import KINDS, Entry, load_entries
from repro.report.records import CELL_FIELDS, find_records, load_records, records_flag

# What tells the runs of one cell apart: it is averaged over all of them. Graphs with ten splits have runs of each.
REPLICATES = ("seed", "split")


@dataclass
class Config:
    """What to read, and how to arrange it."""

    records: list[str] | str = field(default_factory=list)
    """Folders, files (record.json, records.jsonl) or glob patterns; also as the first words, without the flag."""
    preset: Literal["table1", "table2", "table3"] | None = None
    """Rows, columns and metric of one of the paper's tables; flags given beside it win."""
    rows: str | None = None
    """Comma-separated fields that make the rows: data, model, method, family (the method without its scale), depth,
    scale, or fields of the config."""
    columns: str | None = None
    """The field that makes the columns; empty for a single column."""
    metric: str | None = None
    """Name in the records' metrics."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only runs whose fields have these values: `--where '{data: cora}'`."""
    best: str | None = None
    """A field to choose per cell (say scale): the value with the highest mean of `--by` is shown, and named in
    brackets. With scale, rows by method become rows by family."""
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
        "rows": "model,method",
        "columns": "data",
        "metric": "score",
        "average": "cola,mnli,mrpc,qnli,qqp,rte,sst2,stsb",  # all of GLUE but WNLI, as in the paper
    },
    "table2": {"rows": "data,model,method", "columns": "depth", "metric": "test_accuracy"},
    "table3": {"rows": "data,method", "columns": "depth", "metric": "test_accuracy"},
}


AVERAGE = "average"  # column name; also how paper.yaml names a mean over tasks


def split_names(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


# -- the cells -------------------------------------------------------------------------------------------------------


def select_best(frame: pd.DataFrame, keys: list[str], best: str, by: str) -> pd.DataFrame:
    """Keep, in each group of `keys`, the runs of the value of `best` with the highest mean of metric `by`."""
    if best not in frame:
        raise UserError(f"--best {best}: no field of these records")
    if f"metrics.{by}" not in frame:
        raise UserError(f"--by {by}: no record has that metric; there are {_metrics(frame)}")
    kept = []
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        values = group[best].map(text_of)
        means = group.groupby(values, sort=False)[f"metrics.{by}"].agg(lambda numbers: numbers.mean(skipna=False))
        if means.isna().any():
            raise UserError(f"--by {by}: some runs have no such metric")
        kept.append(group[values == means.idxmax()])
    return pd.concat(kept)


def aggregate(frame: pd.DataFrame, keys: list[str], metric: str) -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for one run) and number of runs per cell.

    Raises:
        UserError: a cell mixes protocols or settings, or holds one seed (of one split) twice with different numbers.
    """
    column = f"metrics.{metric}"
    if column not in frame:
        raise UserError(f"--metric {metric}: no record has it; there are {_metrics(frame)}")
    for name in keys:
        if name not in frame:
            raise UserError(f"{name}: no field of these records")
    cells = []
    for values, group in frame.groupby(keys, dropna=False, sort=False):
        labels = dict(zip(keys, values, strict=True))
        where = ", ".join(f"{k}={v}" for k, v in labels.items())
        _check_unmixed(group, keys, where)
        numbers = _one_per_replicate(group, column, where)[column]
        if numbers.isna().any():
            path = group["path"][group[column].isna()].iloc[0]
            raise UserError(f"cell {where}: {metric} is missing or not a number in {path}")
        cells.append({**group.iloc[0], **labels, **_spread(numbers)})
    return pd.DataFrame(cells)


def _spread(numbers: pd.Series[Any]) -> dict[str, Any]:
    return {"mean": numbers.mean(), "std": numbers.std(ddof=1), "n": len(numbers)}


def add_average(
    cells: pd.DataFrame, frame: pd.DataFrame, rows: list[str], columns: str, metric: str, wanted: list[str]
) -> pd.DataFrame:
    """The cells, and for each row one more: the mean over `wanted` columns of each replicate's runs, over replicates.

    Where some row lacks one of `wanted`, the column is called `average of a, b`: no published number is of that kind.
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
            known = {k: part[k].iloc[0] for k in ("protocol", "selection", "experiment", "method", "family", "order")}
            labels = dict(zip(rows, values, strict=True)) | {columns: name}
            added.append({**known, **labels, **_spread(by_run)})
    return pd.concat([cells, pd.DataFrame(added)], ignore_index=True)


def _check_unmixed(group: pd.DataFrame, keys: list[str], where: str) -> None:
    settings = dict.fromkeys(name for names in group["settings"] for name in names)
    for name in ("protocol", "selection", "experiment", *settings, *reversed(CELL_FIELDS)):
        values = sorted({text_of(value) or "unset" for value in group[name]})
        if len(values) > 1 and name not in (*keys, *REPLICATES, "order"):
            raise UserError(f"cell {where} mixes {name}: {', '.join(values)}; add it to --rows, or choose with --where")


def split_of(frame: pd.DataFrame) -> pd.Series[Any]:
    """Each run's split of the data; one that is not set is the first."""
    given = frame["split"] if "split" in frame else pd.Series(0, index=frame.index)
    return pd.to_numeric(given, errors="coerce").fillna(0).astype(int)


def replicate(frame: pd.DataFrame) -> pd.Series[Any]:
    """(seed, split) of each run; None without a seed."""
    pairs = zip(frame["seed"], split_of(frame), strict=True)
    return pd.Series([None if pd.isna(seed) else (seed, split) for seed, split in pairs], index=frame.index)


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


# -- beside other numbers --------------------------------------------------------------------------------------------


def p_value(a: tuple[float, float | None, int | None], b: tuple[float, float | None, int | None]) -> float | None:
    """Welch's t-test from two (mean, std, n); None unless both have a std, not 0, from at least two runs."""
    for _, std, n in (a, b):
        if not std or pd.isna(std) or n is None or n < 2:
            return None
    return float(ttest_ind_from_stats(a[0], a[1], a[2], b[0], b[1], b[2], equal_var=False).pvalue)


def compare(
    frame: pd.DataFrame, cells: pd.DataFrame, rows: list[str], metric: str, entries: list[Entry], config: Config
) -> tuple[pd.DataFrame, list[str]]:
    """One row per cell with a number from elsewhere, of `metric` or else another, and notes: marks, then sources."""
    keys = [*rows, config.columns] if config.columns else rows
    others = dict.fromkeys(e.metric for e in entries if e.metric != metric and f"metrics.{e.metric}" in frame)
    table, marks, sources = [], dict[str, str](), dict[str, dict[str, None]]()
    compared: set[tuple[str, ...]] = set()
    for name in (metric, *others):
        if name != metric:
            measured = frame.dropna(subset=f"metrics.{name}")
            cells = _sorted(aggregate(measured, keys, name), rows, config.columns)
        for cell in cells.to_dict("records"):
            labels = tuple(text_of(cell[key]) for key in keys)
            found = [entry for entry in entries if entry.metric == name and entry.fits(cell)]
            if not found or (name != metric and labels in compared):
                continue
            compared |= {labels} if name == metric else set()
            for entry in found:
                sources.setdefault(KINDS[entry.kind], {})[entry.source] = None
            chosen = {config.best: text_of(cell[config.best])} if config.best and config.best not in keys else {}
            row = dict(zip(keys, labels, strict=True)) | chosen | {"metric": name}
            table.append(row | _beside(cell, found, marks, config.percent))
    beside = pd.DataFrame(table)
    if beside.empty:
        return beside, []
    if set(beside["metric"]) == {metric}:
        beside = beside.drop(columns="metric")
    beside = beside[[name for name in beside if name in keys or (beside[name] != "").any()]]
    notes = [f"{mark} {note}" for note, mark in marks.items()]
    return beside, [*notes, *(f"{title}: {'; '.join(of)}" for title, of in sources.items())]


def _beside(cell: dict[Any, Any], found: list[Entry], marks: dict[str, str], percent: bool) -> dict[str, str]:
    """The numbers of each kind in one column, then ours, and how they differ: from the released code, if it was run."""
    row = {}
    for kind, title in KINDS.items():
        entries = [entry for entry in found if entry.kind == kind]
        row[title] = " / ".join(show(e.mean, e.std, e.n, percent) + _mark(e.notes(cell), marks) for e in entries)
    ranks = ("reference-run", "authors", "third-party re-run")
    other = min(found, key=lambda entry: ranks.index(entry.kind))
    p = p_value((cell["mean"], cell["std"], int(cell["n"])), (other.mean, other.std, other.n))
    difference = cell["mean"] - other.mean
    return row | {
        "ours": show(cell["mean"], cell["std"], cell["n"], percent),
        "difference": f"{difference * 100:+.2f}" if percent else f"{difference:+.4f}",
        "p (Welch)": "" if p is None else f"{p:.2g}",
    }


def _mark(notes: list[str], used: dict[str, str]) -> str:
    """One mark for each note, in order of use; `used` is note → mark."""
    for note in notes:
        used.setdefault(note, "†‡§¶‖"[len(used) % 5] * (1 + len(used) // 5))
    return "".join(f" {used[note]}" for note in notes)


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
    order = sorted((c for c in present if c not in averages), key=_sortable) + averages
    table = []
    for values, group in texts.groupby(rows, dropna=False, sort=False):
        by_column = dict(zip(group[columns], group["text"], strict=True))
        line = dict(zip(rows, map(text_of, values), strict=True))
        table.append(line | {f"{columns} {value}": by_column.get(value, "") for value in order})
    return pd.DataFrame(table)


# -- writing ---------------------------------------------------------------------------------------------------------


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown, its columns aligned also in the source."""
    lines = [[str(name) for name in table.columns], *table.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def render(table: pd.DataFrame, style: str) -> str:
    """A table as Markdown, CSV or LaTeX."""
    if style == "markdown":
        return markdown_table(table)
    if style == "csv":
        return str(table.to_csv(index=False))
    return str(table.to_latex(index=False, escape=True)).replace("±", r"$\pm$")


def _caption(frame: pd.DataFrame, config: Config) -> str:
    seeds = sorted({int(s) for s in frame["seed"].dropna()}) if "seed" in frame else []
    splits = sorted(set(split_of(frame)))
    parts = [
        f"{config.metric}{' in %' if config.percent else ''}, mean ± sample standard deviation (number of runs)",
        f"protocol: {', '.join(sorted(set(frame['protocol'])))}",
        f"reported: {', '.join(sorted(set(frame['selection'])))}",
        f"{len(frame)} runs, seeds {', '.join(map(str, seeds)) or 'not recorded'}"
        + (f", splits {', '.join(map(str, splits))}" if len(splits) > 1 else ""),
    ]
    if config.best:
        parts.append(f"in brackets: {config.best} chosen per cell by the highest mean {config.by}")
    return "; ".join(parts) + "."


def select_runs(frame: pd.DataFrame, where: dict[str, str]) -> pd.DataFrame:
    """The runs whose fields have these values; a UserError where that leaves none."""
    for name, wanted in where.items():
        if name not in frame:
            raise UserError(f"--where {name}: no field of these records")
        frame = frame[frame[name].map(str) == str(wanted)]
    if frame.empty:
        raise UserError("no record is left after --where")
    return frame


def build(config: Config, entries: list[Entry]) -> str:
    """The whole text: caption, table, and the comparison where numbers from elsewhere exist."""
    frame = select_runs(load_records(config.records), config.where)
    rows, columns, metric = split_names(config.rows), config.columns or "", str(config.metric)
    if config.best == "scale":
        rows = ["family" if name == "method" else name for name in rows]
    keys = [*rows, columns] if columns else rows
    if config.best and config.by:
        frame = select_best(frame, keys, config.best, config.by)
    cells = _sorted(aggregate(frame, keys, metric), rows, columns)
    protocols = sorted(set(cells["protocol"]))
    if len(protocols) > 1 and "protocol" not in keys:
        raise UserError(f"the records mix protocols ({', '.join(protocols)}): add protocol to --rows, or use --where")
    if config.average and columns:
        cells = _sorted(add_average(cells, frame, rows, columns, metric, split_names(config.average)), rows, columns)
    best = None if config.best in keys else config.best
    table = render(pivot(cells, rows, columns, config.percent, best), config.format)
    beside, notes = compare(frame, cells, rows, metric, entries, config)
    if config.format == "csv":
        return table if beside.empty else f"{table}\n{render(beside, 'csv')}"
    comment = "% " if config.format == "latex" else ""
    text = f"{comment}{_caption(frame, config)}\n\n{table}"
    if beside.empty:
        return text
    below = "\n".join(f"{comment}{'' if comment else '- '}{note}." for note in notes)
    return f"{text}\n{render(beside, config.format)}\n{below}\n"


def _sorted(cells: pd.DataFrame, rows: list[str], columns: str | None = None) -> pd.DataFrame:
    """By data and model, then in the methods' own order, then by the other fields."""
    by = [name for name in (*rows, columns) if name]
    where = [name for name in by if name in ("data", "model")]
    cells = cells.reset_index(drop=True)
    places = [
        (*(_sortable(cell[name]) for name in where), cell["order"], *(_sortable(cell[name]) for name in by))
        for cell in cells.to_dict("records")
    ]
    return cells.loc[sorted(range(len(cells)), key=places.__getitem__)]


def _sortable(value: Any) -> tuple[int, float, str]:
    """What is not set first, then numbers by size, then texts."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not pd.isna(value):
        return 1, float(value), ""
    text = text_of(value)
    return (2, 0.0, text) if text else (0, 0.0, "")


def ordered_labels(cells: pd.DataFrame, label: str) -> list[Any]:
    """The values of a field in the order in which tables and figures list them."""
    return list(dict.fromkeys(_sorted(cells, [label])[label]))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, records_flag(argv), prog="python -m repro.report.tables", description=__doc__ or "")
    find_records(config.records)  # a wrong path is the first thing to say
    preset = PRESETS.get(config.preset or "", {})
    given: dict[str, Any] = {k: v if getattr(config, k) is None else getattr(config, k) for k, v in preset.items()}
    config = dataclasses.replace(config, **given)
    missing = [f"--{name}" for name in ("rows", "metric") if not getattr(config, name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: give them, or a --preset ({', '.join(PRESETS)})")
    text = build(config, load_entries())
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.output), text.encode())
    print(text, end="")


if __name__ == "__main__":
    run_main(main)
