"""Tables: the numbers are those of the raw runs, mixtures are refused, and choices are made by validation."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from scipy import stats

from repro.errors import UserError
from repro.report import published, tables
from repro.report.cells import aggregate
from repro.report.records import load_records
from repro.report.stats import Summary, welch
from repro.report.tables import Config, build

GNN = {"model": "DeepGCN", "hid": 32, "epochs": 200, "extra": {"experiment": "gnn"}}
CONTRANORM = {"method": "ContraNorm s=1 + LayerNorm", "order": [10, 0, 1, 1], "scale": 1.0}


@pytest.fixture
def table(capsys):
    """What `python -m repro.report.tables` prints, as text."""

    def run(records, *flags, rows="data", metric="test_accuracy"):
        given = ["--rows", rows, "--metric", metric] if rows else []
        tables.main(["--records", records, *given, *flags])
        return capsys.readouterr().out

    return run


def cells_of(text):
    """A Markdown or CSV table as a list of mappings (the first table of the text)."""
    if "|" not in text:
        return list(csv.DictReader(io.StringIO(text.split("\n\n")[0])))
    lines = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    widths = len(lines[0])
    body = []
    for line in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]:
        body.append(dict(zip(lines[0], [c.strip() for c in line.split("|")[1:-1]], strict=True)))
        assert len(body[-1]) == widths
    return body


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_mean_std_and_n_of_each_cell(write_records, table):
    values = {("cora", 2): [0.81, 0.82, 0.835], ("cora", 4): [0.7, 0.72], ("dblp", 2): [0.5]}
    for (data, depth), accuracies in values.items():
        folder = write_records(accuracies, data=data, depth=depth)
    text = table(folder, "--columns", "depth")
    rows = {row["data"]: row for row in cells_of(text)}
    for (data, depth), accuracies in values.items():
        shown = rows[data][f"depth {depth}"]
        expected = f"{100 * np.mean(accuracies):.2f}"
        if len(accuracies) > 1:
            expected += f" ± {100 * np.std(accuracies, ddof=1):.2f}"
        assert shown == f"{expected} ({len(accuracies)})"
    assert rows["dblp"]["depth 4"] == ""  # a cell without runs is empty
    assert "6 runs, seeds 0, 1, 2" in text and "protocol: p" in text and "reported: last epoch" in text


def test_depths_are_ordered_as_numbers(write_records, table):
    for depth in (16, 2, 4):
        folder = write_records([0.5], data="cora", depth=depth)
    header = table(folder, "--columns", "depth").splitlines()[2]
    assert [int(n) for n in re.findall(r"depth (\d+)", header)] == [2, 4, 16]


def test_fractions_or_percent_and_where(write_records, table):
    folder = write_records([0.5, 0.7], data="cora", depth=2)
    write_records([0.1, 0.2], data="dblp", depth=2)
    text = table(folder, "--no_percent", "--where", "{data: cora}")
    assert "0.6000 ± 0.1414 (2)" in text and "dblp" not in text and "in %" not in text
    for wrong in ("{data: pubmed}", "{colour: red}"):
        with pytest.raises(UserError, match=r"no record is left after --where|--where colour"):
            table(folder, "--where", wrong)


# -- forms -----------------------------------------------------------------------------------------------------------


def test_csv_and_latex_hold_the_same_cells(write_records, table, tmp_path):
    for depth in (2, 4):
        folder = write_records([0.81, 0.82], data="co_ra", depth=depth)
    expected = [{"data": "co_ra", "depth 2": "81.50 ± 0.71 (2)", "depth 4": "81.50 ± 0.71 (2)"}]
    assert cells_of(table(folder, "--columns", "depth")) == expected
    assert cells_of(table(folder, "--columns", "depth", "--format", "csv")) == expected
    latex = table(folder, "--columns", "depth", "--format", "latex")
    assert r"co\_ra & 81.50 $\pm$ 0.71 (2) & 81.50 $\pm$ 0.71 (2) \\" in latex
    assert latex.count(r"\begin{tabular}{lll}") == latex.count(r"\end{tabular}") == 1
    for line in latex.split(r"\begin")[0].splitlines():
        assert line == "" or line.startswith("% ")
    output = tmp_path / "deep" / "table.md"
    assert table(folder, "--output", str(output), "--columns", "depth") == output.read_text()


# -- what is not comparable ------------------------------------------------------------------------------------------


def test_mixed_protocols_are_refused(write_records, table):
    write_records([0.5], data="cora", protocol="reference")
    folder = write_records([0.6], data="cora", protocol="standard")
    with pytest.raises(UserError, match="mixes protocol: reference, standard"):
        table(folder)
    assert len(cells_of(table(folder, rows="data,protocol"))) == 2
    assert "60.00 (1)" in table(folder, "--where", "{protocol: standard}")
    write_records([0.5], data="a", protocol="reference", folder="other")
    folder = write_records([0.5], data="b", protocol="standard", folder="other")
    with pytest.raises(UserError, match="records mix protocols"):
        table(folder)


def test_mixed_settings_are_refused_but_not_those_that_change_no_number(write_records, table):
    write_records([0.5], data="cora", hid=32, device="cpu")
    folder = write_records([0.6], data="cora", hid=64, device="cpu", seeds=[1])
    with pytest.raises(UserError, match="mixes hid: 32, 64"):
        table(folder)
    write_records([0.5], data="cora", hid=32, device="cpu", folder="b")
    folder = write_records([0.6], data="cora", hid=32, device="cuda", seeds=[1], folder="b")
    assert "55.00 ± 7.07 (2)" in table(folder)


def test_a_run_found_twice_counts_once_and_two_of_one_seed_are_an_error(write_records, table):
    folder = write_records([0.5, 0.6], data="cora")
    write_records([0.5, 0.6], data="cora", folder="runs/copy")
    assert "55.00 ± 7.07 (2)" in table(folder)
    write_records([0.9], data="cora", folder="runs/other")
    with pytest.raises(UserError, match="seed 0 is there twice with different numbers"):
        table(folder)


def test_splits_times_seeds_are_the_runs_of_one_cell(write_records, table):
    values = {split: [0.5 + 0.01 * split, 0.6 + 0.02 * split] for split in range(10)}
    for split, accuracies in values.items():
        folder = write_records(accuracies, data="texas", split=split)
    write_records([0.9, 0.8], data="cora", split=None)
    text = table(folder)
    everything = 100 * np.array(list(values.values()))
    texas, cora = sorted(cells_of(text), key=lambda row: row["data"], reverse=True)
    assert texas["mean ± std (n)"] == f"{everything.mean():.2f} ± {everything.std(ddof=1):.2f} (20)"
    assert cora["mean ± std (n)"] == "85.00 ± 7.07 (2)"
    assert "22 runs, seeds 0, 1, splits 0, 1, 2, 3, 4, 5, 6, 7, 8, 9;" in text.replace(".", ";")
    assert len(cells_of(table(folder, rows="data,split"))) == 11
    assert "splits" not in table(folder, "--where", '{split: "3"}')
    write_records(values[3], data="texas", split=3, folder="runs/copy")
    assert "(20)" in table(folder)
    write_records([0.1], data="texas", split=3, folder="runs/other")
    with pytest.raises(UserError, match="seed 0 of split 3 is there twice with different numbers"):
        table(folder)


def test_a_split_that_is_not_set_is_the_first(write_records, table):
    write_records([0.5], data="texas", split=None)
    folder = write_records([0.5], data="texas", split=0)
    assert "50.00 (1)" in table(folder) and "splits" not in table(folder)
    write_records([0.6], data="texas", split=0, folder="runs/other")
    with pytest.raises(UserError, match="seed 0 of split 0 is there twice"):
        table(folder)


@pytest.mark.parametrize("value", ["nan", None])
def test_a_number_that_is_missing_is_not_left_out_of_the_mean(write_records, table, value):
    folder = write_records([0.5, value], data="cora")
    with pytest.raises(UserError, match="missing or not a number in .*record.json"):
        table(folder)


def test_wrong_names_are_told_with_those_there_are(write_records, table):
    folder = write_records([0.5], data="cora")
    for rows, metric, told in [("colour", "test_accuracy", "colour"), ("data", "f1", "there are test_accuracy")]:
        with pytest.raises(UserError, match=told):
            table(folder, rows=rows, metric=metric)
    for flags, told in [([], "--rows and --metric missing"), (["--rows", "data"], "--metric missing")]:
        with pytest.raises(UserError, match=told):
            table(folder, *flags, rows="")
    with pytest.raises(UserError, match="--records is missing"):
        tables.main([])


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_scale_is_chosen_by_validation_also_where_test_says_otherwise(write_records, table):
    for scale, validation, test in [(0.2, 0.6, 0.9), (0.5, 0.8, 0.5), (1.0, 0.7, 0.7)]:
        runs = [{"validation_accuracy": validation + e, "test_accuracy": test + e} for e in (-0.01, 0.01)]
        folder = write_records(runs, data="cora", method=f"CN s={scale:g}", scale=scale, order=[1, scale])
    for rows, first in (("data,method", "CN"), ("data,family", "CN"), ("data", "cora")):
        text = table(folder, "--best", "scale", "--by", "validation_accuracy", rows=rows)
        assert "50.00 ± 1.41 (2) [0.5] |" in text and "90.00" not in text and f"| {first} " in text
    assert "in brackets: scale chosen per cell by the highest mean validation_accuracy" in text
    write_records(runs, data="cora", method="vanilla", order=[0])
    text = table(folder, "--best", "scale", "--by", "validation_accuracy", rows="data,method")
    assert [(row["family"], row["mean ± std (n)"]) for row in cells_of(text)] == [
        ("vanilla", "70.00 ± 1.41 (2)"), ("CN", "50.00 ± 1.41 (2) [0.5]")
    ]  # fmt: skip
    with pytest.raises(UserError, match="mixes scale"):
        table(folder, "--where", "{family: CN}", rows="data,family")


def test_choosing_by_test_is_refused(write_records, table):
    folder = write_records([0.5], data="cora", scale=1.0)
    with pytest.raises(UserError, match="--by test_accuracy: .*name a validation metric"):
        table(folder, "--best", "scale", "--by", "test_accuracy")
    for flags in (["--best", "scale"], ["--by", "validation_accuracy"]):
        with pytest.raises(UserError, match="belong together"):
            table(folder, *flags)
    with pytest.raises(UserError, match="--by validation: no record has"):
        table(folder, "--best", "scale", "--by", "validation")


# -- the paper's tables ------------------------------------------------------------------------------------------------


def test_table_3_sets_the_reference_code_beside_ours(write_records, table):
    ours = [0.745, 0.75, 0.74]
    folder = write_records(ours, data="cora", depth=8, **GNN, **CONTRANORM, protocol="reference")
    write_records([0.12, 0.13], data="cora", depth=8, **GNN, method="vanilla", order=[0], protocol="reference")
    write_records([0.5], data="dblp", depth=8, **GNN, **CONTRANORM, protocol="reference")
    text = table(folder, "--preset", "table3", rows="")
    assert [row["method"] for row in cells_of(text)] == ["vanilla", *["ContraNorm s=1 + LayerNorm"] * 2]
    (line,) = [x for x in text.splitlines() if "ContraNorm" in x and "cora" in x and "74.30" in x]
    (entry,) = [
        e for e in published.load_entries()
        if e.kind == "reference-run" and e.match["method"] == [CONTRANORM["method"]] and e.match["depth"] == 8
    ]  # fmt: skip
    p = welch(Summary(np.mean(ours), np.std(ours, ddof=1), 3), Summary(entry.mean, entry.std, entry.n))
    assert "74.30 ± 0.31 (5)" in line and "74.50 ± 0.50 (3)" in line and "+0.20" in line and f"{p:.2g}" in line
    assert "dblp" not in text.split("reference code as run")[1]
    write_records(ours, data="cora", depth=8, **GNN, **CONTRANORM, protocol="standard", folder="standard")
    runs = [{"test_accuracy": v, "validation_accuracy": v} for v in ours]
    write_records(runs, data="cora", depth=8, **GNN, **CONTRANORM, protocol="reference", folder="chosen")
    flags = "--preset table3 --best scale --by validation_accuracy".split()
    chosen = table(str(folder).replace("runs", "chosen"), *flags, rows="")
    assert "scale" in chosen.split("published")[0].splitlines()[-1] and "(3) [1.0]" in chosen
    assert "74.01 †" in chosen and "74.30 ± 0.31 (5)" in chosen
    other = table(str(folder).replace("runs", "standard"), "--preset", "table3", rows="")
    assert "published" not in other and "reference code as run" not in other  # another protocol is another number


def comparison(text):
    """The second table of the text, as `cells_of`."""
    return cells_of("|" + text.split("\n\n|", 2)[2])


def test_table_3_of_the_committed_records_has_a_published_number_wherever_there_is_one(table, root):
    text = table(str(root / "results/table3_cora/records.jsonl"), "--preset", "table3", rows="")
    rows = {(row["method"], int(row["depth"])): row for row in comparison(text)}
    expected = {
        "vanilla": ("81.75", "72.61", "17.71"),
        "vanilla + LayerNorm": ("79.96 ‡", "77.45 ‡", "39.09 ‡"),
        "PN-SI": ("75.32 §", "72.64 §", "71.86 §"),
    }
    expected |= {f"ContraNorm s={s} + LayerNorm": ("79.75 ‖", "77.02 ‖", "74.01 ‖") for s in ("0.2", "0.5", "0.8", "1")}
    found = {key: row["published"] for key, row in rows.items() if row["published"]}
    assert found == {
        (m, d): value for m, values in expected.items() for d, value in zip((2, 4, 8), values, strict=True)
    }
    for mark, note in (
        ("‡", "inference: that the published LayerNorm is the vanilla network"),
        ("§", "inference: that the published PairNorm is PN-SI"),
        ("‖", "at a scale that it chose"),
    ):
        assert re.search(rf"^- {mark} .*{note}", text, re.MULTILINE), note
    assert "gnn/visualization.py" in text.split("- published: ")[1]
    assert all(any(row[name] for row in rows.values()) for name in next(iter(rows.values())))


GLUE = "cola,mnli,mrpc,qnli,qqp,rte,sst2,stsb".split(",")


def write_glue(write_records, tasks, score):
    for method, scale in (("vanilla", None), ("ContraNorm s=0.01", 0.01), ("ContraNorm s=0.1", 0.1)):
        for number, task in enumerate(tasks):
            folder = write_records(
                [{"score": score(method, scale, number, seed)} for seed in (0, 1)], protocol="GLUE validation set",
                extra={"experiment": "BERT_glue"}, model="bert-base-uncased", data=task, method=method, scale=scale,
                order=[1, scale] if scale else [0],
            )  # fmt: skip
    return folder


def test_table_1_prints_the_average_over_tasks_beside_the_published_one(write_records, table):
    def score(method, scale, number, seed):
        best = {None: 0.0, 0.01: 0.05 if number % 2 else 0.02, 0.1: 0.02 if number % 2 else 0.05}[scale]
        return 0.5 + 0.01 * number + best + 0.004 * seed

    folder = write_glue(write_records, [*GLUE, "wnli"], score)
    text = table(folder, "--preset", "table1", "--best", "scale", "--by", "score", rows="")
    none, contra = cells_of(text)
    assert list(none) == ["model", "family", *(f"data {t}" for t in [*GLUE, "wnli"]), "data average"]
    averages = [0.5 + 0.035, 0.504 + 0.035]  # of the eight tasks, per seed: the ninth is not in the paper's
    assert none["data average"] == f"{100 * np.mean(averages):.2f} ± {100 * np.std(averages, ddof=1):.2f} (2)"
    assert contra["data average"] == f"{100 * np.mean(averages) + 5:.2f} ± {100 * np.std(averages, ddof=1):.2f} (2)"
    beside = text.split("\n\n")[2]
    assert "82.59" in beside and "83.54" in beside and beside.count("average") == 2
    assert "82.51 †" in beside and "† the mean over nine columns" in text


def test_a_cell_without_a_published_score_shows_the_metric_that_was_published(write_records, table):
    runs = [{"score": 0.85, "accuracy": 0.8, "f1": 0.9}, {"score": 0.87, "accuracy": 0.82, "f1": 0.92}]
    for data, values in (("mrpc", runs), ("rte", [{"score": 0.7, "accuracy": 0.7}])):
        folder = write_records(values, extra={"experiment": "BERT_glue"}, model="albert-base-v2", data=data,
                               method="ContraNorm s=0.01", scale=0.01, order=[1])  # fmt: skip
    rows = comparison(table(folder, "--preset", "table1", rows=""))
    assert [(r["data"], r["metric"], r["re-run by others"], r["ours"], r["difference"]) for r in rows] == [
        ("rte", "accuracy", "78.70 †", "70.00 (1)", "-8.70"), ("mrpc", "f1", "92.83 †", "91.00 ± 1.41 (2)", "-1.83")
    ]  # fmt: skip
    assert "published" not in rows[0]
    assert [(r["p"], r["agrees"]) for r in rows] == [("", ""), ("0.42", "yes")]  # one run decides nothing


def test_an_average_over_fewer_tasks_says_so_and_has_no_published_number_beside_it(write_records, table):
    folder = write_glue(write_records, ["rte", "mrpc"], lambda *a: 0.5 if a[2] else 0.7)
    text = table(folder, "--preset", "table1", "--best", "scale", "--by", "score", rows="")
    assert [row["data average of mrpc, rte"] for row in cells_of(text)] == ["60.00 ± 0.00 (2)"] * 2
    assert "published" not in text
    folder = write_glue(write_records, ["rte"], lambda *a: 0.5)
    text = table(folder.replace("mrpc", ""), "--preset", "table1", "--where", "{data: rte}", "--best", "scale", "--by",
                 "score", rows="")  # fmt: skip
    assert "average" not in text


def test_table_2_shows_every_scale_beside_the_vanilla_model(write_records, table):
    for method, scale, accuracy in (
        ("ContraNorm s=0.2", 0.2, 0.8),
        ("vanilla", None, 0.7),
        ("ContraNorm s=0.1", 0.1, 0.75),
    ):
        folder = write_records([accuracy], data="IMNET100", model="deit_tiny_patch16_224", method=method, scale=scale,
                               order=[1, scale] if scale else [0], depth=24, epochs=300,
                               extra={"experiment": "ViT_imagenet"})  # fmt: skip
    text = table(folder, "--preset", "table2", rows="")
    assert [(r["method"], r["depth 24"]) for r in cells_of(text)] == [
        ("vanilla", "70.00 (1)"), ("ContraNorm s=0.1", "75.00 (1)"), ("ContraNorm s=0.2", "80.00 (1)")
    ]  # fmt: skip
    rows = comparison(text)
    assert [(r["published"], r["re-run by others"], r["difference"]) for r in rows] == [
        ("76.76", "76.76", "-6.76"), ("81.28 †", "78.12 †", "-6.28"), ("81.28 †", "78.12 †", "-1.28")
    ]  # fmt: skip


def test_places_of_records_may_come_first_and_a_wrong_one_is_said_first(write_records, table, tmp_path, capsys):
    folder = write_records([0.5], data="cora")
    other = write_records([0.6], data="dblp", folder="other")
    tables.main([folder, other, "--rows", "data", "--metric", "test_accuracy"])
    assert [row["data"] for row in cells_of(capsys.readouterr().out)] == ["cora", "dblp"]
    with pytest.raises(UserError, match="no record.json or records.jsonl there"):
        tables.main([str(tmp_path / "nowhere")])


def test_aggregate_agrees_with_a_loop_over_records(write_records):
    rng = np.random.default_rng(0)
    values = {(d, n): rng.random(int(rng.integers(1, 5))).tolist() for d in "abc" for n in (2, 4)}
    for (data, depth), numbers in values.items():
        folder = write_records(numbers, data=data, depth=depth)
    found = aggregate(load_records(folder), ["data", "depth"], "test_accuracy")
    assert len(found) == len(values)
    for _, cell in found.iterrows():
        numbers = values[cell["data"], cell["depth"]]
        assert cell["mean"] == pytest.approx(sum(numbers) / len(numbers)) and cell["n"] == len(numbers)
        if len(numbers) > 1:
            assert cell["std"] == pytest.approx(np.std(numbers, ddof=1))


def test_the_text_is_the_same_each_time(write_records):
    folder = write_records([0.5, 0.6], data="cora")
    config = Config(records=folder, rows="data", metric="test_accuracy")
    assert build(config, []) == build(config, [])


# -- against a row of our own ------------------------------------------------------------------------------------------


@pytest.fixture
def paired(write_records):
    """vanilla, a method that is better by a nearly constant amount, and one that has other seeds; two depths."""
    base, better = [0.50, 0.60, 0.70, 0.80], [0.531, 0.629, 0.732, 0.828]
    for depth in (2, 4):
        for method, values, order in (("vanilla", base, 0), ("ContraNorm", better, 1)):
            write_records(values, data="cora", method=method, depth=depth, order=[order])
        folder = write_records(base, seeds=[10, 11, 12, 13], data="cora", method="other", depth=depth, order=[2])
    return folder, base, better


def test_methods_are_compared_with_a_row_of_the_table_by_seed(paired, table):
    folder, base, better = paired
    text = table(folder, "--columns", "depth", "--against", "vanilla", rows="data,method")
    p = stats.ttest_rel(better, base).pvalue
    contra, other = cells_of(text)
    shown = f"+3.00 (4), p {4 * p:.2g}"  # Holm over the four cells
    assert contra == {"data": "cora", "method": "ContraNorm", "depth 2": shown, "depth 4": shown}
    assert other["depth 2"] == "+0.00 (4, unpaired), p 1"
    assert "difference from vanilla in points (number of pairs), p of the paired t-test" in text
    assert "- ContraNorm against vanilla: +3.00 points over 2 cells, 95 % bootstrap interval +3.00 to +3.00; " in text
    assert "better in 2, worse in 0 (p < 0.05 after Holm over 4 cells)" in text
    sentence = table(folder, "--columns", "depth", "--against", "vanilla", "--show", "sentence", rows="data,method")
    assert sentence.startswith("ContraNorm against vanilla: +3.00 points") and sentence.count("against") == 1
    ranks = table(folder, "--columns", "depth", "--against", "vanilla", "--test", "wilcoxon", rows="data,method")
    assert cells_of(ranks)[0]["depth 2"] == "+3.00 (4), p 0.25" and "Wilcoxon" in ranks
    assert cells_of(ranks)[1]["depth 2"].endswith("p —")


def test_equivalence_within_a_margin(paired, table):
    folder, *_ = paired
    for margin, within in (("0.05", 2), ("0.02", 0)):
        text = table(
            folder, "--columns", "depth", "--against", "method=vanilla", "--margin", margin, rows="data,method"
        )
        assert f"within {margin} in {within}" in text and f"equivalence within {margin} (TOST)" in text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--against", "nobody"], "--against nobody: no such row"),
        (["--against", "depth=9"], "no such row"),
        (["--margin", "0.02"], "--margin needs --against"),
        (["--against", "vanilla", "--margin", "0"], "larger than 0"),
        (["--against", "vanilla", "--where", "{method: vanilla}"], "no other row has a cell in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(paired, table, flags, told):
    with pytest.raises(UserError, match=told):
        table(paired[0], "--columns", "depth", *flags, rows="data,method")
