"""Numbers from elsewhere: each has a source, each is a fraction, and what the file may hold is checked."""

from __future__ import annotations

import csv
import re

import pytest
import yaml

from repro.errors import UserError
from repro.report.published import BEST_SCALE, KINDS, PAPER, Entry, load_entries, main

GROUP = {
    "source": "s", "kind": "authors", "metric": "test_accuracy", "by": "depth", "match": {"data": "cora"},
    "cells": [{"method": "vanilla", "values": {2: 81.75, 4: [72.6, 0.5]}}],
}  # fmt: skip


@pytest.mark.parametrize("entry", load_entries(), ids=lambda e: f"{e.kind}-{e.match}")
def test_every_number_has_a_source(entry):
    assert entry.kind in KINDS and len(entry.source) > 20 and 0 < entry.mean < 1
    assert entry.source in yaml.safe_load(PAPER.read_text())["sources"].values()
    assert (entry.std is None) or 0 <= entry.std < 0.2
    assert {"data", "model"} <= set(entry.match)
    if entry.kind == "reference-run":
        assert entry.n and entry.std and entry.match["protocol"]


def test_every_source_is_used_and_no_cell_is_there_twice():
    entries = load_entries()
    assert {e.source for e in entries} == set(yaml.safe_load(PAPER.read_text())["sources"].values())
    cells = [(e.kind, e.metric, tuple(sorted(map(str, e.match.items())))) for e in entries]
    assert len(set(cells)) == len(cells)


def test_percent_become_fractions_and_keys_become_columns(tmp_path):
    path = tmp_path / "p.yaml"
    glue = {"source": "s", "kind": "authors", "by": "data.metric", "match": {"model": "bert"}, "note": "so", "n": 3}
    cells = [
        {"method": ["a", "b"], "values": {"mrpc.f1": 88.7}},
        {"method": "c", "inference": "x", "values": {"rte.a": 1}},
    ]
    path.write_text(yaml.safe_dump({"sources": {"s": "somewhere"}, "groups": [GROUP, {**glue, "cells": cells}]}))
    first, second, third, fourth = load_entries(path)
    assert first == Entry(
        "authors", "somewhere", {"data": "cora", "depth": 2, "method": ["vanilla"]}, "test_accuracy", 0.8175
    )
    assert (second.mean, second.std, second.match["depth"]) == (0.726, 0.005, 4)
    match = {"model": "bert", "data": "mrpc", "method": ["a", "b"]}
    assert third == Entry("authors", "somewhere", match, "f1", 0.887, None, 3, "so")
    assert fourth.note == "inference: x" and fourth.mean == 0.01


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "nobody"}, "source 'nobody' is not listed"),
        ({"source": None}, "source None is not listed"),
        ({"kind": "hearsay"}, "kind 'hearsay'"),
        ({"cells": [{"method": "v", "values": {2: 817}}]}, "v 2: mean 817 is no percentage"),
        ({"cells": [{"method": "v", "values": {2: "0.5"}}]}, "mean '0.5' is no percentage"),
        ({"cells": [{"method": "v", "values": {2: True}}]}, "mean True is no percentage"),
        ({"cells": [{"method": "v", "values": {2: [50, -0.1]}}]}, "std -0.1 is no percentage"),
        ({"cells": [{"method": "v", "values": {2: 50}, "colour": "red"}]}, "unknown keys ['colour']"),
        ({"cells": [{"method": "v"}]}, "values missing"),
        ({"n": 0}, "n 0 is no number of runs"),
        ({"match": {}}, "match must name"),
        ({"metric": None}, "metric is missing"),
        ({"colour": "red"}, "unknown keys"),
    ],
)
def test_a_wrong_group_is_named_by_its_number(tmp_path, change, told):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"sources": {"s": "somewhere"}, "groups": [GROUP, GROUP | change]}))
    with pytest.raises(UserError, match="group 2") as refused:
        load_entries(path)
    assert told in str(refused.value)


@pytest.mark.parametrize("content", [[], {"groups": []}, {"sources": {}, "groups": [], "more": 1}, None])
def test_a_file_of_another_form_is_refused(tmp_path, content):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="must hold the keys sources and groups"):
        load_entries(path)


@pytest.mark.parametrize("missing", ["kind", "by", "cells", "match", "source"])
def test_a_missing_key_is_named(tmp_path, missing):
    path = tmp_path / "p.yaml"
    group = {k: v for k, v in GROUP.items() if k != missing}
    path.write_text(yaml.safe_dump({"sources": {"s": "somewhere"}, "groups": [group]}))
    with pytest.raises(UserError, match=missing):
        load_entries(path)


def test_a_number_belongs_to_a_cell_only_when_all_its_fields_agree():
    match = {"data": "cora", "hid": 32.0, "flag": True, "method": ["ContraNorm + LN", "vanilla"]}
    entry = Entry("authors", "s", match, "test_accuracy", 0.5)
    cell = {"data": "cora", "hid": 32, "flag": True, "method": "vanilla", "family": "vanilla", "more": 3}
    assert entry.fits(cell) and entry.notes(cell) == []
    for change in ({"data": "dblp"}, {"hid": 31}, {"flag": False}, {"flag": None}, {"method": "x", "family": "x"}):
        assert not entry.fits(cell | change)
    assert not entry.fits({"data": "cora"})
    scaled = cell | {"method": "ContraNorm s=1 + LN", "family": "ContraNorm + LN"}
    assert entry.fits(scaled) and entry.notes(scaled) == [BEST_SCALE]


# -- against the tables that the numbers were taken from -------------------------------------------------------------

DATA = {
    "GLUE CoLA": ("cola", "matthews_correlation"), "GLUE SST-2": ("sst2", "accuracy"), "GLUE MRPC": ("mrpc", "f1"),
    "GLUE QQP": ("qqp", "f1"), "GLUE STS-B": ("stsb", "spearmanr"), "GLUE MNLI-m": ("mnli", "accuracy_matched"),
    "GLUE MNLI-mm": ("mnli", "accuracy_mismatched"), "GLUE QNLI": ("qnli", "accuracy"),
    "GLUE RTE": ("rte", "accuracy"), "GLUE average": ("average", "score"), "GLUE": ("average", "score"),
    "ImageNet-100": ("IMNET100", "test_accuracy"), "ImageNet-1k": ("IMNET", "test_accuracy"),
}  # fmt: skip
METHODS = {
    "no norm": "vanilla", "GCN": "vanilla", "SGC": "vanilla", "PairNorm": "PN-SI", "LayerNorm": "vanilla + LayerNorm",
    "BERT-base": "vanilla", "ALBERT-base": "vanilla", "DeiT": "vanilla", "DeiT-T": "vanilla", "DeiT-S": "vanilla",
    "GIANT-XRT+RevGAT+KD": "vanilla", "BatchNorm": "BatchNorm", "GIANT-XRT+RevGAT+KD+D-ContraNorm": "D-ContraNorm",
}  # fmt: skip
TAKEN = {"Table 1": 2, "Table 2": 2, "Table 3": 80, "OGB": 4, "Table 1 (re-run)": 60, "Table 2 (re-run)": 18}


def published_cells(data_root, name):
    path = data_root.parent / "design" / name
    if not path.exists():
        pytest.skip(f"no {name} beside the data sets")
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def test_published_numbers_are_those_of_the_collection(data_root):
    """Each cell of Table 1 to 3, ogbn-arxiv and the re-runs of BERT, ALBERT and DeiT is there, with its value."""
    left = [e for e in load_entries() if e.kind != "reference-run" and e.match.get("experiment") != "SSL_cifar"]
    counts = dict.fromkeys(TAKEN, 0)
    for row in csv.DictReader(published_cells(data_root, "published-cells.csv")):
        later = row["table"] == "later paper" and row["value_percent"] != "OOM" and row["metric"] == "test accuracy"
        skipped = (
            "RoBERTa",
            "MLP",
            "GAT",
            "wGCN",
            "DropEdge",
            "Residual",
            "APPNP",
            "JKNET",
            "DAGNN",
            "SBP",
            "Label",
        )
        if row["method"].endswith(skipped) or row["method"].startswith(skipped) or row["dataset"] == "amazon-ratings":
            continue
        if not later and row["table"] not in TAKEN:
            continue
        data, metric = DATA.get(row["dataset"], (row["dataset"], row["metric"].replace(" ", "_")))
        family = METHODS.get(row["method"], "ContraNorm + LayerNorm" if row["table"] == "Table 3" else "ContraNorm")
        family = "GFSA" if row["method"].endswith(" + GFSA") else family
        std = float(row["std"]) / 100 if row["std"] else None
        found = [
            e for e in left
            if e.match["data"] == data and e.metric == metric and family in e.match["method"]
            and e.match.get("depth", 12) == int(row["depth"] or 12) and row["source"] in e.source
            and ("albert" in e.match["model"]) == row["method"].startswith("ALBERT")
        ]  # fmt: skip
        assert len(found) == 1, row
        assert found[0].mean == pytest.approx(float(row["value_percent"]) / 100, abs=1e-9)
        assert found[0].std == (None if std is None else pytest.approx(std, abs=1e-9))
        assert found[0].kind == ("authors" if row["kind"] == "authors" else "third-party re-run")
        assert found[0].note.startswith("inference") or row["method"] not in ("PairNorm", "LayerNorm")
        left.remove(found[0])
        if row["table"] in counts:
            counts[row["table"]] += 1
    assert left == [] and counts == TAKEN


def test_reference_runs_are_those_of_the_collection(data_root):
    left = [e for e in load_entries() if e.kind == "reference-run"]
    for row in csv.DictReader(published_cells(data_root, "reference-runs.csv")):
        method = {"None": "vanilla", "CN": f"ContraNorm s={float(row['norm_scale']):g}"}.get(
            row["norm_mode"], row["norm_mode"]
        )
        method += " + LayerNorm" if row["use_layer_norm"] == "yes" else ""
        (found,) = [e for e in left if e.match["method"] == [method] and e.match["depth"] == int(row["depth"])]
        left.remove(found)
        values = [float(row[name]) for name in ("test_accuracy_mean", "test_accuracy_std", "runs")]
        assert [found.mean, found.std, found.n] == pytest.approx(values, abs=1e-9)
        assert found.match["data"] == row["data"]
    assert left == []


def test_the_numbers_are_listed(capsys):
    main(["--where", "{data: cora, depth: 8, kind: authors}"])
    lines = capsys.readouterr().out.splitlines()
    chosen = [e for e in load_entries() if (e.match["data"], e.match.get("depth"), e.kind) == ("cora", 8, "authors")]
    assert len(chosen) == 4 and len([line for line in lines if line.startswith("| gnn")]) == 4
    assert all(any(f"| {e.mean * 100:.2f}" in line for line in lines) for e in chosen)
    assert lines[-1] == f"- authors: {chosen[0].source}."
    with pytest.raises(UserError, match=r"no number in paper\.yaml"):
        main(["--where", "{dat: cora}"])


def test_gfsas_rows_stand_beside_runs_of_its_budget_alone():
    cell = {"experiment": "ViT_imagenet", "data": "IMNET100", "model": "deit_tiny_patch16_224", "depth": 24}
    found = [e for e in load_entries() if e.fits({**cell, "method": "GFSA", "family": "GFSA", "epochs": 300})]
    assert [(e.mean, e.kind) for e in found] == [(0.7864, "third-party re-run")]
    for others in ({"method": "GFSA", "epochs": 500}, {"method": "GFSA K=10", "epochs": 300}):
        assert not any(e.fits({**cell, "family": others["method"], **others}) for e in load_entries())


def test_numbers_of_self_supervised_learning(data_root):
    """Eight lines of three data sets, as the notes have them; ImageNet-100's are of 224 pixels, CIFAR's of 32."""
    entries = [e for e in load_entries() if e.match.get("experiment") == "SSL_cifar"]
    assert len(entries) == 24 and {e.metric for e in entries} == {"linear_accuracy"}
    assert {(e.match["data"], e.match["crop_size"]) for e in entries} == {
        ("CIFAR10", 32), ("CIFAR100", 32), ("IMNET100", 224),
    }  # fmt: skip
    values = {}
    for e in entries:
        first = e.match["method"][0]
        base = first == "SimSiam" or "β=0" in first
        values[e.match["model"], first.split()[0], base, e.match["data"]] = e.mean
    text = "\n".join(published_cells(data_root, "ssl-methods.md"))
    data = ("CIFAR10", "CIFAR100", "IMNET100")
    for name, model in (("ResNet-18", "resnet18"), ("ResNet-50", "resnet50")):
        for method in ("SimSiam", "SimSiam-Multi"):
            printed = re.search(rf"\| {name} \| {method} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| `\[seed 002\]`", text)
            found = [values[model, method, method == "SimSiam", of] for of in data]
            assert found == [pytest.approx(float(value) / 100) for value in printed.groups()]
        printed = re.search(rf"\| {name} \| SimCLR / SimCLR-Attn \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", text)
        for of, pair in zip(data, printed.groups(), strict=True):
            found = [values[model, "SimCLR-Attn", base, of] for base in (True, False)]
            assert found == [pytest.approx(float(value) / 100) for value in pair.split(" / ")]


def test_a_column_for_each_depth_or_task(capsys):
    def rows(*arguments):
        main(list(arguments))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]

    head, *lines = rows("--where={data: cora, kind: authors}", "--columns=depth")
    assert head[-5:] == ["depth 2", "depth 4", "depth 8", "depth 16", "depth 32"]
    assert lines[0][-6:] == ["vanilla", "81.75", "72.61", "17.71", "20.71", "19.69"]
    head, *lines = rows("--where={model: albert-base-v2}", "--columns=data")
    assert "mnli accuracy_matched" in head and len(lines) == 3
    with pytest.raises(UserError, match="these numbers have"):
        main(["--where={data: cora}", "--columns=shape"])


@pytest.mark.parametrize(
    ("cell", "others"),
    [
        (
            {"experiment": "BERT_glue", "model": "bert-base-uncased", "data": "rte", "num_train_epochs": 5,
             "num_hidden_layers": None},
            [{"num_train_epochs": 1}, {"num_hidden_layers": 3}],
        ),
        (
            {"experiment": "gnn", "model": "DeepGCN", "data": "citeseer", "depth": 4, "protocol": "reference",
             "dropedge": 0.0, "residual": 0, "missing_rate": 0.0, "hid": 64, "epochs": 200},
            [{"dropedge": 0.5}, {"residual": 2}, {"missing_rate": 10.0}],
        ),
    ],
    ids=["glue", "graphs"],
)  # fmt: skip
def test_re_runs_of_others_are_of_the_published_setting(cell, others):
    cell |= {"method": "vanilla", "family": "vanilla"}
    found = [entry for entry in load_entries() if entry.kind == "third-party re-run" and entry.fits(cell)]
    assert found and all(entry.fits({**cell, "num_hidden_layers": float("nan")}) for entry in found)
    assert not any(entry.fits({**cell, **other}) for entry in found for other in others)
