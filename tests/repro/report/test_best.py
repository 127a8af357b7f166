"""The value of a setting that validation chooses, for each data set."""

from __future__ import annotations

import pytest

from repro.errors import UserError
from repro.report import best


def test_one_line_for_each_data_set(write_records, capsys):
    """By the given seeds alone; runs without the setting take no part."""
    scores = {("a", 0.1): [0.5, 0.6], ("a", 0.2): [0.6, 0.7, 0.1], ("b", 0.1): [0.9, 0.9], ("b", 0.2): [0.8, 0.9]}
    for (data, scale), values in scores.items():
        write_records(values, metric="score", data=data, method=f"ContraNorm s={scale}", scale=scale, order=[1])
    folder = write_records([0.99, 0.99], metric="score", data="a", method="vanilla", order=[0])
    best.main([folder, "--seeds=[0, 1]"])
    assert capsys.readouterr().out == "a 0.2\nb 0.1\n"
    best.main([folder])
    assert capsys.readouterr().out == "a 0.1\nb 0.1\n"
    with pytest.raises(UserError, match="no run has it"):
        best.main([folder, "--where={method: vanilla}"])
