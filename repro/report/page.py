"""Every committed table and figure as one page that needs no network: `python -m repro.report.page`.

Writes index.html and index.json into the folder of results. Whatever records stand below it are in: one table per
folder, experiment and protocol, one row per method, and a cell opens to its command, runs and sources.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report.agreement import RULE, agreement_sentence, agrees, judge
from repro.report.cells import (
    aggregate,
    comparison,
    in_order,
    notes_on,
    rows_of,
    separate,
    show,
    sortable,
    spread_of,
    text_of,
)
from repro.report.collect import thin
from repro.report.published import KINDS, Entry, load_entries
from repro.report.records import curve_of, find_records, load_records
from repro.report.stats import difference, holm

BASELINE = "vanilla"
METRICS = ("test_accuracy", "score", "accuracy")  # the first that all runs have is shown
CURVE_POINTS = 12  # a curve is as wide as a thumb


@dataclass
class Config:
    """What to show."""

    results: str = "results"
    """Folder of results: its sub-folders hold records and figures."""


def build_index(results: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """The page as data: tables with their cells, and figures with the command that draws them.

    Raises:
        UserError: no records are there.
    """
    tables: list[dict[str, Any]] = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if not any(folder.rglob("record.json")) and not any(folder.rglob("records.jsonl")):
            continue
        frame = load_records(folder)
        for _, part in frame.groupby(["experiment", "protocol"], sort=False):
            tables.append(_table(part, folder.name, results, entries))
    if not tables:
        raise UserError(f"--results {results}: no records below it")
    figures = [
        {"path": path.relative_to(results).as_posix(), "command": command_in(path)}
        for path in sorted(results.rglob("*.svg"))
    ]
    return {"tables": tables, "figures": figures, "rule": RULE}


def command_in(path: Path) -> str:
    """The command that drew an SVG file; nothing for a figure of another program."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(encoding="utf-8"), re.DOTALL)
    return html.unescape(found[1]) if found else ""


def _table(frame: pd.DataFrame, name: str, results: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """One table: rows by data, model and method, columns by depth, or by data where no depth is set."""
    known = [str(name) for name in frame if frame[name].notna().all()]
    measured = [name.removeprefix("metrics.") for name in known if name.startswith("metrics.")]
    metric = next((name for name in METRICS if name in measured), measured[0])
    columns = "depth" if frame["depth"].notna().any() else "data"
    rows = [name for name in ("data", "model", "method") if name != columns]
    keys = separate(frame, [*rows, columns], metric)
    extra = [key for key in keys if key not in (*rows, columns)]
    cells = in_order(aggregate(frame, keys, metric), [*rows, *extra], columns)
    raw = rows_of(cells)
    first = raw[0]
    about = {"experiment": {first["experiment"]}, "protocol": {first["protocol"]}, "data": set(cells["data"])}
    scope = [e for e in entries if e.kind == "authors" and all(e.match.get(k) in (None, *v) for k, v in about.items())]
    verdicts = judge({metric: cells}, [entry for entry in scope if entry.metric == metric])
    turned = {tuple(text_of(v.cell[key]) for key in keys): v.reversed for v in verdicts if v.cell and v.reversed}
    found = [_cell(cell, metric, results, entries) for cell in raw]
    for cell, shown in zip(raw, found, strict=True):
        shown["reversed"] = turned.get(tuple(text_of(cell[key]) for key in keys), ())
    others = comparison(cells, keys, "method")
    if "tuning_trials" in cells and cells["tuning_trials"].notna().all():  # rivals: some have a model of their own
        others = [name for name in others if name != "model"]
    _against_baseline(raw, found, others)
    heads = sorted(set(cells[columns]), key=sortable)
    notes = notes_on(cells)
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell, shown in zip(raw, found, strict=True):
        varied = [key for key in extra if cells[cells["method"] == cell["method"]][key].map(text_of).nunique() > 1]
        label = " · ".join([text_of(cell["method"]), *(f"{key} {text_of(cell[key]) or 'unset'}" for key in varied)])
        place = tuple(text_of(cell[key]) for key in (*rows, *extra))
        head = {"data": cell["data"] if columns != "data" else "", "model": text_of(cell.get("model")), "label": label}
        line = lines.setdefault(place, {**head, "family": cell["family"], "cells": [None] * len(heads)})
        line["cells"][heads.index(cell[columns])] = shown
    return {
        "name": name, "experiment": first["experiment"], "protocol": first["protocol"], "selection": first["selection"],
        "metric": metric, "models": sorted(set(cells["model"].map(text_of))), "columns": columns,
        "heads": [text_of(head) for head in heads], "rows": [*lines.values()],
        "runs": int(cells["n"].sum()),
        "sentence": agreement_sentence(verdicts, "published by the authors") if any(v.cell for v in verdicts) else "",
        **({"notes": notes} if notes else {}),
    }  # fmt: skip


def _cell(cell: dict[Any, Any], metric: str, results: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a cell opens to."""
    runs: pd.DataFrame = cell["runs"].sort_values("seed")
    published = []
    for entry in filter(lambda entry: entry.fits(cell), entries):
        column = f"metrics.{entry.metric}"
        if column in runs and runs[column].notna().all():
            p, verdict, _ = agrees(spread_of(runs[column]), entry)
            published.append({
                "kind": KINDS[entry.kind], "metric": entry.metric, "value": show(entry.mean, entry.std, entry.n),
                "source": entry.source,
                "notes": entry.notes(cell), "p": _rounded(p), "agrees": verdict,
            })  # fmt: skip
    records = rows_of(runs)
    own = [_run(run, metric, results) for run in records]
    environments = [run.get("environment") or {} for run in records]
    return {
        "data": text_of(cell.get("data")), "depth": text_of(cell.get("depth")), "method": text_of(cell["method"]),
        "metric": metric, "mean": _rounded(cell["mean"]), "std": _rounded(cell["std"]),
        "n": int(cell["n"]), "text": show(cell["mean"], cell["std"], None), "runs": own,
        "command": text_of(runs.iloc[0].get("command")),
        "commits": sorted({text_of(environment.get("commit")) or "unknown" for environment in environments}),
        "published": published,
    }  # fmt: skip


def _rounded(value: Any, digits: int = 5) -> float | None:
    """So many digits: the same file on every processor."""
    return None if pd.isna(value) else float(f"{value:.{digits}g}")


def _run(run: dict[Any, Any], metric: str, results: Path) -> dict[str, Any]:
    curve = curve_of(run["path"], run.get("curve"))
    names = [n for n in ("loss", "train_loss", "validation_accuracy", "test_accuracy", "accuracy") if n in curve]
    where = Path(run["path"]).resolve().relative_to(results.resolve().parent).as_posix()
    seed = None if pd.isna(run["seed"]) else int(run["seed"])
    thinned = thin({name: curve[name] for name in ("epoch", *names[:2])}, CURVE_POINTS) if names else {}
    packed = {name: [_rounded(value, 3) for value in values] for name, values in thinned.items()}
    return {"seed": seed, "value": _rounded(run[f"metrics.{metric}"]), "record": where, "curve": packed or None}


def _against_baseline(raw: list[dict[Any, Any]], found: list[dict[str, Any]], others: list[str]) -> None:
    """Adds to each cell how it differs from the vanilla row with equal `others` over seeds, Holm-corrected."""
    base = {tuple(text_of(c[k]) for k in others): c["values"] for c in raw if c["method"] == BASELINE}
    tests = []
    for cell, shown in zip(raw, found, strict=True):
        place = tuple(text_of(cell[key]) for key in others)
        if cell["method"] != BASELINE and place in base:
            tests.append((shown, difference(cell["values"], base[place])))
    for (shown, test), p in zip(tests, holm(test.p for _, test in tests), strict=True):
        shown["against"] = {
            "row": BASELINE,
            "difference": _rounded(test.mean),
            "n": test.n,
            "paired": test.paired,
            "p": _rounded(p),
        }


# -- the files ---------------------------------------------------------------------------------------------------------


def inline_svg(text: str) -> str:
    """A figure's SVG to stand in a page: its black and white those of the page, without what a page does not need.

    That is prologue, metadata, fixed size, digits of coordinates beyond a tenth of a point, fonts, line ends and, of
    markers in a row, the style of all but one: together two fifths of the text.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) width="([0-9.]+)pt"', r'\1 style="max-width: calc(1.4px * \2)"', body, count=1)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"\d+\.\d{2,}", _tenths, tag[0]), body)
    body = re.sub(r'(<use [^>]*? style="([^"]*)"/>\s*)(?:<use [^>]*? style="\2"/>\s*)+', _one_style, body)
    body = re.sub(r'font-family: [^;"]*', "font-family: sans-serif", body)
    body = re.sub(r"\s*\n\s*", " ", body).replace("> <", "><").replace("xlink:href", "href")
    return body.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")


def _tenths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _one_style(markers: re.Match[str]) -> str:
    return f'<g style="{markers[2]}">{markers[0]}</g>'.replace(f' style="{markers[2]}"/>', "/>")


def with_classes(figures: dict[str, str]) -> tuple[dict[str, str], str]:
    """The figures with a class in place of each style, and the classes' rules: a quarter less text."""
    names: dict[str, str] = {}

    def classed(style: re.Match[str]) -> str:
        return f' class="{names.setdefault(style[1], f"s{len(names)}")}"'

    found = {path: re.sub(r' style="([^"]*)"', classed, text) for path, text in figures.items()}
    return found, "\n".join(f".{name} {{ {style} }}" for style, name in names.items())


def shared_parts(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The cells, in which sources, record files and lists of epochs are numbers of `parts`: many are in many cells."""
    parts: dict[str, int] = {}

    def number(part: Any) -> int:
        return parts.setdefault(json.dumps(part), len(parts))

    def short(run: dict[str, Any]) -> dict[str, Any]:
        file, _, line = run["record"].partition(":")
        curve = run["curve"] and run["curve"] | {"epoch": number(run["curve"]["epoch"])}
        return run | {"record": [number(file), line], "curve": curve}

    def sourced(other: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in other.items() if name != "notes"}
        return kept | {"source": number("; ".join([other["source"], *other["notes"]]))}

    shortened = [
        cell | {"runs": [*map(short, cell["runs"])], "published": [*map(sourced, cell["published"])]} for cell in cells
    ]
    return {"cells": shortened, "parts": [json.loads(part) for part in parts]}


def render(index: dict[str, Any], results: Path) -> str:
    """The page; the same index gives the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    cells = [cell for table in index["tables"] for row in table["rows"] for cell in row["cells"] if cell]
    for number, cell in enumerate(cells):
        cell["id"] = number
    figures = {figure["path"]: inline_svg((results / figure["path"]).read_text("utf-8")) for figure in index["figures"]}
    figures, rules = with_classes(figures)
    options = {
        "data": sorted({cell["data"] for cell in cells} - {""}),
        "depth": sorted({cell["depth"] for cell in cells} - {""}, key=float),
        "method": sorted({row["family"] for table in index["tables"] for row in table["rows"]}),
    }
    data = json.dumps(shared_parts(cells), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = environment.get_template("page.html")
    return template.render(index=index, figures=figures, rules=rules, options=options, data=data)


def build(results: Path) -> tuple[str, str]:
    """index.html and index.json."""
    index = build_index(results, load_entries())
    tables = ",\n".join(json.dumps(table, allow_nan=False, ensure_ascii=False) for table in index["tables"])
    rest = json.dumps({key: value for key, value in index.items() if key != "tables"}, ensure_ascii=False)
    return render(index, results), f'{rest[:-1]}, "tables": [\n{tables}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.report.page", description=__doc__ or "")
    results = Path(config.results)
    find_records(config.results)
    for name, text in zip(("index.html", "index.json"), build(results), strict=True):
        write_atomic(results / name, text.encode())
        print(f"{results / name}: {len(text.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
