"""What the speed flags do to the metric: a Markdown table from the records of scripts/flag_study.sh.

`python -m benchmarks.flags --records results/flags/records.jsonl`. Each line is a way of running one experiment,
against the way with every speed flag off, over the same seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.table import markdown
from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.records import load_records
from repro.report.tables import p_value, show

# The value with which each speed flag does nothing.
OFF: dict[str, Any] = {
    "implementation": "plain",
    "degree": 2,
    "eval_every": 1,
    "cache": False,
    "channels_last": False,
    "fused_optimizer": False,
    "group_by_length": False,
    "compact_embeddings": False,
    "skip_unread_tokens": False,
    "cheap_dropout": False,
    "mixed_precision": "no",
}
METRICS = {"gnn": "test_accuracy", "ViT_imagenet": "test_accuracy", "BERT_glue": "score"}


@dataclass
class Config:
    """What to read."""

    records: str = "results/flags/records.jsonl"
    """records of scripts/flag_study.sh: a folder, or the file that repro.report.collect made of it"""


def flags_of(row: pd.Series[Any]) -> str:
    """The speed flags that are on in one record, "" for none."""
    on = []
    for name, off in OFF.items():
        value = row.get(f"config.{name}", off)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            # a field that this experiment lacks; gnn's unset `eval_every` is no pass but the last one
            value = "off" if (name, row["experiment"]) == ("eval_every", "gnn") else off
        if name == "degree":
            if row.get("config.implementation") == "linear":
                on.append(f"degree={value:g}")
        elif value != off:
            on.append(f"{name}={value}")
    return ", ".join(on)


def compare(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One line per experiment and set of flags.

    Raises:
        UserError: an experiment has no runs with all flags off.
    """
    frame = frame.assign(flags=[flags_of(row) for _, row in frame.iterrows()])
    lines = []
    for experiment, runs in frame.groupby("experiment"):
        column = f"metrics.{METRICS[str(experiment)]}"
        off = runs[runs["flags"] == ""].set_index("seed")
        if off.empty:
            raise UserError(f"--records: no run of {experiment} has every speed flag off ({', '.join(OFF)})")
        for flags, those in runs.groupby("flags"):  # "" comes first
            on = those.set_index("seed")
            values, slow = on[column], off[column]
            spreads = [(v.mean(), v.std(ddof=1), len(v)) for v in (values, slow)]
            line: dict[str, Any] = {"experiment": experiment, "flags": flags or "all off", "metric": column[8:]}
            line["mean ± std (n), %"] = show(*spreads[0])
            if flags:
                p = p_value(*spreads)
                line["difference"] = f"{(values.mean() - slow.mean()) * 100:+.2f}"
                line["p (Welch)"] = None if p is None or math.isnan(p) else f"{p:.2g}"
                line["runs with the very same metric"] = f"{int((values == slow.reindex(on.index)).sum())} of {len(on)}"
            lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.flags", description=__doc__ or "")
    print(markdown(compare(load_records(config.records))))


if __name__ == "__main__":
    run_main(main)
