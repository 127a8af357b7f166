"""Methods over all their cells: the interquartile mean, and how often a run is above one of another method."""

from __future__ import annotations

import math

import pandas as pd

from repro.report.stats import DRAWS, Estimate, interquartile_mean, probability_of_improvement


def overall_table(cells: pd.DataFrame, name: str, against: str | None, percent: bool) -> pd.DataFrame:
    """One row per method (column `name`): cells, interquartile mean, and P(above `against`) over the cells of both.

    The cells have `values`, and `base` where `against` has a cell beside theirs.
    """
    cells = cells[[isinstance(runs, pd.DataFrame) for runs in cells["runs"]]]  # no average over columns
    rows = []
    for method, own in cells.groupby(name, sort=False):
        row = {name: str(method), "cells": str(len(own))}
        factor, digits = (100, 2) if percent else (1, 4)
        row["IQM [95 %]"] = _text(interquartile_mean([*own["values"]]), factor, digits)
        if against is not None:
            shared = own[own["base"].notna()]
            found = probability_of_improvement([*shared["values"]], [*shared["base"]]) if len(shared) else None
            row[f"P(> {against}) [95 %]"] = "" if found is None else _text(found, 1, 2)
        rows.append(row)
    return pd.DataFrame(rows)


def explained(against: str | None) -> str:
    """What the table's columns are."""
    text = "IQM: interquartile mean, of the middle half of all runs of all cells"
    if against is not None:
        text += f"; P(> {against}): how often a run is above one of {against}'s in its cell, ties half, mean over cells"
    return text + f"; 95 % percentile intervals, runs drawn anew within cells {DRAWS:,} times, unpaired"


def _text(found: Estimate, factor: float, digits: int) -> str:
    value, low, high = (f"{factor * number:.{digits}f}" for number in found)
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"
