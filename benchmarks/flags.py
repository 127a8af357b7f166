"""What the speed flags do to the metric: a Markdown table from the records of scripts/flag_study.sh.

`python -m benchmarks.flags --records results/flags/records.jsonl`. Each line is a way of running one experiment,
against the way with every speed flag off, over the same seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.table import markdown
from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.cells import show
from repro.report.records import iterate_records
from repro.report.stats import difference, holm

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


def flags_of(record: dict[str, Any]) -> str:
    """The speed flags that are on in one record, "" for none."""
    config, on = record["config"], []
    for name, off in OFF.items():
        value = config.get(name)
        if name == "eval_every" and name in config and value is None:  # gnn: the last epoch's pass is the only one
            value = "off"
        elif value is None or (name == "degree" and config.get("implementation") != "linear"):
            continue
        if value != off or name == "degree":
            on.append(f"{name}={value}")
    return ", ".join(on)


def compare(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per experiment and set of flags, p of the paired t-test; a UserError where no run has all flags off."""
    values = [(r["experiment"], r["seed"], flags_of(r), r["metrics"][METRICS[r["experiment"]]]) for r in records]
    frame = pd.DataFrame(values, columns=["experiment", "seed", "flags", "value"])
    lines = []
    for experiment, runs in frame.groupby("experiment"):
        slow = runs[runs["flags"] == ""].set_index("seed")["value"]
        if slow.empty:
            raise UserError(f"--records: no run of {experiment} has every speed flag off ({', '.join(OFF)})")
        for flags, those in runs.groupby("flags"):  # "" comes first
            values = those.set_index("seed")["value"]
            line: dict[str, Any] = {"experiment": experiment, "flags": flags or "all off"}
            shown = show(values.mean(), values.std(ddof=1), len(values))
            line |= {"metric": METRICS[str(experiment)], "mean ± std (n), %": shown}
            if flags:
                found = difference(values, slow)
                line |= {"difference": f"{found.mean * 100:+.2f}", "p (Holm)": found.p}
                same = int((values == slow.reindex(values.index)).sum())
                line["runs with the very same metric"] = f"{same} of {len(values)}"
            lines.append(line)
    tested = [line for line in lines if "p (Holm)" in line]
    for line, p in zip(tested, holm(line["p (Holm)"] for line in tested), strict=True):
        line["p (Holm)"] = None if p is None else f"{p:.2g}"
    return lines


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.flags", description=__doc__ or "")
    print(markdown(compare(record for _, record in iterate_records(config.records))))


if __name__ == "__main__":
    run_main(main)
