"""Runs become cells: chosen, averaged over seeds and splits, ordered as tables and figures list them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import pandas as pd

from repro.config import LOCATION_FIELDS
from repro.errors import UserError
from repro.report.records import CELL_FIELDS

# What tells the runs of one cell apart: it is averaged over all of them. Graphs with ten splits have runs of each.
REPLICATES = ("seed", "split")
# How long a run trains, and among how many settings its own were chosen: a difference between two budgets is none
# between methods.
BUDGET = ("epochs", "num_train_epochs", "tuning_trials")
AVERAGE = "average"  # column name; also how paper.yaml names a mean over tasks


def split_names(text: str | None) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def rows_of(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    """One dictionary per row, as `to_dict("records")` makes them, which takes long on frames of many columns."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.to_numpy(dtype=object)]


def select_runs(frame: pd.DataFrame, where: dict[str, Any]) -> pd.DataFrame:
    """The runs whose fields have these values; a UserError where that leaves none."""
    for name, wanted in where.items():
        if name not in frame:
            raise no_field(f"--where {name}", frame)
        frame = frame[[is_value(value, wanted) for value in frame[name]]]
    if frame.empty:
        raise UserError("no record is left after --where")
    return frame


def is_value(value: Any, wanted: Any) -> bool:
    """Whether a field has the value that a flag or a file names: numbers as numbers (1 is 1.0), all else as text."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value) == float(wanted)
        except (TypeError, ValueError):
            return False
    return str(value) == str(wanted)


def select_best(frame: pd.DataFrame, keys: list[str], best: str, by: str) -> pd.DataFrame:
    """Keep, in each group of `keys`, the runs of the value of `best` with the highest mean of metric `by`.

    The mean is over the runs that `comparable` keeps: more seeds of one value than of another decide nothing.

    Raises:
        UserError: a field or the metric is missing, or the values have no seed in common.
    """
    _check_fields(frame, keys)
    if best not in frame:
        raise no_field(f"--best {best}", frame)
    if f"metrics.{by}" not in frame:
        raise UserError(f"--by {by}: no record has that metric; there are {metrics_of(frame)}")
    kept = []
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        values = group[best].map(text_of)
        scores = comparable(group, best)[f"metrics.{by}"].groupby(values, sort=False)
        means = scores.agg(lambda numbers: numbers.mean(skipna=False))
        if means.isna().any():
            raise UserError(f"--by {by}: some runs have no such metric")
        kept.append(group[values == means.idxmax()])
    return pd.concat(kept)


def comparable(group: pd.DataFrame, name: str) -> pd.DataFrame:
    """The runs of those seeds (and splits) that all values of the field `name` have; a UserError where none is."""
    values = group[name].map(text_of)
    shared = values.groupby(replicate(group), dropna=False).transform("nunique") == values.nunique()
    if not shared.any():
        raise UserError(f"no seed has runs of every {name} ({', '.join(dict.fromkeys(values))}): choose with --where")
    return group[shared]


def aggregate(frame: pd.DataFrame, keys: list[str], metric: str) -> pd.DataFrame:
    """Mean, sample standard deviation (NaN for one run) and number of runs per cell; its `runs` and their `values`.

    Raises:
        UserError: a cell mixes protocols or settings, or holds one seed (of one split) twice with different numbers.
    """
    column = f"metrics.{metric}"
    if column not in frame:
        raise UserError(f"--metric {metric}: no record has it; there are {metrics_of(frame)}")
    _check_fields(frame, keys)
    cells = []
    for labelled, group in frame.groupby(keys, dropna=False, sort=False):
        labels = dict(zip(keys, labelled, strict=True))
        where = ", ".join(f"{k}={v}" for k, v in labels.items())
        for name, found in mixed(group, keys).items():
            raise UserError(f"cell {where} mixes {name}: {', '.join(found)}; add it to --rows, or choose with --where")
        runs = one_per_replicate(group, column, where)
        if runs[column].isna().any():
            path = runs["path"][runs[column].isna()].iloc[0]
            raise UserError(f"cell {where}: {metric} is missing or not a number in {path}")
        seeds = replicate(runs)
        index = pd.Index(seeds.where(seeds.notna(), runs["path"]), tupleize_cols=False)
        values = pd.Series(runs[column].to_numpy(dtype=float), index=index)
        cells.append({**group.iloc[0], **labels, **spread_of(values), "runs": runs})
    return pd.DataFrame(cells)


def spread_of(numbers: pd.Series[Any]) -> dict[str, Any]:
    """Mean, sample standard deviation, number and values of a cell's runs."""
    return {"mean": numbers.mean(), "std": numbers.std(ddof=1), "n": len(numbers), "values": numbers}


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
            fixed = ("protocol", "selection", "experiment", "method", "family", "order", "num_hidden_layers", *BUDGET)
            known = {k: part[k].iloc[0] for k in fixed if k in part}
            labels = dict(zip(rows, values, strict=True)) | {columns: name}
            added.append({**known, **labels, **spread_of(by_run)})
    return pd.concat([cells, pd.DataFrame(added)], ignore_index=True)


def comparison(cells: pd.DataFrame, keys: Sequence[str], varied: str) -> list[str]:
    """The fields in which two cells must agree to be compared in `varied`: the other keys, and the budget."""
    return [name for name in dict.fromkeys([*keys, *BUDGET]) if name != varied and name in cells]


def mixed(group: pd.DataFrame, keys: Sequence[str]) -> dict[str, list[str]]:
    """Fields that decide what was computed, but differ within a cell (seed and split may), with their values."""
    settings = dict.fromkeys(name for names in group["settings"] for name in names)
    fields = [n for n in ("protocol", "selection", "experiment", *settings, *reversed(CELL_FIELDS)) if n not in keys]
    fields = [name for name in fields if name not in (*REPLICATES, "order", "note")]
    columns = zip(fields, group[fields].to_numpy(dtype=object).T, strict=True)  # one by one they take ten times as long
    values = {name: sorted({text_of(value) or "unset" for value in column}) for name, column in columns}
    return {name: found for name, found in values.items() if len(found) > 1}


def notes_on(cells: pd.DataFrame) -> list[str]:
    """What the cells' records say below a table of their methods, each note once."""
    return list(dict.fromkeys(note for text in cells["note"] for note in text_of(text).splitlines()))


def separate(frame: pd.DataFrame, keys: Sequence[str], metric: str) -> list[str]:
    """The keys, and the fields that it takes beside them so that no cell mixes runs or holds one twice."""
    keys = [*keys]
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        keys += [name for name in mixed(group, keys) if name not in keys]
    for _, group in frame.groupby(keys, dropna=False, sort=False):
        runs = replicate(group)
        if group[f"metrics.{metric}"].groupby(runs).nunique().max() > 1:
            how = dict.fromkeys(name for names in group["execution_fields"] for name in names if name in group)
            differ = [name for name in how if name not in LOCATION_FIELDS and group[name].map(text_of).nunique() > 1]
            keys += [name for name in differ if name not in keys]
    return keys


def split_of(frame: pd.DataFrame) -> pd.Series[Any]:
    """Each run's split of the data; one that is not set is the first."""
    given = frame["split"] if "split" in frame else pd.Series(0, index=frame.index)
    return pd.to_numeric(given, errors="coerce").fillna(0).astype(int)


def replicate(frame: pd.DataFrame) -> pd.Series[Any]:
    """(seed, split) of each run; None without a seed."""
    pairs = zip(frame["seed"], split_of(frame), strict=True)
    return pd.Series([None if pd.isna(seed) else (seed, split) for seed, split in pairs], index=frame.index)


def one_per_replicate(group: pd.DataFrame, column: str, where: str) -> pd.DataFrame:
    """The same run found twice (say, in two result folders) counts once; two different ones are an error."""
    runs = replicate(group)
    if runs.isna().any() or not runs.duplicated().any():
        return group
    for (seed, split), same in group[runs.duplicated(keep=False)].groupby(runs):
        if same[column].nunique() > 1:
            which = f"seed {seed}" + (f" of split {split}" if "split" in group and group["split"].notna().any() else "")
            raise UserError(f"cell {where}: {which} is there twice with different numbers: {', '.join(same['path'])}")
    return group[~runs.duplicated()]


def _check_fields(frame: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame:
            raise no_field(name, frame)


def no_field(name: str, frame: pd.DataFrame) -> UserError:
    """`name` is no field of the records; the error lists those that are."""
    return UserError(f"{name}: no field of these records; there are {fields_of(frame)}")


def fields_of(frame: pd.DataFrame) -> str:
    """The fields that can make rows and columns, in a list: those of the cell, then those of the config."""
    cell = [*CELL_FIELDS, "family", "experiment", "protocol", "selection", "seed"]
    fields = dict.fromkeys([*cell, *(field for fields in frame["settings"] for field in fields)])
    shown = (name for name in fields if name not in ("order", "note"))
    return ", ".join(name for name in shown if name in frame and frame[name].notna().any())


def metrics_of(frame: pd.DataFrame) -> str:
    """The names of the metrics, in a list."""
    return ", ".join(c.removeprefix("metrics.") for c in frame.columns if c.startswith("metrics.")) or "none"


def in_order(cells: pd.DataFrame, rows: list[str], columns: str | None = None) -> pd.DataFrame:
    """By data and model, then in the methods' own order, then by the other fields."""
    by = [name for name in (*rows, columns) if name]
    where = [name for name in by if name in ("data", "model")]
    cells = cells.reset_index(drop=True)
    known = rows_of(cells)
    method = next((name for name in ("method", "family") if name in rows), "order")
    first: dict[Any, Any] = {}  # a chosen scale is part of the order, but a family has one place
    for cell in known:
        first[cell[method]] = min(first.get(cell[method], cell["order"]), cell["order"])
    places = [
        (*(sortable(cell[name]) for name in where), first[cell[method]], *(sortable(cell[name]) for name in by))
        for cell in known
    ]
    return cells.loc[sorted(range(len(cells)), key=places.__getitem__)]


def sortable(value: Any) -> tuple[int, float, str]:
    """What is not set first, then numbers by size, then texts."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and not pd.isna(float(value)):
        return 1, float(value), ""
    text = text_of(value)
    return (2, 0.0, text) if text else (0, 0.0, "")


def ordered_labels(cells: pd.DataFrame, label: str) -> list[Any]:
    """The values of a field in the order in which tables and figures list them."""
    return list(dict.fromkeys(in_order(cells, [label])[label]))


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


def signed(value: float, percent: bool) -> str:
    """A difference with its sign, in points or as a fraction."""
    factor, digits = (100, 2) if percent else (1, 4)
    return f"{round(value * factor, digits) + 0.0:+.{digits}f}"  # no -0.00
