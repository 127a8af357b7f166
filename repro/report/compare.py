"""Two sets of runs side by side: differing settings, the difference over seeds with its p-value, overlaid curves.

Example: python -m repro.report.compare results/cifar10_cpu/vanilla results/cifar10_cpu/contranorm --output curves.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repro.config import LOCATION_FIELDS, parse_config
from repro.errors import UserError, run_main
from repro.report import figures
from repro.report.cells import one_per_replicate, replicate, show, signed, text_of
from repro.report.records import curve_of, load_records
from repro.report.stats import difference, holm
from repro.report.tables import markdown_table

CELL = ("data", "model", "depth", "method")


@dataclass
class Config:
    """What to compare."""

    a: str
    """A run, a folder of runs, a record file or a glob pattern; also as the first word, without the flag."""
    b: str
    """The other one; also as the second word."""
    metric: str | None = None
    """Compare this metric only; default all that both have."""
    output: str | None = None
    """Also draw the curves of both, overlaid: a .svg, .png or .pdf file; without an ending, .svg and .png."""


def settings_table(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Settings whose values differ between the two; where runs are kept does not count."""
    names = [n for n in dict.fromkeys([*_settings(a), *_settings(b)]) if n not in (*LOCATION_FIELDS, "seed")]
    rows = [(name, _values(a, name), _values(b, name)) for name in (*CELL, *names)]
    return pd.DataFrame([row for row in dict.fromkeys(rows) if row[1] != row[2]], columns=["setting", "A", "B"])


def _settings(frame: pd.DataFrame) -> list[str]:
    names = [*frame["settings"], *frame["execution_fields"]]
    return [name for group in names for name in group if name in frame]


def _values(frame: pd.DataFrame, name: str) -> str:
    values = dict.fromkeys(map(text_of, frame[name])) if name in frame else {}
    return ", ".join(value or "unset" for value in values) or "—"


def metrics_table(a: pd.DataFrame, b: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """A line per metric and shared cell: both means, B − A over the seeds that both have, p, and p after Holm.

    Raises:
        UserError: no metric or no cell is in both, or one holds a seed twice with different numbers.
    """
    measured = [set(frame.columns[frame.notna().any()]) for frame in (a, b)]
    shared = [str(name) for name in a if name in set.intersection(*measured)]
    both = [name.removeprefix("metrics.") for name in shared if name.startswith("metrics.")]
    if not both:
        raise UserError("no metric is in both")
    names = [name for name in both if metric in (None, name)]
    if not names:
        raise UserError(f"--metric {metric}: not in both; there are {', '.join(both)}")
    cell = [name for name in CELL if max(frame[name].map(text_of).nunique() for frame in (a, b)) > 1]
    rows, p_values = [], []
    for name in names:
        groups = [dict(_grouped(frame.dropna(subset=f"metrics.{name}"), cell)) for frame in (a, b)]
        for place in [place for place in groups[0] if place in groups[1]]:
            where = ", ".join(map(text_of, place))
            one, other = (_values_of(group[place], f"metrics.{name}", where) for group in groups)
            found = difference(other, one)
            p_values.append(found.p)
            pairs = f"{found.n}, unpaired" if found.n > 1 and not found.paired else found.n
            rows.append(
                {
                    **dict(zip(cell, place, strict=True)),
                    "metric": name,
                    "A": show(*_summary(one), False),
                    "B": show(*_summary(other), False),
                    "B − A": f"{signed(found.mean, False)} ({pairs})",
                }
            )
    if not rows:
        raise UserError("no cell (data, model, depth, method) is in both")
    texts = [["" if p is None else f"{p:.2g}" for p in column] for column in (p_values, holm(p_values))]
    return pd.DataFrame(rows).assign(**{"p": texts[0], "p (Holm)": texts[1]})


def _grouped(frame: pd.DataFrame, cell: list[str]) -> list[tuple[Any, pd.DataFrame]]:
    return list(frame.groupby(cell, sort=False, dropna=False)) if cell else [((), frame)]


def _values_of(runs: pd.DataFrame, name: str, where: str) -> pd.Series[Any]:
    runs = one_per_replicate(runs, name, where)
    index = pd.Index(replicate(runs), tupleize_cols=False)
    return pd.Series(runs[name].to_numpy(dtype=float), index=index)


def _summary(values: pd.Series[Any]) -> tuple[float, float, int]:
    return float(values.mean()), float(values.std(ddof=1)), len(values)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    if len(words) > 1 and not any(word.startswith("-") for word in words[:2]):
        words = [f"--a={words[0]}", f"--b={words[1]}", *words[2:]]
    config = parse_config(Config, words, prog="python -m repro.report.compare", description=__doc__ or "")
    a, b = load_records(config.a), load_records(config.b)
    settings = settings_table(a, b)
    print("no setting differs\n" if settings.empty else markdown_table(settings))
    print(markdown_table(metrics_table(a, b, config.metric)))
    print("p: paired t over the seeds that both have, else Welch's.")
    if config.output:
        drawn = pd.concat([a.assign(label=f"A: {Path(config.a).name}"), b.assign(label=f"B: {Path(config.b).name}")])
        if not any(curve_of(path) for path in drawn["path"]) and "curve" not in drawn:
            raise UserError("--output: no run of either has a curve")
        chosen = figures.Config(records=[config.a], kind="curves", label="label", output=config.output)
        for path in figures.write(figures.figure_of(drawn, chosen, ""), Path(config.output), ""):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
