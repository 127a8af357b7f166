"""Numbers from elsewhere (paper.yaml): the authors' published ones, and the released code as it runs here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from repro.config import load_yaml
from repro.errors import UserError

PAPER = Path(__file__).with_name("paper.yaml")
KINDS = ("published", "reference-run")


@dataclass(frozen=True)
class Entry:
    """One number from elsewhere.

    Attributes:
        table: which table it belongs to (table1, table2, table3, arxiv).
        kind: `published` by the authors, or `reference-run`: the released code as run.
        source: where it was printed.
        match: config fields (and protocol) of the cells it belongs to.
        metric: name in a record's metrics.
        mean: a fraction.
        std: standard deviation over runs, a fraction; None when not given.
        n: number of runs; None when not given.
        what: the cell in words, for numbers that no cell here corresponds to.
    """

    table: str
    kind: str
    source: str
    match: dict[str, Any]
    metric: str
    mean: float
    std: float | None = None
    n: int | None = None
    what: str = ""

    def fits(self, cell: dict[str, Any], metric: str) -> bool:
        """True when the number belongs to this cell: every matched field is known there and equal."""
        return metric == self.metric and all(
            name in cell and _same(cell[name], wanted) for name, wanted in self.match.items()
        )


def load_entries(path: Path = PAPER) -> list[Entry]:
    """Read and check a file of numbers.

    Raises:
        UserError: a key is unknown or missing, a value is of the wrong type or no fraction, a source is not listed.
    """
    content = load_yaml(path)
    if not isinstance(content, dict) or set(content) != {"sources", "entries"}:
        raise UserError(f"{path}: must hold the keys sources and entries")
    known = {field.name for field in fields(Entry)}
    entries = []
    for number, raw in enumerate(content["entries"], start=1):
        where = f"{path}: entry {number}"
        if not isinstance(raw, dict) or set(raw) - known:
            raise UserError(f"{where}: unknown keys {sorted(set(raw) - known) if isinstance(raw, dict) else raw!r}")
        if raw.get("source") not in content["sources"]:
            raise UserError(f"{where}: source {raw.get('source')!r} is not listed under sources")
        try:
            entry = Entry(**{**raw, "source": content["sources"][raw["source"]]})
        except TypeError as error:
            raise UserError(f"{where}: {error}") from error
        _check(entry, where)
        entries.append(entry)
    return entries


def _check(entry: Entry, where: str) -> None:
    if entry.kind not in KINDS:
        raise UserError(f"{where}: kind {entry.kind!r} is none of {', '.join(KINDS)}")
    if not isinstance(entry.match, dict) or not entry.match:
        raise UserError(f"{where}: match must name the config fields of a cell")
    for name in ("mean", "std"):
        value = getattr(entry, name)
        if value is None and name == "std":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{where}: {name} {value!r} is no fraction between 0 and 1")
    if entry.n is not None and (not isinstance(entry.n, int) or entry.n < 1):
        raise UserError(f"{where}: n {entry.n!r} is no number of runs")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)
    return str(a) == str(b)
