"""Published cells against ours: which agree by one stated rule, and where the published order is reversed.

A published cell that several of our rows answer to (ContraNorm at any scale) is compared with the row that bears its
name, else with that of the highest validation metric, never with the nearest one: the mean over the seeds that all of
them have, as in `cells.select_best`; over each one's own where there are none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from repro.report.cells import replicate, rows_of, show, signed, text_of
from repro.report.published import METHOD, Entry
from repro.report.stats import FLOOR, Summary, agreement

RULE = (
    "a published cell agrees when it lies within the 95 % interval of the difference of two means of one experiment, "
    "t·√(s²/n + s'²/n') around ours, with our s where none is published, and our n likewise; "
    f"the interval is at least ± {FLOOR * 100:g} points wide, as collapsed cells have no spread. "
    "One in twenty cells would fall outside by chance. Where several of our rows answer to a published cell, it is "
    "compared with the one of its name, else with the one of the highest mean validation metric"
)
WIDE = 0.05  # an interval wider than this on either side says little


@dataclass(frozen=True)
class Verdict:
    """One published cell, and ours.

    Attributes:
        entry: the published number.
        cell: ours that was compared, None when it has not been run.
        p: of the difference, None without a spread.
        agrees: by RULE; None with fewer than two runs of ours.
        half: half the width of RULE's interval.
        also: methods of the other rows that answer to the published cell and agree.
        reversed: published methods that stand on the other side of ContraNorm here.
    """

    entry: Entry
    cell: Mapping[Any, Any] | None
    p: float | None = None
    agrees: bool | None = None
    half: float | None = None
    also: tuple[str, ...] = ()
    reversed: tuple[str, ...] = ()


def summary(cell: Mapping[Any, Any]) -> Summary:
    """Mean, standard deviation and n of a cell."""
    return Summary(float(cell["mean"]), float(cell["std"]), int(cell["n"]))


def agrees(cell: Mapping[Any, Any], entry: Entry) -> tuple[float | None, bool | None, float | None]:
    """P of the difference, whether the cell agrees by RULE, and half the width of the interval."""
    p, half = agreement(summary(cell), Summary(entry.mean, entry.std, entry.n))
    return p, None if half is None else bool(abs(cell["mean"] - entry.mean) <= half), half


def judge(tables: Mapping[str, pd.DataFrame], entries: Sequence[Entry]) -> list[Verdict]:
    """One verdict per published number; `tables` holds our cells by metric."""
    known = {metric: rows_of(cells) for metric, cells in tables.items()}
    found = []
    for entry in entries:
        fitting = [cell for cell in known.get(entry.metric, ()) if entry.fits(cell)]
        if not fitting:
            found.append(Verdict(entry, None))
            continue
        choice = [cell for cell in fitting if cell["method"] in entry.match["method"]] or fitting
        cell = choice[0] if len(choice) == 1 else max(choice, key=_validation(choice, entry.metric))
        others = [other for other in fitting if other is not cell and agrees(other, entry)[1]]
        found.append(Verdict(entry, cell, *agrees(cell, entry), also=tuple(str(other["method"]) for other in others)))
    return [replace(v, reversed=_reversed(v, v.cell, found)) if v.cell else v for v in found]


def _validation(choice: Sequence[Mapping[Any, Any]], metric: str) -> Callable[[Mapping[Any, Any]], float]:
    """What a choice among rows goes by; a metric of a validation set is its own."""
    shared = set.intersection(*(set(cell["values"].index) for cell in choice))

    def mean(cell: Mapping[Any, Any]) -> float:
        runs = cell.get("runs")
        if not isinstance(runs, pd.DataFrame) or "metrics.validation_accuracy" not in runs:
            return 0.0 if "test" in metric else float(cell["mean"])
        chosen = runs[replicate(runs).isin(shared)] if shared else runs
        return float(chosen["metrics.validation_accuracy"].mean())

    return mean


def _reversed(verdict: Verdict, cell: Mapping[Any, Any], verdicts: list[Verdict]) -> tuple[str, ...]:
    """Methods published beside ContraNorm whose mean is below its own there and above here, or the other way round."""
    mine = verdict.entry
    if not any(method.startswith(METHOD) for method in mine.match["method"]):
        return ()
    return tuple(
        str(v.entry.match["method"][0])
        for v in verdicts
        if v.cell and v.entry.place == mine.place and v.entry.source == mine.source
        if (mine.mean - v.entry.mean) * (cell["mean"] - v.cell["mean"]) < 0
    )


def agreement_table(verdicts: list[Verdict], percent: bool) -> pd.DataFrame:
    """The published cells that do not agree, or whose order is reversed here."""
    rows = []
    for v in verdicts:
        if not v.cell or (v.agrees is not False and not v.reversed):
            continue
        ours, place = v.cell["mean"], dict(v.entry.place[1])
        rows.append(
            {
                "data": place.get("data", ""),
                "depth": text_of(v.cell.get("depth")),
                "published row": str(v.entry.match["method"][0]),
                "published": show(v.entry.mean, v.entry.std, v.entry.n, percent),
                "ours": show(ours, v.cell["std"], v.cell["n"], percent),
                "our row": str(v.cell["method"]),
                "difference": signed(ours - v.entry.mean, percent),
                "p": "" if v.p is None else f"{v.p:.2g}",
                "agrees": {True: "yes", False: "no", None: ""}[v.agrees],
                "rows that agree": ", ".join(v.also),
                "order reversed to": ", ".join(v.reversed),
            }
        )
    return pd.DataFrame(rows)


def agreement_sentence(verdicts: list[Verdict], title: str, *, named: bool = True) -> str:
    """How many published cells of one kind have been run, agree, and contradict the published order; `named`: which."""
    run = [v for v in verdicts if v.cell]
    decided = [v for v in run if v.agrees is not None]
    differ = [v for v in decided if not v.agrees]
    text = f"Of {len(verdicts)} cells {title}, {len(run)} {'has' if len(run) == 1 else 'have'} been run here"
    if decided:
        text += ": " if len(decided) == len(run) else f"; of {len(decided)} with two runs or more, "
        text += f"{len(decided) - len(differ)} agree{'s' * (len(decided) - len(differ) == 1)}"
    if differ:
        text += f" and {len(differ)} do{'es' * (len(differ) == 1)} not" + (f" ({_places(differ)})" if named else "")
    turned = [v for v in run if v.reversed]
    if turned:
        text += f"; in {len(turned)} the published order of {METHOD} and another method is reversed"
        text += f" ({_places(turned)})" if named else ""
    halves = [v.half for v in decided if v.half is not None]
    if halves and named:
        wide = sum(half > WIDE for half in halves)
        text += f". The median interval is ± {100 * statistics.median(halves):.1f} points"
        text += f"; in {wide} it is wider than ± {100 * WIDE:g}, and agreement there means little" if wide else ""
    return text + "."


def _places(verdicts: list[Verdict]) -> str:
    """`cora PN-SI at depth 8, 16; ...`."""
    groups: dict[str, list[str]] = {}
    for v in verdicts:
        place = dict(v.entry.place[1])
        depth = place.get("depth")
        name = " ".join(filter(None, [str(place.get("data", "")), str(v.entry.match["method"][0])]))
        groups.setdefault(name, []).extend([] if depth is None else [str(depth)])
    return "; ".join(name + (f" at depth {', '.join(depths)}" if depths else "") for name, depths in groups.items())
