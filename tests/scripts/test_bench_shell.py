"""The scripts that check, draw and tabulate: what they call, and that what they call accepts it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from repro.report import figures, tables
from repro.report.check import command_of


@pytest.fixture
def shell(tmp_path: Path, root: Path):
    """Runs a script with an interpreter that writes down its arguments; returns (process, the calls' words)."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'call="$(printf "%q " "$@")"; echo "$call" >> {tmp_path}/calls\n'  # one write, as calls run side by side
        '[ "$2" = repro.sweep ] && cat > /dev/null\n'
        'if [ "$2" = repro.report.best ] && [ -n "$BEST" ]; then printf "$BEST\\n"; exit; fi\n'
        'echo "ran $2"; [ "$2" != "$FAILING" ] || exit "${CODE:-5}"\n'
    )
    python.chmod(0o755)
    stamp = subprocess.run(
        ["bash", "-c", 'echo "$(cat requirements.txt pyproject.toml | cksum) $PWD"'],
        cwd=root, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    (tmp_path / "venv" / ".contranorm-installed").write_text(stamp)

    def run(script: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        (tmp_path / "calls").write_text("")
        places = {"VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
        environment = {**os.environ, **places, "FAILING": "", "BEST": "", **variables}
        done = subprocess.run(
            ["bash", str(root / script), *arguments], cwd="/", env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("flags", "marks"),
    [
        ([], "not slow and not slurm"),
        (["--slow"], "not slurm"),
        (["--slurm"], "not slow"),
        (["--slow", "--slurm"], ""),
    ],
)
def test_the_tests_command(shell, flags, marks):
    done, calls = shell("scripts/test.sh", *flags, "tests/repro", "-k", "a and b")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == ["ruff", "ruff", "mypy", "pytest"]
    assert calls[-1][calls[-1].index("--dist") :] == [
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "-m",
        marks,
        "tests/repro",
        "-k",
        "a and b",
    ]
    assert done.stdout.splitlines()[-1] == "ran pytest"


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest"])
def test_any_failed_check_fails_the_tests_command_and_the_tests_are_run_all_the_same(shell, failing):
    done, calls = shell("scripts/test.sh", FAILING=failing)
    assert done.returncode == 5 and done.stdout.splitlines()[-1] == "ran pytest"
    assert failing == "pytest" or f"failed (exit code 5): {failing}" in done.stdout


def test_table_3_runs_the_sweep_then_tables_and_figures_that_accept_their_arguments(
    shell, tmp_path, monkeypatch, capsys
):
    results = tmp_path / "table3" / "runs"
    write_graph_runs(results)
    done, calls = shell("scripts/reproduce_table3.sh", "--jobs", "1", RESULTS=str(results), RECORDS="")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == [
        "repro.sweep",
        "repro.report.tables",
        "repro.report.tables",
        "repro.report.figures",
    ]
    assert calls[0][-2:] == ["--jobs", "1"]
    for call in calls[1:3]:
        tables.main(call[2:])
    figures.main(calls[3][2:])
    assert sorted(p.name for p in results.parent.iterdir()) == [
        "depth-cora.png", "depth-texas.png", "runs", "table3.md", "table3_chosen.md"
    ]  # fmt: skip
    assert (
        "scale chosen per cell by the highest mean validation_accuracy"
        in (results.parent / "table3_chosen.md").read_text()
    )
    for flag in ("--dry-run", "--status"):
        _, calls = shell("scripts/reproduce_table3.sh", flag, RESULTS=str(results), RECORDS="")
        assert [call[1] for call in calls] == ["repro.sweep"]
    done, calls = shell("scripts/reproduce_table3.sh", RESULTS=str(results), RECORDS="", FAILING="repro.sweep")
    assert done.returncode == 5 and [call[1] for call in calls] == ["repro.sweep"]


@pytest.mark.parametrize("script", ["table1", "table2", "table3", "large", "collapse", "rivals", "ssl", "arxiv"])
def test_ctrl_c_ends_a_script_and_failed_cells_do_not(script, shell, tmp_path):
    """A sweep that is stopped leaves with 130, one with failed cells with 1."""
    chosen = {"RESULTS": str(tmp_path / "runs"), "RECORDS": "", "FAILING": "repro.sweep"}
    done, calls = shell(f"scripts/reproduce_{script}.sh", CODE="130", **chosen)
    called = [call[1] for call in calls]
    assert done.returncode == 130 and called.count("repro.sweep") == 1
    if script == "rivals":  # the trials are piped into the sweep: either may be written down first
        called.sort(reverse=True)
    assert called[-1] == "repro.sweep"
    if script != "rivals":  # whose trials choose what is run
        done, calls = shell(f"scripts/reproduce_{script}.sh", CODE="1", **chosen)
        assert done.returncode == 1 and (script == "ssl" or calls[-1][1] != "repro.sweep")  # which found no records


def test_a_failed_cell_among_the_last_seeds_of_table_1_is_told(shell, tmp_path):
    """Whichever task it is of."""
    runs = tmp_path / "table1" / "runs"
    write(runs / "a", "BERT_glue", {"seed": 0}, {"score": 0.5})
    chosen = {"PRESET": "cpu", "RESULTS": str(runs), "RECORDS": "", "FAILING": "repro.sweep", "CODE": "1"}
    done, calls = shell("scripts/reproduce_table1.sh", BEST="cola 0.1\nrte 0.2", **chosen)
    assert done.returncode == 1 and calls[-1][1] == "repro.report.tables"
    assert sum(call[1] == "repro.sweep" for call in calls) == 1 + 7 + 1 + 2


def test_figures_are_drawn_from_whatever_records_there_are(shell, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    done, calls = shell("scripts/reproduce_figures.sh", RESULTS=str(results), RECORDS="")
    assert done.returncode == 2 and "no records" in done.stderr and calls == []
    write_graph_runs(results / "table3" / "runs", probe=True)
    write(results / "table2" / "runs" / "a", "ViT_imagenet", {"data_set": "IMNET100", "model": "tiny", "depth": 12,
          "norm": "layer", "scale": None, "seed": 0}, {"test_accuracy": 0.5})  # fmt: skip
    write(results / "glue" / "runs" / "a", "BERT_glue", {"seed": 0}, {"score": 0.5})
    done, calls = shell("scripts/reproduce_figures.sh", RESULTS=str(results), RECORDS="")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == ["repro.report.figures"] * 4
    assert [call[call.index("--kind") + 1] for call in calls if "--kind" in call] == ["scale", "collapse"]
    for call in calls:
        figures.main(call[2:])
    assert sorted(str(p.relative_to(results)) for p in results.rglob("*.png")) == [
        "table2/depth-IMNET100-tiny.png", "table3/collapse-cora-2.png", "table3/collapse-texas-2.png",
        "table3/depth-cora.png", "table3/depth-texas.png", "table3/scale-cora.png", "table3/scale-texas.png",
    ]  # fmt: skip


def test_figures_are_drawn_from_the_committed_results(shell, tmp_path, root):
    """Most by commands that committed figures hold, which repro.report.check runs; the others are drawn here."""
    done, calls = shell("scripts/reproduce_figures.sh", RESULTS="results", RECORDS="")
    assert done.returncode == 0, done.stderr
    called = {shlex.join(call[2:]): call[2:] for call in calls if call[1] == "repro.report.figures"}
    committed = {command_of(path) for path in (root / "results").rglob("*.svg")}
    committed = {shlex.join(word.strip("[]") for word in shlex.split(command)[3:]) for command in committed}
    assert len(committed & set(called)) >= 20
    for room in ("table2", "table3", "ssl", "rivals", "collapse"):
        assert {command for command in committed if f" results/{room}/" in command} <= set(called), room
    shutil.copytree(root / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.svg"))
    with contextlib.chdir(tmp_path):
        for words in (words for command, words in called.items() if command not in committed):
            figures.main(words)
    drawn = {str(path.relative_to(tmp_path / "results")) for path in (tmp_path / "results").rglob("*.[ps][nv]g")}
    assert {"quickstart/depth-digits.png", "quickstart/collapse-digits-16.png"} <= drawn
    assert "cifar10_cpu/curves-CIFAR10-deit_micro_patch8_32.svg" in drawn
    assert not any("results/flags" in command for command in called)  # one cell in several ways is no curve


def write_graph_runs(folder: Path, probe: bool = False) -> None:
    layers = {"mean_cosine": [0.5], "effective_rank": [2.0], "variance": [1.0]}
    for data in ("cora", "texas"):
        for mode, scale in (("None", None), ("CN", 0.2), ("CN", 1.0)):
            config = {"data": data, "nlayer": 2, "norm_mode": mode, "norm_scale": scale, "use_layer_norm": mode == "CN",
                      "seed": 0, "probe": probe}  # fmt: skip
            metrics = {"test_accuracy": 0.5, "validation_accuracy": 0.5}
            write(folder / f"{data}-{mode}-{scale}", "gnn", config, metrics, **({"probe": layers} if probe else {}))


def write(folder: Path, experiment: str, config: dict, metrics: dict, **extra: object) -> None:
    folder.mkdir(parents=True)
    record = {"experiment": experiment, "protocol": "reference", "selection": "last epoch", "metrics": metrics,
              "seed": 0, "config": config, **extra}  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record, indent=1))
