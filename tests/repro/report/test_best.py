"""The value of a setting that validation chooses, for each data set."""

from __future__ import annotations

import pytest

from repro.errors import UserError
from repro.report import best


def test_one_line_for_each_data_set(write_records, capsys):
    """By the seeds that all values have; runs without the setting take no part."""
    scores = {("a", 0.1): [0.5, 0.6], ("a", 0.2): [0.6, 0.7, 0.1], ("b", 0.1): [0.9, 0.9], ("b", 0.2): [0.8, 0.9]}
    for (data, scale), values in scores.items():
        write_records(values, metric="score", data=data, method=f"ContraNorm s={scale}", scale=scale, order=[1])
    folder = write_records([0.99, 0.99], metric="score", data="a", method="vanilla", order=[0])
    best.main([folder, "--by=score"])
    assert capsys.readouterr().out == "a 0.2\nb 0.1\n"  # not by seed 2, which 0.1 lacks
    with pytest.raises(UserError, match="no run has it"):
        best.main([folder, "--where={method: vanilla}"])
    write_records([0.5], metric="score", data="c", method="ContraNorm s=0.1", scale=0.1, order=[1])
    write_records([0.5], metric="score", data="c", method="ContraNorm s=0.2", scale=0.2, order=[1], seeds=[7])
    with pytest.raises(UserError, match="no seed has runs of every scale"):
        best.main([folder, "--by=score"])


def test_a_table_with_a_column_for_each_depth(write_records, capsys):
    for depth, scale, value in ((2, 0.5, 0.8), (2, 5, 0.7), (16, 0.5, 0.3), (16, 5, 0.6)):
        folder = write_records([value] * 2, metric="validation_accuracy", data="cora", method=f"ContraNorm s={scale}",
                               scale=scale, depth=depth, order=[1])  # fmt: skip
    best.main([folder, "--columns=depth"])
    lines = [line.split() for line in capsys.readouterr().out.replace("|", "").splitlines()]
    assert lines[0] == ["data", "depth", "2", "depth", "16"] and lines[2:3] == [
        ["cora", "0.5", "(80.0,", "of", "2)", "5", "(60.0,", "of", "2)"]
    ]


def test_no_field_is_told():
    with pytest.raises(UserError, match="--each '' names no field"):
        best.main(["nowhere", "--each", ""])
