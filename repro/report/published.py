"""Numbers from elsewhere (paper.yaml): the authors', re-runs by others, and the released code as it runs here.

`python -m repro.report.published --where '{data: ogbn-arxiv}'` lists them, in %.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.config import load_yaml, parse_config
from repro.errors import UserError, run_main

if TYPE_CHECKING:
    import pandas as pd

PAPER = Path(__file__).with_name("paper.yaml")
# Kind → the column that shows it.
KINDS = {
    "authors": "published",
    "third-party re-run": "re-run by others",
    "reference-run": "reference code as run",
}
_GROUP_KEYS = {"source", "kind", "match", "by", "cells", "metric", "n", "note", "inference"}
_CELL_KEYS = {"method", "values", "note", "inference"}
METHOD = "ContraNorm"  # the start of the names of the rows that the published numbers are about
BEST_SCALE = "the source gives one number for this method, at a scale that it chose"


@dataclass(frozen=True)
class Entry:
    """One number from elsewhere, as a fraction; std over runs and n where the source gives them.

    `match` holds columns of the records and their values in the cells that the number belongs to. Its `method` may be
    one of several, and one without a scale belongs to every scale. A note on an inferred match starts "inference:".
    """

    kind: str
    source: str
    match: dict[str, Any]
    metric: str
    mean: float
    std: float | None = None
    n: int | None = None
    note: str = ""

    @property
    def place(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """Metric and matched columns but the method: what numbers that can be ranked against each other share."""
        return self.metric, tuple(sorted((name, value) for name, value in self.match.items() if name != "method"))

    def fits(self, cell: Mapping[Any, Any]) -> bool:
        """True when the number belongs to this cell: every matched column is known there and equal, or unset for null.

        Runs whose settings were chosen among many on validation have none: what was published had not their budget.
        """
        trials = cell.get("tuning_trials")
        if trials is not None and trials == trials:  # set, and not NaN
            return False
        return all(
            bool({cell.get("method"), cell.get("family")} & set(wanted))
            if name == "method"
            else str(value := cell.get(name)) == str(wanted) or value == wanted or (wanted is None and value != value)
            for name, wanted in self.match.items()
        )

    def notes(self, cell: Mapping[Any, Any]) -> list[str]:
        """What to say below a table that shows this number in the row of `cell`."""
        any_scale = "method" in self.match and cell.get("method") not in self.match["method"]
        return [note for note in (self.note, BEST_SCALE if any_scale else "") if note]


@functools.cache
def load_entries(path: Path = PAPER) -> tuple[Entry, ...]:
    """Read and check a file of numbers; percent become fractions.

    Raises:
        UserError: a key is unknown or missing, a value is no percentage, a source is not listed.
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or not {"sources", "groups"} <= set(content) <= {"sources", "groups", "notes"}:
        raise UserError(f"{path}: must hold the keys sources and groups")
    entries = []
    for number, group in enumerate(content["groups"], start=1):
        where = f"{path}: group {number}"
        _check_keys(group, _GROUP_KEYS, {"source", "kind", "match", "by", "cells"}, where)
        source, kind, n = content["sources"].get(group["source"]), group["kind"], group.get("n")
        if source is None:
            raise UserError(f"{where}: source {group['source']!r} is not listed under sources")
        if kind not in KINDS:
            raise UserError(f"{where}: kind {kind!r} is none of {', '.join(KINDS)}")
        if not isinstance(group["match"], dict) or not group["match"]:
            raise UserError(f"{where}: match must name the columns of a cell")
        if n is not None and (not isinstance(n, int) or n < 1):
            raise UserError(f"{where}: n {n!r} is no number of runs")
        names = group["by"].split(".")
        for cell in group["cells"]:
            _check_keys(cell, _CELL_KEYS, {"method", "values"}, where)
            methods = cell["method"] if isinstance(cell["method"], list) else [cell["method"]]
            inference = cell.get("inference", group.get("inference"))
            note = f"inference: {inference}" if inference else cell.get("note", group.get("note", ""))
            for key, value in cell["values"].items():
                keyed = dict(zip(names, str(key).split(".") if len(names) > 1 else [key], strict=True))
                match = {**group["match"], "method": methods, **keyed}
                metric = match.pop("metric", group.get("metric"))
                if not isinstance(metric, str):
                    raise UserError(f"{where}: metric is missing: name it, or key the values by it")
                mean, std = value if isinstance(value, list) else (value, None)
                named = f"{where}, {methods[0]} {key}"
                spread = None if std is None else _fraction(std, f"{named}: std")
                entries.append(Entry(kind, source, match, metric, _fraction(mean, f"{named}: mean"), spread, n, note))
    return tuple(entries)


def _check_keys(part: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(part, dict) or set(part) - known:
        raise UserError(f"{where}: unknown keys {sorted(set(part) - known) if isinstance(part, dict) else part!r}")
    if needed - set(part):
        raise UserError(f"{where}: {', '.join(sorted(needed - set(part)))} missing")


def _fraction(percent: Any, where: str) -> float:
    """A percentage as a fraction, without the rounding error of the division."""
    if isinstance(percent, bool) or not isinstance(percent, (int, float)) or not 0 <= percent <= 100:
        raise UserError(f"{where} {percent!r} is no percentage between 0 and 100")
    return round(percent / 100, 8)


@dataclass
class Config:
    """Which numbers to list."""

    where: dict[str, Any] = field(default_factory=dict)
    """Those whose kind, metric or matched column has this value: `--where '{data: cora, depth: 8}'`."""
    columns: str | None = None
    """A column for each value of this one, named with its metric; unset: one number a line."""


def _wide(table: pd.DataFrame, columns: str) -> pd.DataFrame:
    """A column for each value of `columns`, named with its metric where there are several."""
    import pandas as pd

    if columns not in table:
        raise UserError(f"--columns {columns}: these numbers have {', '.join(table.columns.drop('%'))}")
    one = "metric" not in table or table["metric"].nunique() == 1
    head = f"{columns} " + table[columns] if one else table[columns] + " " + table["metric"]
    rest = [name for name in table if name not in (columns, "metric", "%")]
    heads = pd.Series(head.to_numpy(), index=table[columns].str.zfill(9))  # 8 before 16
    order = (heads.sort_index(kind="stable") if one else heads).unique()
    wide = table.assign(head=head).pivot(index=rest, columns="head", values="%")
    return wide.loc[pd.MultiIndex.from_frame(table[rest].drop_duplicates()), list(order)].fillna("").reset_index()


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    import pandas as pd

    from repro.report.cells import is_value, show, text_of
    from repro.report.tables import markdown_table

    config = parse_config(Config, argv, prog="python -m repro.report.published", description=__doc__ or "")
    rows, sources = [], dict[tuple[str, str], None]()
    for entry in load_entries():
        row = {**entry.match, "method": entry.match["method"][0], "metric": entry.metric, "kind": entry.kind}
        if all(is_value(row.get(name), value) for name, value in config.where.items()):
            rows.append(row | {"%": show(entry.mean, entry.std, entry.n)})
            sources[entry.kind, entry.source] = None
    if not rows:
        raise UserError(f"--where {config.where}: no number in {PAPER.name} is of that kind")
    table = pd.DataFrame(rows, dtype=object)
    last = ["method", "metric", "%", "kind"]
    names = [name for name in [*table.columns.difference(last, sort=False), *last] if name not in config.where]
    table = table[names].map(text_of)
    table = table[[name for name in names if (table[name] != "").any()]]
    if config.columns:
        table = _wide(table, config.columns)
    print(markdown_table(table))
    print("".join(f"- {kind}: {source}.\n" for kind, source in sources), end="")


if __name__ == "__main__":
    run_main(main)
