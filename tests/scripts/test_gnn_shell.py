"""The shell of gnn/: what it would run, that each line trains, and the way from lines to a table and a figure."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from gnn import data as graphs
from gnn import train as training
from gnn.config import Config
from gnn.main import main
from gnn.pyg import Data
from repro import tune
from repro.config import load_yaml, parse_config
from repro.report import figures, tables
from repro.sweep import sweep

NORMS = ("None", "LN", "PN", "PN-SI", "PN-SCS")


Hear = Callable[..., tuple[list[str], list[list[str]]]]  # the fixture's type


def parse(words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The settings that a line asks for."""
    monkeypatch.chdir(root)  # lines name configs relative to the repository
    flags = words[words.index("gnn.main") + 1 :]
    flags = flags if "--output_dir" in flags else [*flags, "--output_dir=x"]
    return parse_config(Config, flags, prog="gnn.main")


def parse_report_calls(calls: list[str]) -> list[Any]:
    """The settings of calls of repro.report.tables and repro.report.figures."""
    parsed = []
    for call in calls:
        words = shlex.split(re.sub(r"({.*?}|\[.*?\])", r"'\1'", call))  # quotes are lost on the way
        module = {"repro.report.tables": tables, "repro.report.figures": figures}[words[1]]
        parsed.append(parse_config(module.Config, words[2:], prog=words[1]))
    return parsed


@pytest.fixture
def one_small_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set becomes a graph of 60 nodes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.rand(60, 12, generator=generator)
    edges = torch.randint(0, 60, (2, 240), generator=generator)
    masks = [torch.arange(60) // 20 == part for part in range(3)]
    data = Data(x=x, y=y, edge_index=edges, train_mask=masks[0], val_mask=masks[1], test_mask=masks[2])
    monkeypatch.setattr(training, "load_graph", lambda name, *args, **kwargs: graphs.as_graph(name, data))


def test_one_cell(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "gnn/run_baselines.sh"
    (call,), _ = hear(script, "cora", "8", "CN", "1.0", "3", "--", "--use_layer_norm", "--epochs", "7")
    config = parse(call.split(), root, monkeypatch)
    assert (config.data, config.nlayer, config.norm_mode, config.scale, config.seed) == ("cora", 8, "CN", 1.0, 3)
    assert config.use_layer_norm and config.epochs == 7
    (call,), _ = hear(script, DATA="texas", NLAYER="16", NORM="LN")
    other = parse(call.split(), root, monkeypatch)
    assert (other.data, other.nlayer, other.norm_mode, other.scale, other.seed) == ("texas", 16, "LN", None, 0)
    assert other.output_dir != config.output_dir


def test_the_sweep_is_table_3(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear("gnn/run_different_baselines.sh", "--dry-run", JOBS="3", RECORDS="")
    assert calls == ["-m repro.sweep --results results/table3/runs --jobs 3 --cluster local --dry-run"]
    assert len(lines) == len({tuple(words) for words in lines}) == 4 * 5 * (2 * len(NORMS) + 4) * 5
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert Counter(c.seed for c in configs) == dict.fromkeys(range(5), len(lines) // 5)
    assert {c.data for c in configs} == {"cora", "citeseer", "chameleon", "squirrel"}
    assert {c.nlayer for c in configs} == {2, 4, 8, 16, 32}
    assert all((c.protocol, c.epochs, c.hid) == ("reference", 200, 32) for c in configs)
    assert all(c.identity is (True if c.norm_mode == "CN" else None) for c in configs)
    per_cell = Counter((c.norm_mode, c.scale, c.use_layer_norm) for c in configs)
    scales = {norm: 1.0 if norm.startswith("PN") else None for norm in NORMS}
    expected = {(norm, scales[norm], layer_norm) for norm in NORMS for layer_norm in (False, True)}
    assert set(per_cell) == expected | {("CN", scale, True) for scale in (0.2, 0.5, 0.8, 1.0)}
    assert set(per_cell.values()) == {4 * 5 * 5}


def test_variables_choose_the_cells(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DATASETS": "digits", "DEPTHS": "3", "NORMS": "PN CN", "SCALES": "0.2", "SEEDS": "7", "RESULTS": "/r"}
    calls, lines = hear(
        "gnn/run_different_baselines.sh",
        **chosen,
        PROTOCOL="standard",
        FLAGS="--probe",
        CLUSTER="slurm",
        RECORDS="a.jsonl,b",
    )
    assert calls == ["-m repro.sweep --results /r --records [a.jsonl,b] --jobs 2 --cluster slurm"]
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert len(configs) == 3 and all(c.probe and c.seed == 7 and c.nlayer == 3 for c in configs)
    assert {c.protocol for c in configs} == {"standard"}


def test_both_forms_and_several_scales(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DATASETS": "cora", "DEPTHS": "2", "NORMS": "PN-SI CN", "SCALES": "0.5 1", "SEEDS": "0"}
    _, lines = hear("gnn/run_different_baselines.sh", **chosen, FORMS="identity eq6", PN_SCALES="1 5")
    methods = [parse(words, root, monkeypatch).label().method for words in lines]
    assert methods == [
        "PN-SI", "PN-SI + LayerNorm", "PN-SI s=5", "PN-SI s=5 + LayerNorm",
        "ContraNorm s=0.5 + LayerNorm", "ContraNorm s=1 + LayerNorm",
        "ContraNorm (Eq. 6) s=0.5 + LayerNorm", "ContraNorm (Eq. 6) s=1 + LayerNorm",
    ]  # fmt: skip
    flags = {" ".join(words[words.index("--norm_mode") :]) for words in lines}  # as in the committed records' commands
    assert "--norm_mode PN-SI --use_layer_norm --seed 0" in flags
    assert "--norm_mode CN --norm_scale 0.5 --use_layer_norm --seed 0" in flags
    assert "--norm_mode CN --norm_scale 0.5 --no_identity --use_layer_norm --seed 0" in flags
    with pytest.raises(subprocess.CalledProcessError) as refused:
        hear("gnn/run_different_baselines.sh", FORMS="eq7")
    assert refused.value.returncode == 2


def test_a_forgotten_dash_is_told(root: Path) -> None:
    """Words after the fifth would be lost, and another experiment trained."""
    command = ["bash", str(root / "gnn/run_baselines.sh"), "cora", "8", "CN", "1.0", "0", "--use_layer_norm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--use_layer_norm: other flags" in done.stderr


def test_the_complete_plan(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both conventions with scales of their own, and as many scales for PN-SI at depth 16 and 32."""
    calls, lines = hear("scripts/reproduce_table3.sh", "--dry-run", SEEDS="0", RECORDS="")
    assert len(calls) == 1
    assert len(lines) == len({tuple(words) for words in lines}) == 4 * (5 * (2 * len(NORMS) + 9 + 4) + 2 * 2 * 8)
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert len({(*c.label().order, c.data, c.nlayer) for c in configs}) == len(lines)

    def scales(norm: str, depth: int, identity: bool | None = None) -> set[float | None]:
        return {c.scale for c in configs if (c.norm_mode, c.nlayer, c.identity) == (norm, depth, identity)}

    released = {0.2, 0.5, 0.8, 1.0}
    for depth in (2, 4, 8, 16, 32):
        assert scales("CN", depth, True) == released | {2, 5, 10, 20, 50}
        assert scales("CN", depth, False) == released
        assert scales("PN-SI", depth) == (released | {2, 5, 10, 20, 50} if depth >= 16 else {1.0})
        assert scales("PN", depth) == {1.0}


def test_exact_and_linear_side_by_side(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs nearly as large as the one on which the literature reports ContraNorm as out of memory."""
    chosen = {"DATASETS": "dblp coauthor_cs", "NORMS": "None CN", "SCALES": "1.0", "SEEDS": "0"}
    script = "gnn/run_different_baselines.sh"
    _, lines = hear(script, **chosen, IMPLEMENTATION="auto linear", DEGREE="1", RECORDS="")
    assert len(lines) == len({tuple(words) for words in lines}) == 2 * 5 * (2 + 2)
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert Counter((c.norm_mode, c.implementation, c.degree) for c in configs) == {
        ("None", "auto", 2): 20, ("CN", "auto", 2): 10, ("CN", "linear", 1): 10,
    }  # fmt: skip


def test_committed_cells_of_table_3_are_not_run_again(hear: Hear, root: Path, tmp_path: Path) -> None:
    """Every record of Cora stands for a line of the default plan."""
    _, lines = hear("gnn/run_different_baselines.sh", DATASETS="cora", RECORDS="")
    cells, _ = sweep.read_cells([shlex.join(words) for words in lines], tmp_path)
    place = root / "results/table3_cora/records.jsonl"
    known = sweep.recorded(cells, [str(place)])
    assert len(known) == len(place.read_text().splitlines())


def test_the_evidence_s_cells_are_lines_of_the_plan(hear: Hear, tmp_path: Path, data_root: Path) -> None:
    """Records of the wider sweep: those of both files, with two scales more than the plan has."""
    places = sorted((data_root.parent / "evidence/table3").glob("*.jsonl"))
    if not places:
        pytest.skip("no evidence beside the data sets")
    chosen = {"SCALES": "0.2 0.5 0.8 1.0 2 4 5 10 20 50 1000", "IMPLEMENTATION": "auto linear blocked", "DEGREE": "1"}
    _, lines = hear("gnn/run_different_baselines.sh", **chosen, DEEP_PN_SI_SCALES="5 10", RECORDS="")
    cells, _ = sweep.read_cells([shlex.join(words) for words in lines], tmp_path)
    for place in places:
        assert len(sweep.recorded(cells, [str(place)])) == len(place.read_text().splitlines())


def test_every_distinct_line_trains(
    hear: Hear, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_small_graph: None
) -> None:
    """Every combination of norm, scale, LayerNorm and depth of the default sweep, each data set once."""
    _, lines = hear("gnn/run_different_baselines.sh", SEEDS="0", FORMS="identity eq6", SCALES="0.2 1.0")
    monkeypatch.chdir(root)
    first = lines[: len(lines) // 4]
    others = {words[words.index("--config") + 1]: words for words in lines}
    chosen = [*first, *others.values()]
    assert len(chosen) == 5 * 14 + 4
    for number, words in enumerate(chosen):
        main([*words[3:], "--epochs=1", "--device=cpu", f"--output_dir={tmp_path / str(number)}"])
        record = json.loads((tmp_path / str(number) / "record.json").read_text())
        assert 0 <= record["metrics"]["test_accuracy"] <= 1


def test_table3_calls_what_exists(hear: Hear, root: Path, tmp_path: Path) -> None:
    script = "scripts/reproduce_table3.sh"
    chosen = {"DATASETS": "cora texas", "DEPTHS": "2", "NORMS": "None", "SEEDS": "0"}
    calls, lines = hear(script, **chosen, RESULTS="/r/runs", RECORDS="")
    assert len(lines) == 4
    parsed = parse_report_calls(calls[1:])
    assert [c.output for c in parsed] == ["/r/table3.md", "/r/table3_chosen.md", "/r/depth.png"]
    assert all(c.records == ["/r/runs"] for c in parsed)
    for flag in ("--dry-run", "--status"):
        assert len(hear(script, flag)[0]) == 1

    runs = tmp_path / "runs"  # the committed records, and this sweep's own where there are any
    for own in ([], [str(runs)]):
        calls, _ = hear(script, **chosen, RESULTS=str(runs), RECORDS="a.jsonl,b.jsonl")
        assert all(c.records == ["a.jsonl", "b.jsonl", *own] for c in parse_report_calls(calls[1:]))
        (runs / "cell").mkdir(parents=True, exist_ok=True)
        (runs / "cell/record.json").touch()


def test_large_graphs_exact_and_linear(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear("scripts/reproduce_large.sh", RESULTS="/r/runs", RECORDS="")
    configs = [parse(words, root, monkeypatch) for words in lines]
    forms = Counter((c.norm_mode, c.implementation, c.epochs) for c in configs)
    assert forms == {
        ("None", "auto", 200): 60, ("CN", "linear", 200): 30, ("CN", "blocked", 3): 10, ("CN", "linear", 3): 10
    }  # fmt: skip
    accuracy, costs = parse_report_calls(calls[2:])
    assert (accuracy.output, accuracy.where, accuracy.show) == ("/r/large.md", {"epochs": 200}, "table")
    assert (costs.output, costs.where, costs.show) == ("/r/large_costs.md", {"epochs": 3}, "costs")
    assert len(hear("scripts/reproduce_large.sh", "--dry-run", RECORDS="")[0]) == 2
    calls, _ = hear("scripts/reproduce_large.sh", "--dry-run")  # the committed records, of both parts
    assert all("[results/large/records.jsonl,results/benchmarks/large.jsonl]" in call for call in calls)


def test_collapse_measures_every_cell(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "scripts/reproduce_collapse.sh"
    calls, lines = hear(script, RESULTS="/r/runs", RECORDS="")
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert len(configs) == 3 * (3 * 2 + 2) and all(c.probe and c.nlayer == 16 for c in configs)
    parsed = parse_report_calls(calls[1:])
    assert [c.output for c in parsed[:3]] == ["/r/collapse", "/r/spectrum", "/r/effective_rank_untrained.md"]
    assert len(parsed) == 6 and all(c.records == ["/r/runs"] for c in parsed)
    assert len(hear(script, "--dry-run", RECORDS="")[0]) == 1


def test_from_lines_to_table_and_figures(
    hear: Hear,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_small_graph: None,
) -> None:
    """The folders and records that a sweep leaves are what repro.report.tables and repro.report.figures read."""
    chosen = {"DATASETS": "digits", "DEPTHS": "2 4", "NORMS": "None PN CN", "SCALES": "0.2 1.0", "SEEDS": "0 1"}
    _, lines = hear("gnn/run_different_baselines.sh", **chosen, FLAGS="--epochs 2 --probe")
    assert len(lines) == 24
    runs = tmp_path / "runs"
    cells, _ = sweep.read_cells([shlex.join(words) for words in lines], runs)
    monkeypatch.chdir(root)
    for cell in cells:
        main(list(cell.argv[3:]))
    assert {sweep.status(cell).state for cell in cells} == {"done"}
    capsys.readouterr()
    tables.main(["--preset", "table3", "--records", str(runs)])
    text = capsys.readouterr().out
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| digits")]
    assert rows == [
        "vanilla", "vanilla + LayerNorm", "PN", "PN + LayerNorm", "ContraNorm s=0.2 + LayerNorm",
        "ContraNorm s=1 + LayerNorm",
    ]  # fmt: skip
    assert "depth 2" in text and "depth 4" in text and text.count("(2)") == 2 * len(rows)
    best = "--rows data,norm_mode,identity,use_layer_norm --best scale --by validation_accuracy".split()
    tables.main(["--preset", "table3", "--records", str(runs), *best])
    assert capsys.readouterr().out.count("| CN ") == 1
    for kind, where in (("depth", "{data: digits}"), ("collapse", '{data: digits, depth: "4"}')):
        picture = tmp_path / f"{kind}.png"
        flags = ["--x", "depth", "--label", "method", "--where", where, "--output", str(picture)]
        figures.main(["--records", str(runs), "--kind", kind, *flags])
        assert picture.stat().st_size > 5000


# -- the rivals --------------------------------------------------------------------------------------------------------

RIVALS = "scripts/reproduce_rivals.sh"


def test_the_rivals_script_calls_what_exists(hear: Hear, tmp_path: Path) -> None:
    chosen = {"DATASETS": "digits", "DEPTHS": "2 4", "METHODS": "vanilla gcnii", "TRIALS": "3", "SEEDS": "0 1"}
    calls, _ = hear(RIVALS, **chosen, RESULTS=str(tmp_path / "r"), RECORDS="a.jsonl", FLAGS="--epochs 1", JOBS="1")
    tuned, swept, chosen_by, ran, table = sorted(
        calls, key=lambda call: ("tables" in call, "runs" in call, "--choose" in call, "sweep" in call)
    )
    shared = (
        "-m repro.tune --space gnn/configs/tuning.yaml --data digits --depths 2 4 --methods vanilla gcnii --trials 3"
    )
    assert tuned == f"{shared} --tuning_seeds 100 --seeds 0 1 --flags=--epochs 1"
    assert swept == f"-m repro.sweep --results {tmp_path}/r/tuning --records [a.jsonl] --jobs 1 --cluster local"
    assert chosen_by == f"{tuned} --choose [a.jsonl] --output {tmp_path}/r/tuning.json"
    assert ran == swept.replace("/tuning", "/runs")
    (parsed,) = parse_report_calls([table])
    assert (parsed.preset, parsed.output, parsed.records) == ("rivals", f"{tmp_path}/r/table.md", ["a.jsonl"])
    calls, _ = hear(RIVALS, "--dry-run", **chosen, RESULTS=str(tmp_path / "r"), RECORDS="")
    assert len(calls) == 2


def test_every_rival_trains(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_small_graph: None,
) -> None:
    """Both trials of every method of the search space, the choice by them, the final run and the table."""
    monkeypatch.chdir(root)
    search = "--space gnn/configs/tuning.yaml --data digits --depths 3 --trials 2 --seeds 0 1".split()
    search.append("--flags=--epochs 1 --device cpu")
    runs = {}
    for name, more in (("tuning", []), ("runs", ["--choose", str(tmp_path / "tuning")])):
        tune.main([*search, *more])
        runs[name], repeated = sweep.read_cells(capsys.readouterr().out.splitlines(), tmp_path / name)
        assert not repeated
        for cell in runs[name]:
            monkeypatch.setattr(sys, "orig_argv", ["python", *cell.argv[1:]])  # what its record calls its command
            main(list(cell.argv[3:]))
        capsys.readouterr()
    methods = load_yaml(root / "gnn/configs/tuning.yaml")["methods"]
    assert len(runs["tuning"]) == len(runs["runs"]) == 2 * len(methods)
    records = [json.loads((cell.folder / "record.json").read_text()) for cell in runs["runs"]]
    assert all(record["config"]["tuning_trials"] == 2 for record in records)
    assert all(record["multiply_adds"] > 0 and record["parameters"] > 0 for record in records)
    tables.main(["--preset", "rivals", "--records", str(tmp_path / "runs")])
    text = capsys.readouterr().out
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| digits")]
    assert rows[: len(methods)] == rows[len(methods) :]  # accuracies, then costs
    assert "settings of all rows chosen among 2 on validation" in text and "P(> vanilla)" in text
    assert rows[: len(methods)] == [
        "vanilla", "vanilla + LayerNorm", "PN-SI", "PN-SI + LayerNorm", "DGN", "DGN + LayerNorm", "residual connection",
        "initial connection", "jumping knowledge", "GCNII", "GCNII (symmetric)", "G2", "Half-Hop",
        "ContraNorm + LayerNorm",
    ]  # fmt: skip


# -- the quickstart ----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(root: Path, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The environment of the quickstart with a virtual environment that is up to date: its `python` is this script."""

    def make(script: str) -> dict[str, str]:
        python = tmp_path / "venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/usr/bin/env bash\n{script}\n")
        python.chmod(0o755)
        wanted = subprocess.run(
            ["bash", "-c", 'echo "$(cat requirements.txt pyproject.toml | cksum) $PWD"'],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
        (tmp_path / "venv/.contranorm-installed").write_text(wanted.stdout)
        return {**os.environ, "VENV": str(tmp_path / "venv")}

    return make


Installed = Callable[[str], dict[str, str]]
QUICKSTART = "scripts/quickstart.sh"


@pytest.mark.parametrize("data", ["digits", "cora"])
def test_the_quickstart_is_six_norms_by_four_depths_by_two_seeds(
    data: str, hear: Hear, installed: Installed, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = installed(f'exec "{tmp_path}/python" "$@"')["VENV"]  # the program that `hear` writes
    calls, lines = hear(QUICKSTART, VENV=venv, **({} if data == "digits" else {"DATA": data}))
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert len(lines) == len({tuple(words) for words in lines}) == 6 * 4 * 2
    assert {c.nlayer for c in configs} == {2, 4, 8, 16} and configs[0].nlayer == 16  # the longest first
    assert all(c.probe == (c.nlayer == 16) and c.epochs == 100 and c.data == data for c in configs)
    assert Counter(c.label().method for c in configs) == dict.fromkeys(
        ["vanilla", "vanilla + LayerNorm", "LN", "PN", "PN + LayerNorm", "ContraNorm s=1 + LayerNorm"], 8
    )
    assert calls[0].startswith(f"-m repro.sweep --results out/quickstart/{data}/runs --jobs ")
    table, depth, collapse = parse_report_calls(calls[1:])
    assert (table.rows, table.columns, table.metric) == ("method", "depth", "test_accuracy")
    assert (depth.kind, depth.output) == ("depth", f"out/quickstart/{data}/depth.png")
    assert (collapse.kind, collapse.where) == ("collapse", {"epochs": 100, "depth": 16})


def test_the_quickstarts_cells_are_those_of_the_committed_records(
    hear: Hear, installed: Installed, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines = hear(QUICKSTART, VENV=installed(f'exec "{tmp_path}/python" "$@"')["VENV"])
    configs = [parse(words, root, monkeypatch) for words in lines]
    text = (root / "results/quickstart/records.jsonl").read_text()
    records = [json.loads(line)["config"] for line in text.splitlines()]

    def cell(c: dict[str, Any]) -> tuple[Any, ...]:
        names = "data model hid nlayer dropout lr wd epochs norm_mode use_layer_norm tau protocol probe device seed"
        return tuple(c[name] for name in names.split())

    assert Counter(map(cell, records)) == Counter(cell(vars(c)) for c in configs)


@pytest.mark.parametrize("depths", [["--depths", "2", "4"], ["--depths=2,4"], ["--depths", "[4, 2]"]], ids=str)
def test_flags_of_the_quickstart(
    depths: list[str], hear: Hear, installed: Installed, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = installed(f'exec "{tmp_path}/python" "$@"')["VENV"]
    flags = [*depths, "--seeds=1", "--epochs", "3", "--jobs", "1", "--output_dir", "/r"]
    calls, lines = hear(QUICKSTART, *flags, VENV=venv)
    configs = [parse(words, root, monkeypatch) for words in lines]
    assert [c.nlayer for c in configs] == [4] * 6 + [2] * 6
    assert all(c.epochs == 3 and c.seed == 0 and c.probe == (c.nlayer == 4) for c in configs)
    assert calls[0] == "-m repro.sweep --results /r/digits/runs --jobs 1"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--depths=1,4", "--depths needs numbers of at least 2"),
        ("--depths=", "--depths needs numbers of at least 2"),
        ("--seeds=0", "--seeds and --jobs must be at least 1"),
        ("--seeds=two", "--seeds and --jobs must be at least 1"),
        ("--data=karate", "--data karate"),
        ("--colour=red", "--colour is no flag of the quickstart"),
        ("--epochs", "--epochs needs a value"),
        ("--depths", "--depths needs numbers of at least 2"),
        ("--data_root=/nowhere/at/all", "--data_root /nowhere/at/all: no such folder"),
    ],
)
def test_the_quickstart_refuses_nonsense(flag: str, message: str, root: Path, installed: Installed) -> None:
    done = subprocess.run(
        ["bash", str(root / QUICKSTART), flag],
        env=installed("echo started"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def processes_with(mark: str) -> list[int]:
    """Living processes that inherited an environment in which the mark stands; forked cells have no other sign."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quickstart_leaves_no_worker(
    signum: signal.Signals, root: Path, python: str, tmp_path: Path, installed: Installed
) -> None:
    folder = tmp_path / "out"
    flags = ["--depths=2", "--epochs=100000", "--jobs=2", f"--output_dir={folder}"]
    mark = f"STARTED_BY_TEST={tmp_path}"
    environment = installed(f'exec "{python}" "$@"') | {"STARTED_BY_TEST": str(tmp_path)}
    argv = ["bash", str(root / QUICKSTART), *flags]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("metrics.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    assert len(processes_with(mark)) >= 4  # the script, the sweep, two cells
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None), errors
    assert processes_with(mark) == [] and not list(folder.rglob("record.json"))


@pytest.mark.slow
def test_the_quickstart_prints_a_table_and_draws_two_figures(
    root: Path, python: str, tmp_path: Path, installed: Installed
) -> None:
    """Really: the second time nothing is repeated and the same table printed."""
    environment = installed(f'exec "{python}" "$@"')
    flags = ["--depths", "2 3", "--seeds", "1", "--epochs", "2", "--output_dir", str(tmp_path / "out")]
    printed, written = [], []
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(root / QUICKSTART), *flags], env=environment, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout)
        written.append({p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("record.json")})
    assert printed[0] == printed[1] and written[0] == written[1] and len(written[0]) == 12
    assert "| vanilla" in printed[0] and "ContraNorm s=1 + LayerNorm" in printed[0]
    for name in ("depth.png", "collapse.png"):
        assert matplotlib.image.imread(tmp_path / "out/digits" / name)[..., :3].std() > 0.01  # something is drawn


def test_every_line_of_the_readme_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_small_graph: None, hear: Hear
) -> None:
    """Each `python -m gnn.main` line of gnn/README.md and gnn/configs trains one step; each script is there."""
    text = (root / "gnn/README.md").read_text()
    pages = [text, *(path.read_text() for path in (root / "gnn/configs").glob("*.yaml"))]
    lines = [line for page in pages for line in re.findall(r"^(?:    |# run:   )python -m gnn\.main (.*)$", page, re.M)]
    assert len(lines) >= 13
    monkeypatch.chdir(root)
    for number, line in enumerate(lines):
        words = shlex.split(line, comments=True)
        main([*words, "--epochs=1", "--device=cpu", "--report_to=none", f"--output_dir={tmp_path / str(number)}"])
        assert (tmp_path / str(number) / "record.json").exists()
    calls = [call for call in re.findall(r"^    ((?:\w+=.*)?bash (?:gnn|scripts)/\w+\.sh.*)$", text, re.M)]
    calls += re.findall(r"^    (for gpu in .*bash gnn/\w+\.sh.*)$", text, re.M)
    assert len(calls) >= 16
    for call in calls:
        script = re.search(r"bash (\S+\.sh)", call)
        assert script is not None and (root / script[1]).is_file(), call


def test_which_python(root: Path, tmp_path: Path) -> None:
    """PYTHON of the caller, else the repository's .venv, else the one on PATH."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/python.sh").write_text((root / "scripts/python.sh").read_text())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")}

    def chosen(**variables: str) -> str:
        shell = "set -euo pipefail; source scripts/python.sh; bash -c 'echo $PYTHON'"
        done = subprocess.run(
            ["bash", "-c", shell], cwd=tmp_path, env=clean | variables, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert chosen() == "python"
    assert chosen(PYTHON=sys.executable) == sys.executable
    interpreter = tmp_path / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    assert chosen() == str(interpreter)
    assert chosen(PYTHON=sys.executable) == sys.executable
    interpreter.unlink()
    (tmp_path / "other/bin").mkdir(parents=True)
    (tmp_path / "other/bin/python").symlink_to(sys.executable)
    assert chosen(VENV=str(tmp_path / "other")) == str(tmp_path / "other/bin/python")
