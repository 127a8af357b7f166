"""What each cell of a table cost: parameters, multiply-adds, seconds, memory, and the tuning before it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from numbers import Real
from typing import Any

import pandas as pd

from repro.report.cells import rows_of, text_of

EXPLAINED = (
    "Costs: parameters, and multiply-adds of one forward pass, of the whole graph or of one example (in brackets their "
    "range), seconds of a run and of training for an epoch, most memory: medians over the cell's runs; tuning: "
    "settings that were tried; setting: numbers in the command"
)


def cost_table(cells: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per cell, medians over its runs; columns that no record fills are left out."""
    rows = []
    measured = [cell for cell in rows_of(cells) if isinstance(cell.get("runs"), pd.DataFrame)]
    fixed = {*keys, "tuning_trials", *_depths(measured)}
    for cell in measured:
        runs = cell["runs"]
        rows.append(
            {str(key): text_of(cell[key]) for key in keys}
            | {
                "parameters": _median(_column(runs, "parameters"), "{:,.0f}"),
                "multiply-adds": _median(_column(runs, "multiply_adds"), "{:,.1f} M", 1e-6),
                "seconds": _median(_column(runs, "seconds"), "{:.1f}", spread=False),
                "an epoch": _median(_column(runs, "epoch_seconds"), "{:.3g}", spread=False),
                "memory": _median(_memory(runs), "{:,.0f} MB", spread=False),
                "tuning": text_of(cell.get("tuning_trials")).removesuffix(".0"),
                "setting": _setting(cell, fixed),
            }
        )
    table = pd.DataFrame(rows)
    return table[[name for name in table if name in keys or (table[name] != "").any()]]


def _depths(cells: Iterable[dict[Any, Any]]) -> set[str]:
    """The settings that say the depth, which is a field of the cell already."""
    names = {name for cell in cells for name in cell["settings"]}
    return {name for name in names if all(cell.get(name) == cell["depth"] for cell in cells)}


def _column(runs: pd.DataFrame, name: str) -> pd.Series[Any]:
    return pd.to_numeric(runs[name], errors="coerce").dropna() if name in runs else pd.Series(dtype=float)


def _memory(runs: pd.DataFrame) -> pd.Series[Any]:
    on_gpu = _column(runs, "peak_cuda_mb")
    return _column(runs, "peak_rss_mb") if on_gpu.empty else on_gpu


def _median(numbers: pd.Series[Any], form: str, factor: float = 1, *, spread: bool = True) -> str:
    if numbers.empty:
        return ""
    low, middle, high = (form.format(factor * value) for value in (numbers.min(), numbers.median(), numbers.max()))
    return middle if low == high or not spread else f"{middle} ({low} to {high})"


def _setting(cell: dict[Any, Any], fixed: set[str]) -> str:
    """`lr=0.0031, scale=1.11`: settings that are numbers and stand in the run's command."""
    named = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)[ =]", str(cell.get("command", "")))]
    known = {*cell["settings"], "scale"} - fixed  # a flag that the cell has too
    chosen = {name: cell[name] for name in named if name in known}
    numbers = {name: v for name, v in chosen.items() if isinstance(v, Real) and not isinstance(v, bool) and v == v}
    return ", ".join(f"{name}={value:g}" for name, value in numbers.items())
