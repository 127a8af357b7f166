"""The value of a setting that validation chooses for each data set: the highest mean over the seeds that all have.

Examples:
    python -m repro.report.best results/table1 --each task_name --setting scale --by score
    python -m repro.report.best results/table3 --each data,family --columns depth --where '{norm_mode: CN}'
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import comparable, no_field, select_best, select_runs, sortable, split_names, text_of
from repro.report.records import RecordsConfig, load_records, records_flag
from repro.report.tables import markdown_table


@dataclass
class Config(RecordsConfig):
    """What to choose, and by what."""

    setting: str = "scale"
    """The field to choose a value of; runs without it (vanilla) take no part."""
    by: str = "validation_accuracy"
    """The metric that chooses: one of a validation set, a fraction."""
    each: str = "data"
    """One choice for each value of this field, or of several, separated by commas: a line each."""
    columns: str | None = None
    """Print a Markdown table with a column for each value of this field too; unset: lines of value and choice."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keep only runs whose fields have these values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not split_names(self.each):
            raise ValueError(f"--each {self.each!r} names no field")
        if "test" in self.by:
            raise ValueError(f"--by {self.by}: a test metric chooses nothing here")


def table_of(frame: pd.DataFrame, config: Config) -> pd.DataFrame:
    """`5 (66.1, of 9)`: the value chosen, the mean of the metric that chose it in percent, and how many were run."""
    each, column = split_names(config.each), str(config.columns)
    heads = {head: f"{column} {text_of(head)}" for head in sorted(set(frame[column]), key=sortable)}
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for (*place, head), runs in frame.groupby([*each, column]):
        chosen = select_best(comparable(runs, config.setting), [column], config.setting, config.by)
        mean, tried = 100 * chosen[f"metrics.{config.by}"].mean(), runs[config.setting].nunique()
        empty = dict(zip(each, map(text_of, place), strict=True)) | dict.fromkeys(heads.values(), "")
        text = f"{_short(chosen[config.setting].iloc[0])} ({mean:.1f}, of {tried})"
        rows.setdefault(tuple(place), empty)[heads[head]] = text
    return pd.DataFrame([*rows.values()])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, Real) else text_of(value)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, records_flag(argv), prog="python -m repro.report.best", description=__doc__ or "")
    each = split_names(config.each)
    frame = select_runs(load_records(config.records), config.where)
    for name in [*each, *([config.columns] if config.columns else []), config.setting]:
        if name not in frame:
            raise no_field(name, frame)
    frame = frame[frame[config.setting].notna()]
    if frame.empty:
        raise UserError(f"--setting {config.setting}: no run has it")
    if config.columns:
        print(markdown_table(table_of(frame, config)))
        return
    for values, group in select_best(frame, each, config.setting, config.by).groupby(each, sort=False):
        print(*values, _short(group[config.setting].iloc[0]))


if __name__ == "__main__":
    run_main(main)
