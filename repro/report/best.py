"""Print, for each data set, the value of a setting whose runs have the highest mean of a validation metric.

Example: python -m repro.report.best results/table1 --each task --setting scale --by score
"""

from __future__ import annotations

from dataclasses import dataclass, field

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import no_field, select_best, select_runs, split_names, text_of
from repro.report.records import RecordsConfig, load_records, records_flag


@dataclass
class Config(RecordsConfig):
    """What to choose, and by what."""

    setting: str = "scale"
    """The field to choose a value of; runs without it (vanilla) take no part."""
    by: str = "score"
    """The metric that chooses: one of a validation set."""
    each: str = "data"
    """One choice for each value of this field, or of several, separated by commas."""
    where: dict[str, str] = field(default_factory=dict)
    """Keep only runs whose fields have these values."""
    seeds: list[int] = field(default_factory=list)
    """Choose by the runs of these seeds; unset: by all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "test" in self.by:
            raise ValueError(f"--by {self.by}: a test metric chooses nothing here")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, records_flag(argv), prog="python -m repro.report.best", description=__doc__ or "")
    each = split_names(config.each)
    frame = select_runs(load_records(config.records), config.where)
    for name in [*each, config.setting]:
        if name not in frame:
            raise no_field(name, frame)
    frame = frame[frame[config.setting].notna() & (frame["seed"].isin(config.seeds) | (not config.seeds))]
    if frame.empty:
        raise UserError(f"--setting {config.setting}: no run has it")
    for values, group in select_best(frame, each, config.setting, config.by).groupby(each, sort=False):
        print(*values, text_of(group[config.setting].iloc[0]))


if __name__ == "__main__":
    run_main(main)
