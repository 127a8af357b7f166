"""Two sets of runs: what differs between them, by how much, and whether that is more than chance."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from repro.errors import UserError
from repro.report import compare

A, B = [0.50, 0.60, 0.70, 0.80], [0.531, 0.629, 0.732, 0.828]


@pytest.fixture
def two(write_records):
    """Four seeds without and with the method, which also has another learning rate."""
    curve = {"epoch": [1, 2], "loss": [2.0, 1.0]}
    a = write_records(A, folder="a", data="cora", method="vanilla", depth=2, lr=0.1, extra={"curve": curve})
    b = write_records(B, folder="b", data="cora", method="ContraNorm s=1", depth=2, lr=0.2, extra={"curve": curve})
    return a, b


def lines_of(text, start):
    return [[c.strip() for c in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith(start)]


def test_settings_and_metrics_of_two_folders(two, capsys):
    compare.main([*two])
    text = capsys.readouterr().out
    assert lines_of(text, "| lr ") == [["lr", "0.1", "0.2"]] and "output_dir" not in text and "seed " not in text
    (row,) = lines_of(text, "| vanilla") or lines_of(text, "| test_accuracy")
    p = f"{stats.ttest_rel(B, A).pvalue:.2g}"
    assert row[-5:] == ["0.6500 ± 0.1291 (4)", "0.6800 ± 0.1283 (4)", "+0.0300 (4)", p, p]
    compare.main(["--a", two[0], "--b", two[0]])
    assert "no setting differs" in capsys.readouterr().out


def test_cells_of_one_kind_are_compared_with_each_other(write_records, capsys):
    for folder, plus in (("a", 0), ("b", 0.1)):
        for depth in (2, 16):
            place = write_records([0.5 + plus, 0.7 + plus / 2], folder=folder, data="cora", method="m", depth=depth,
                                  order=[0], tau=plus)  # fmt: skip
    compare.main([place.replace("/b", "/a"), place])
    rows = lines_of(capsys.readouterr().out, "| 2 ")
    assert rows[0][:2] == ["2", "test_accuracy"] and rows[0][-3:-2] == ["+0.0750 (2)"]


def test_a_seed_that_is_there_twice_is_refused_and_a_run_read_twice_counts_once(two, write_records, tmp_path, capsys):
    copy = Path(write_records(B, folder="b2/again", data="cora", method="ContraNorm s=1", depth=2, lr=0.2))
    compare.main([two[0], str(copy)])
    once = lines_of(capsys.readouterr().out, "| test_accuracy")
    write_records(B, folder="b2/twice", data="cora", method="ContraNorm s=1", depth=2, lr=0.2)
    compare.main([two[0], str(copy.parent)])
    assert lines_of(capsys.readouterr().out, "| test_accuracy") == once
    write_records([b + 0.01 for b in B], folder="b2/other", data="cora", method="ContraNorm s=1", depth=2, lr=0.3)
    with pytest.raises(UserError, match="seed 0 is there twice with different numbers"):
        compare.main([two[0], str(copy.parent)])


def test_the_curves_of_both_are_overlaid(two, tmp_path, capsys):
    compare.main([*two, "--output", str(tmp_path / "curves")])
    text = (tmp_path / "curves.svg").read_text()
    assert ">A: a (n = 4)<" in text and ">B: b (n = 4)<" in text and (tmp_path / "curves.png").is_file()


def test_what_cannot_be_compared_is_told(two):
    with pytest.raises(UserError, match="f1: not in both; there are test_accuracy"):
        compare.main([*two, "--metric", "f1"])
    with pytest.raises(UserError, match="no record"):
        compare.main([two[0], "nowhere"])


def test_runs_without_a_curve_or_a_cell_in_common(write_records, tmp_path):
    a = write_records([0.5], folder="a", data="cora", method="m", depth=2)
    b = write_records([0.5], folder="b", data="cora", method="m", depth=2)
    with pytest.raises(UserError, match="no run of either has a curve"):
        compare.main([a, b, "--output", str(tmp_path / "x.svg")])
    write_records([0.5], folder="a", data="cora", method="m", depth=4)
    write_records([0.5], folder="c", data="dblp", method="m", depth=8)
    with pytest.raises(UserError, match="no cell"):
        compare.main([a, str(Path(b).with_name("c"))])


def test_no_metric_in_both_is_told(write_records):
    one, other = (write_records([0.5], metric=name, folder=name) for name in ("score", "accuracy"))
    with pytest.raises(UserError, match="^no metric is in both$"):
        compare.main([one, other])
