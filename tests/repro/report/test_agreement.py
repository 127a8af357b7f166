"""Published cells are counted by one rule, chosen without looking at them, and a reversed order is marked."""

from __future__ import annotations

import pytest

from repro.report import tables
from repro.report.agreement import agreement_sentence, agreement_table, judge
from repro.report.cells import aggregate
from repro.report.published import Entry
from repro.report.records import load_records

KEYS = ["data", "method", "depth"]


def entry(method, mean, depth=2, **more):
    match = {"data": "cora", "depth": depth, "method": [method]}
    return Entry("authors", "paper", match, "test_accuracy", mean, **more)


@pytest.fixture
def verdicts(write_records):
    """The verdicts on published numbers of runs {(method, depth): [(test, validation), ...]}."""

    def of(runs, entries):
        for (method, depth), values in runs.items():
            scale = float(method.split("s=")[1].split()[0]) if "s=" in method else None
            folder = write_records(
                [{"test_accuracy": t, "validation_accuracy": v} for t, v in values],
                data="cora", method=method, scale=scale, depth=depth, order=[0 if scale is None else 1],
            )  # fmt: skip
        cells = aggregate(load_records(folder), KEYS, "test_accuracy")
        return judge({"test_accuracy": cells}, entries)

    return of


def test_agreeing_differing_and_missing_cells_are_counted(verdicts):
    runs = {("vanilla", depth): [(0.5, 0.5), (0.52, 0.5), (0.54, 0.5)] for depth in (2, 4)} | {
        ("vanilla", 8): [(0.5, 0.5)]
    }
    entries = [entry("vanilla", 0.53), entry("vanilla", 0.9, 4), entry("vanilla", 0.5, 8), entry("vanilla", 0.5, 16)]
    found = verdicts(runs, entries)
    assert [v.agrees for v in found] == [True, False, None, None] and found[3].cell is None
    assert agreement_sentence(found, "published") == (
        "Of 4 cells published, 3 have been run here; of 2 with two runs or more, 1 agrees and 1 does not "
        "(cora vanilla at depth 4). The median interval is ± 7.0 points; in 2 it is wider than ± 5, and agreement "
        "there means little."
    )
    (row,) = agreement_table(found, True).to_dict("records")
    assert (row["published"], row["ours"], row["difference"], row["agrees"]) == (
        "90.00", "52.00 ± 2.00 (3)", "-38.00", "no",
    )  # fmt: skip


def test_the_scale_is_chosen_on_validation_not_by_the_published_number(verdicts):
    runs = {
        ("ContraNorm s=1", 2): [(0.70, 0.6), (0.71, 0.6)],  # nearest to the published number
        ("ContraNorm s=5", 2): [(0.60, 0.8), (0.61, 0.8)],
    }
    (found,) = verdicts(runs, [entry("ContraNorm", 0.705)])
    assert found.cell["method"] == "ContraNorm s=5" and found.agrees is False and found.also == ("ContraNorm s=1",)
    runs |= {("PN", 2): [(0.5, 0.5), (0.51, 0.5)], ("PN s=5", 2): [(0.6, 0.9), (0.61, 0.9)]}
    (found,) = verdicts(runs, [entry("PN", 0.505)])
    assert found.cell["method"] == "PN"  # the row that bears the published name comes first


def test_the_choice_is_over_the_seeds_that_all_rows_have(verdicts):
    """A row of fewer seeds may have had the lucky ones."""
    runs = {
        ("ContraNorm s=1", 2): [(0.70, 0.8), (0.71, 0.8), (0.72, 0.8), (0.73, 0.8)],
        ("ContraNorm s=5", 2): [(0.60, 0.9), (0.61, 0.9), (0.62, 0.1), (0.63, 0.1)],
        ("ContraNorm s=9", 2): [(0.50, 0.7), (0.51, 0.7)],
    }
    (found,) = verdicts(runs, [entry("ContraNorm", 0.7)])
    assert found.cell["method"] == "ContraNorm s=5"  # as tables and figures choose


def test_a_reversed_order_is_marked_and_kept(verdicts):
    runs = {
        ("vanilla", 2): [(0.70, 0.5), (0.72, 0.5)],
        ("PN", 2): [(0.3, 0.5), (0.31, 0.5)],
        ("ContraNorm s=1", 2): [(0.6, 0.5), (0.62, 0.5)],
    }
    found = verdicts(runs, [entry("vanilla", 0.5), entry("PN", 0.31), entry("ContraNorm", 0.62)])
    assert [v.reversed for v in found] == [(), (), ("vanilla",)]
    assert "in 1 the published order of ContraNorm and another method is reversed (cora ContraNorm at depth 2)" in (
        agreement_sentence(found, "published")
    )
    rows = agreement_table(found, True).to_dict("records")
    assert [(r["published row"], r["agrees"], r["order reversed to"]) for r in rows] == [
        ("vanilla", "no", ""), ("ContraNorm", "yes", "vanilla"),
    ]  # fmt: skip


def test_table_3_s_count_on_the_command_line(root, capsys):
    records = str(root / "results/table3_cora/records.jsonl")
    tables.main([records, "--preset", "table3", "--show", "agreement"])
    text = capsys.readouterr().out
    assert text.startswith("Rule: a published cell agrees when") and "at least ± 0.5 points" in text
    assert "Of 80 cells published by the authors, 12 have been run here: 12 agree" in text
    tables.main([records, "--preset", "table3", "--show", "sentence", "--where", "{data: cora}"])
    text = capsys.readouterr().out
    assert text.startswith("Of 20 cells published by the authors, 12 have been run here") and text.count("\n") == 1
    for name in ("method", "family"):
        tables.main([records, "--preset", "table3", "--show", "sentence", "--where", f"{{{name}: vanilla}}"])
        text = capsys.readouterr().out
        assert text.startswith("Of 20 cells published by the authors, 3 have been run here: 3 agree. The median")


def test_a_headline_is_silent_where_no_published_cell_has_been_run(root, capsys):
    records = str(root / "results/table2/records.jsonl")
    tables.main([records, "--preset", "table2", "--against", "vanilla", "--show", "sentence"])
    assert capsys.readouterr().out.startswith("Of 2 cells published by the authors, 0 have been run here. ContraNorm")
    tables.main([records, "--preset", "table2", "--against", "vanilla", "--show", "headline"])
    text = capsys.readouterr().out
    assert text.startswith("ContraNorm s=0.1 against vanilla: ") and " ContraNorm s=0.5 against vanilla: " in text


def test_protocols_that_bear_their_data_set_s_name_share_a_table(root, capsys):
    records = str(root / "results/table2/records.jsonl")
    tables.main([records, "--preset", "table2", "--against", "vanilla"])
    text = capsys.readouterr().out
    assert "| CIFAR10 | " in text and "| TINY " in text and "TINY validation split" in text
