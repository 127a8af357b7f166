"""Records become tables: mean ± std (n) of every cell, and beside them the published numbers and the reference code's.

Example: python -m repro.report.tables results/table3/runs --preset table3
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report import readme
from repro.report.agreement import RULE, agreement_sentence, agreement_table, agrees, judge
from repro.report.cells import (
    AVERAGE,
    add_average,
    aggregate,
    comparison,
    fields_of,
    in_order,
    is_value,
    metrics_of,
    notes_on,
    rows_of,
    select_best,
    select_runs,
    show,
    signed,
    sortable,
    split_names,
    split_of,
    text_of,
)
from repro.report.costs import EXPLAINED, cost_table
from repro.report.overall import explained, overall_table
from repro.report.published import KINDS, METHOD, Entry, load_entries
from repro.report.records import RecordsConfig, find_records, load_records, records_flag
from repro.report.stats import LEVEL, Difference, bootstrap_mean, difference, holm, tost


@dataclass
class Config(RecordsConfig):
    """What to read, and how to arrange it."""

    preset: Literal["table1", "table2", "table3", "arxiv", "rivals", "ssl"] | None = None
    """Rows, columns and metric of one of the paper's tables, of the tuned rivals against vanilla, or of self-supervised
    runs; flags given beside it win."""
    rows: str | None = None
    """Comma-separated fields that make the rows: data, model, method, family (the method without its scale), depth,
    scale, or fields of the config."""
    columns: str | None = None
    """The field that makes the columns; empty for a single column."""
    metric: str | None = None
    """Name in the records' metrics."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keep only runs whose fields have these values: `--where '{data: cora}'`."""
    best: str | None = None
    """A field to choose per cell (say scale): the value with the highest mean of `--by` is shown, and named in
    brackets. With scale, rows by method become rows by family."""
    by: str | None = None
    """The metric that chooses: one of a validation set, as choosing by test would overstate what is reached."""
    average: str | None = None
    """Comma-separated columns whose mean becomes a further column, run by run (those of equal seed belong together);
    where some row lacks one of them, it is taken over the columns that all rows have, and named so."""
    show: Literal["table", "cells", "costs", "agreement", "sentence", "headline"] = "table"
    """table: the cells, and beside them the numbers from elsewhere; cells: without these; costs: the table of --costs
    alone; agreement: how many published cells agree, and which do not; sentence: the same in a sentence, and what
    --against finds in another; headline: without naming the cells, with --best for the first form of ContraNorm only,
    and silent where no published cell has been run."""
    against: str | None = None
    """Also show how each cell differs from that of this row, over seeds: a method (`vanilla`), or `field=value`."""
    test: Literal["t", "wilcoxon", "both"] | None = None
    """What gives the p of --against: t (unset), the t-test, paired where seeds pair, else Welch's; wilcoxon, Wilcoxon's
    signed ranks; both, one after the other."""
    margin: float | None = None
    """With --against: p of equivalence (TOST) instead: below 0.05, the difference is within this (0.02: two points)."""
    overall: bool | None = None
    """Also one line per method over all its cells: the interquartile mean, and with --against how often it is above."""
    costs: bool | None = None
    """Also what each cell cost: parameters, multiply-adds, seconds, and its tuning."""
    tuned: bool | None = None
    """Only runs whose settings were chosen by repro.tune: neither its trials nor untuned ones."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """How the table is written."""
    percent: bool = True
    """Show fractions times 100."""
    output: str | None = None
    """File to write the table to, beside printing it; in a .md file it is a block that repro.report.check renews."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in PRESETS.get(self.preset or "", {}).items():
            if getattr(self, name) is None and not (name == "test" and self.margin is not None):  # TOST is the margin's
                setattr(self, name, value)
        if self.rows is not None and not split_names(self.rows):
            raise ValueError(f"--rows {self.rows!r} names no field")
        if (self.best is None) != (self.by is None):
            raise ValueError("--best and --by belong together: the field to choose, and the metric that chooses")
        if self.by is not None and "test" in self.by:
            raise ValueError(f"--by {self.by}: a choice by test numbers is none; name a validation metric")
        if (self.margin is not None or self.test is not None) and not self.against:
            raise ValueError(f"--{'test' if self.margin is None else 'margin'} needs --against")
        if self.margin is not None and (self.margin <= 0 or self.test is not None):
            raise ValueError("--margin is larger than 0, and its test is TOST: without --test")
        if self.average and not self.columns:
            raise ValueError("--average needs --columns: it is the mean over some of them")

    @property
    def within(self) -> str:
        """The margin in words."""
        return f"{100 * (self.margin or 0):g} points" if self.percent else f"{self.margin:g}"

    @property
    def tests(self) -> dict[str, str]:
        """Name → in words, of the tests that give p."""
        words = {"t": "the paired t-test, Welch's where seeds do not pair", "wilcoxon": "Wilcoxon's signed ranks"}
        if self.margin is not None:
            return {"tost": f"equivalence within {self.within} (TOST)"}
        return words if self.test == "both" else {self.test or "t": words[self.test or "t"]}


PRESETS: dict[str, dict[str, Any]] = {
    "table1": {
        "rows": "model,method",
        "columns": "data",
        "metric": "score",
        "average": "cola,mnli,mrpc,qnli,qqp,rte,sst2,stsb",  # all of GLUE but WNLI, as in the paper
    },
    "table2": {"rows": "data,model,epochs,method", "columns": "depth", "metric": "test_accuracy"},
    "table3": {"rows": "data,method", "columns": "depth", "metric": "test_accuracy"},
    "arxiv": {"rows": "data,method,depth", "columns": "model", "metric": "test_accuracy"},
    "rivals": {
        "rows": "data,family",
        "columns": "depth",
        "metric": "test_accuracy",
        "against": "vanilla",
        "test": "both",
        "overall": True,
        "costs": True,
        "tuned": True,
    },
    "ssl": {"rows": "data,model,method,epochs", "columns": "", "metric": "knn_accuracy"},
}


# -- beside other numbers --------------------------------------------------------------------------------------------


def compare(
    tables: dict[str, pd.DataFrame], keys: list[str], metric: str, entries: Sequence[Entry], config: Config
) -> tuple[pd.DataFrame, list[str]]:
    """One row per cell with a number from elsewhere, of `metric` or else another, and notes: marks, then sources."""
    shown = [*keys, *({config.best} - {None, *keys})]
    rows: list[dict[str, Any]] = []
    p_values: list[float | None] = []
    marks, sources, compared = dict[str, str](), dict[str, dict[str, None]](), set[tuple[str, ...]]()
    for name, cells in tables.items():
        for cell in rows_of(cells):
            labels = tuple(text_of(cell[str(key)]) for key in shown)
            found = [entry for entry in entries if entry.metric == name and entry.fits(cell)]
            if not found or (name != metric and labels in compared):
                continue
            compared |= {labels} if name == metric else set()
            for entry in found:
                sources.setdefault(KINDS[entry.kind], {})[entry.source] = None
            row, p = _beside(cell, found, marks, config.percent)
            rows.append(dict(zip(map(str, shown), labels, strict=True)) | {"metric": name} | row)
            p_values.append(p)
    if not rows:
        return pd.DataFrame(), []
    texts = [["" if p is None else f"{p:.2g}" for p in column] for column in (p_values, holm(p_values))]
    beside = pd.DataFrame(rows).assign(**{"p": texts[0], "p (Holm)": texts[1]})
    beside["agrees"] = beside.pop("agrees")  # last
    if set(beside["metric"]) == {metric}:
        beside = beside.drop(columns="metric")
    beside = beside[[name for name in beside if name in keys or (beside[name] != "").any()]]
    rule = [RULE] if "agrees" in beside else []
    if (beside[[title for title in KINDS.values() if title in beside]] != "").sum(axis=1).max() > 1:
        first = "difference, p and agrees: from the reference code where it was run, else from the authors' number"
        rule.insert(0, first)
    notes = [f"{mark} {note}" for note, mark in marks.items()]
    return beside, [*notes, *rule, *(f"{title}: {'; '.join(of)}" for title, of in sources.items())]


def _beside(
    cell: dict[Any, Any], found: Sequence[Entry], marks: dict[str, str], percent: bool
) -> tuple[dict[str, str], float | None]:
    """The numbers of each kind in one column, then ours and how they differ (from the released code, if it was run)."""
    row = {}
    for kind, title in KINDS.items():
        entries = [entry for entry in found if entry.kind == kind]
        row[title] = " / ".join(show(e.mean, e.std, e.n, percent) + _mark(e.notes(cell), marks) for e in entries)
    ranks = ("reference-run", "authors", "third-party re-run")
    other = min(found, key=lambda entry: ranks.index(entry.kind))
    p, verdict, _ = agrees(cell, other)
    row["ours"] = show(cell["mean"], cell["std"], cell["n"], percent)
    row["difference"] = signed(cell["mean"] - other.mean, percent)
    return row | {"agrees": {True: "yes", False: "no", None: ""}[verdict]}, p


def _mark(notes: list[str], used: dict[str, str]) -> str:
    """One mark for each note, in order of use; `used` is note → mark."""
    for note in notes:
        used.setdefault(note, "†‡§¶‖"[len(used) % 5] * (1 + len(used) // 5))
    return "".join(f" {used[note]}" for note in notes)


def differences(cells: pd.DataFrame, keys: list[str], config: Config) -> pd.DataFrame:
    """The cells with their difference `found` from that of `--against`, whose runs are `base`.

    `p` is a tuple, one for each test, each Holm-corrected over the whole table.

    Raises:
        UserError: no row is called so, or no other has a cell in common with it.
    """
    field, value = _baseline(keys, config)
    if field not in keys or value not in set(cells[field].map(text_of)):
        raise UserError(f"--against {config.against}: no such row; write a method, or field=value of a field of --rows")
    others = comparison(cells, keys, field)
    base = {tuple(map(text_of, row[others])): row for _, row in cells.iterrows() if text_of(row[field]) == value}
    found: list[Difference | None] = []
    runs: list[pd.Series[Any] | None] = []
    tests: dict[str, list[float | None]] = {test: [] for test in config.tests}
    for _, cell in cells.iterrows():
        other = base.get(tuple(map(text_of, cell[others])))
        runs.append(None if other is None or text_of(cell[field]) == value else other["values"])
        found.append(None if runs[-1] is None else difference(cell["values"], runs[-1]))
        for test, p_values in tests.items():
            if found[-1] is None or runs[-1] is None:
                p_values.append(None)
            elif test == "tost":
                p_values.append(tost(cell["values"], runs[-1], config.margin or 0))
            else:
                p_values.append(found[-1].p if test == "t" else found[-1].wilcoxon)
    if not any(found):
        raise UserError(f"--against {config.against}: no other row has a cell in common with it")
    corrected = [[math.nan if p is None else p for p in holm(p_values)] for p_values in tests.values()]
    columns = {"found": found, "base": runs, "p": list(zip(*corrected, strict=True))}
    return cells.assign(**{n: pd.Series(values, index=cells.index, dtype=object) for n, values in columns.items()})


def _baseline(keys: Sequence[str], config: Config) -> tuple[str, str]:
    """The field and the value that `--against` names; a method may hold an = of its own."""
    field, _, value = (config.against or "").partition("=")
    if field in keys:
        return field, value
    return next((name for name in ("method", "family") if name in keys), ""), str(config.against)


def _text(cell: pd.Series[Any], config: Config, best: str | None) -> str:
    """`67.60 ± 2.24 (3) [4.0], +11.11, p 0.02`: the cell, the scale chosen, and how it differs from --against.

    With two tests there are two p.
    """
    text = show(cell["mean"], cell["std"], cell["n"], config.percent)
    if best and text_of(cell[best]):
        text += f" [{text_of(cell[best])}]"
    found: Difference | None = cell.get("found")
    if found is None:
        return text
    fewer = found.n < max(cell["n"], len(cell["base"]))
    pairs = " unpaired" if not found.paired and found.n > 1 else f" ({found.n})" if fewer else ""
    p = " / ".join("—" if pd.isna(p) else f"{p:.2g}" for p in cell["p"])
    return f"{text}, {signed(found.mean, config.percent)}{pairs}, p {p}"


def against_sentences(cells: pd.DataFrame, config: Config) -> list[str]:
    """For each method: mean difference over the cells with its bootstrap interval, and in how many it is shown."""
    lines = []
    cells = cells[cells["found"].notna()]
    tested = sum(not pd.isna(p[0]) for p in cells["p"])
    name = next((name for name in ("method", "family") if name in split_names(config.rows)), "method")
    name = "family" if config.best == "scale" else name
    field, _ = _baseline([*split_names(config.rows), *split_names(config.columns)], config)
    apart = [field] if field not in ("method", "family", "") and cells[field].nunique() > 1 else []
    for (method, *others), own in cells.groupby([name, *apart], sort=False):
        method = ", ".join([text_of(method), *(f"{field}={text_of(value)}" for value in others)])
        own = own[own["runs"].notna()]  # an average is no cell more
        means = [found.mean for found in own["found"]]
        shown = [found.mean for found, p in zip(own["found"], own["p"], strict=True) if p[0] < LEVEL]
        low, high = bootstrap_mean(means)
        interval = f", 95 % bootstrap interval {signed(low, config.percent)} to {signed(high, config.percent)}"
        higher, lower = sum(m > 0 for m in shown), sum(m < 0 for m in shown)
        count = f"higher in {higher}, lower in {lower}" if shown else "significant in none"
        if config.margin is not None:
            count = f"within {config.within} in {len(shown)}"
        test = "t-test: " if len(config.tests) > 1 else ""
        lines.append(
            f"{method} against {config.against}: {signed(sum(means) / len(means), config.percent)}"
            f"{' points' if config.percent else ''} over {_count(len(own), 'cell')}"
            f"{'' if math.isnan(low) else interval}; {count} "
            f"({test}p < {LEVEL:g} after Holm over {_count(tested, 'test')})."
        )
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def pivot(cells: pd.DataFrame, rows: list[str], columns: str) -> pd.DataFrame:
    """The cells' `text`, rows in order of appearance, columns in their natural order."""
    if not columns:
        return cells[rows].map(text_of).assign(**{"mean ± std (n)": cells["text"]})
    present = list(dict.fromkeys(cells[columns]))
    averages = [c for c in present if str(c).startswith(AVERAGE)]
    order = sorted((c for c in present if c not in averages), key=sortable) + averages
    table = []
    for values, group in cells.groupby(rows, dropna=False, sort=False):
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
    shown = ""
    if config.against:
        points = " in points" if config.percent else ""
        shown = f", difference from {config.against}{points} (in brackets the pairs, where fewer), p of "
        shown += " / of ".join(config.tests.values())
        shown += f", {'each ' if len(config.tests) > 1 else ''}Holm-corrected over the table"
    parts = [
        f"{config.metric}{' in %' if config.percent else ''}, mean ± sample standard deviation (number of runs){shown}",
        f"protocol: {', '.join(sorted(set(frame['protocol'])))}",
        f"reported: {', '.join(sorted(set(frame['selection'])))}",
        f"{len(frame)} runs, seeds {', '.join(map(str, seeds)) or 'not recorded'}"
        + (f", splits {', '.join(map(str, splits))}" if len(splits) > 1 else ""),
    ]
    if "tuning_trials" in frame and len(trials := frame["tuning_trials"].dropna()):
        budget = " or ".join(str(int(number)) for number in sorted(set(trials)))
        which = "all rows" if len(trials) == len(frame) else f"{len(trials)} runs"
        parts.append(f"settings of {which} chosen among {budget} on validation, on seeds of their own")
    if config.best:
        how = f"the highest mean {config.by} over the seeds that all have"
        parts.append(f"in brackets: {config.best} chosen per cell by {how}")
    return "; ".join(parts) + "."


def build(config: Config, entries: Sequence[Entry]) -> str:
    """The whole text: caption, table, and the comparison where numbers from elsewhere exist."""
    frame = select_runs(load_records(config.records), config.where)
    if config.tuned:
        frame = frame[frame["tuning_trials"].notna()] if "tuning_trials" in frame else frame[:0]
        if frame.empty:
            raise UserError("--tuned: no record holds settings that repro.tune has chosen; --no_tuned takes all")
    rows, columns, metric = split_names(config.rows), config.columns or "", str(config.metric)
    if config.best == "scale":
        rows = ["family" if name == "method" else name for name in rows]
    keys = [*rows, columns] if columns else rows
    everything = frame
    if config.best and config.by:
        frame = select_best(frame, keys, config.best, config.by)
    cells = in_order(aggregate(frame, keys, metric), rows, columns)
    protocols = sorted(set(cells["protocol"]))
    apart = "data" in keys and _named_by_data(cells)
    mixed = cells.groupby("data")["protocol"].nunique() if apart else [len(protocols)]
    if max(mixed) > 1 and "protocol" not in keys:
        raise UserError(f"the records mix protocols ({', '.join(protocols)}): add protocol to --rows, or use --where")
    if config.average and columns:
        cells = in_order(add_average(cells, frame, rows, columns, metric, split_names(config.average)), rows, columns)
    if config.against:
        cells = differences(cells, keys, config)
    others = dict.fromkeys(e.metric for e in entries if e.metric != metric and f"metrics.{e.metric}" in frame)
    measured = {name: frame.dropna(subset=f"metrics.{name}") for name in others}
    tables = {metric: cells} | {n: in_order(aggregate(m, keys, n), rows, columns) for n, m in measured.items()}
    if config.show == "costs":
        costs = render(cost_table(cells, keys), config.format)
        return costs if config.format == "csv" else f"{'% ' * (config.format == 'latex')}{EXPLAINED}.\n\n{costs}"
    if config.show not in ("table", "cells"):
        ours = against_sentences(cells, config) if config.against else []
        return _agreement(everything, others, entries, ours, config)
    best = None if config.best in keys else config.best
    texts = [_text(cell, config, best) for _, cell in cells.iterrows()]
    table = pivot(cells.assign(text=texts), rows, columns)
    beside, notes = compare(tables, keys, metric, entries if config.show == "table" else [], config)
    more = [beside]
    notes = [*(against_sentences(cells, config) if config.against else []), *notes_on(cells), *notes]
    if config.costs:
        more.insert(0, cost_table(cells, keys))
        notes.append(EXPLAINED)
    if config.overall:
        name = next((name for name in ("method", "family") if name in rows), rows[0])
        more.insert(0, overall_table(cells, name, config.against, config.percent))
        notes.append(explained(config.against))
    more = [part for part in more if not part.empty]
    if config.format == "csv":
        return "\n".join(render(part, "csv") for part in (table, *more))
    comment = "% " if config.format == "latex" else ""
    below = "".join(f"{comment}{'' if comment else '- '}{note.removesuffix('.')}.\n" for note in notes)
    parts = [f"{comment}{_caption(frame, config)}\n", *(render(part, config.format) for part in (table, *more))]
    return "\n".join([*parts, *([below] if below else [])])


def _named_by_data(cells: pd.DataFrame) -> bool:
    """Whether each cell's protocol bears its data set's name, as image runs' do: tables of several are no mixture."""
    return all(str(data) in str(protocol) for data, protocol in zip(cells["data"], cells["protocol"], strict=True))


def _agreement(
    frame: pd.DataFrame, others: Iterable[str], entries: Sequence[Entry], ours: list[str], config: Config
) -> str:
    """`--show agreement`, `sentence` and `headline`: the published cells of these experiments; every scale counts."""
    keys = [*split_names(config.rows), *split_names(config.columns)]
    measured = {name: frame.dropna(subset=f"metrics.{name}") for name in (str(config.metric), *others)}
    tables = {name: aggregate(part, keys, name) for name, part in measured.items()}
    rows = {*frame["method"], *frame["family"]}
    scope = [
        entry
        for entry in entries
        if entry.kind != "reference-run"
        and entry.match.get("experiment") in set(frame["experiment"])
        and all(_concerns(entry, name, value, rows) for name, value in config.where.items())
    ]
    verdicts = judge(tables, scope)
    kinds = {"authors": "published by the authors", "third-party re-run": "of others' re-runs"}
    by_kind = {kind: [v for v in verdicts if v.entry.kind == kind] for kind in kinds}
    named = config.show != "headline"
    told = {kind: of for kind, of in by_kind.items() if of and (named or any(v.cell for v in of))}
    lines = [agreement_sentence(of, kinds[kind], named=named) for kind, of in told.items()]
    if config.show != "agreement":
        mine = [line for line in ours if METHOD in line.partition(" against ")[0]]
        return " ".join([*lines[:1], *(mine if named or not config.best else mine[:1])]) + "\n"
    parts = [f"Rule: {RULE}.\n"]
    for line, of in zip(lines, told.values(), strict=True):
        table = agreement_table(of, config.percent)
        parts += [f"{line}\n", *([] if table.empty else [render(table, config.format)])]
    return "\n".join(parts)


def _concerns(entry: Entry, name: str, value: Any, rows: set[Any]) -> bool:
    """Whether a published number may be of runs chosen by `--where name=value`, whose methods are `rows`."""
    if name in ("method", "family"):
        return bool(rows & set(entry.match["method"]))
    return name not in entry.match or is_value(entry.match[name], value)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = records_flag(argv)
    config = parse_config(Config, words, prog="python -m repro.report.tables", description=__doc__ or "")
    find_records(config.records)  # a wrong path is the first thing to say
    missing = [f"--{name}" for name in ("rows", "metric") if not getattr(config, name)]
    if missing:
        frame = load_records(config.records)
        raise UserError(
            f"{' and '.join(missing)} missing: give them, or a --preset ({', '.join(PRESETS)}); "
            f"the records have the fields {fields_of(frame)} and the metrics {metrics_of(frame)}"
        )
    text = build(config, load_entries())
    readme.publish("repro.report.tables", words, text, config.output)


if __name__ == "__main__":
    run_main(main)
