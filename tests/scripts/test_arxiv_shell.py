"""The shell scripts of ogbn-arxiv: every line that they make is accepted by the command that it calls."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from gnn.arxiv.config import Config
from repro.config import parse_config
from tests.scripts.conftest import Hear

SWEEP = "scripts/reproduce_arxiv.sh"


def parse(words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(root)
    assert words[:2] == ["-m", "gnn.arxiv"]
    return parse_config(Config, words[2:], prog="gnn.arxiv")


def test_one_teacher_and_one_student(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (call,), _ = hear("gnn/arxiv/run_teacher.sh")
    published = parse(call.split(), root, monkeypatch)
    assert published == Config(output_dir=published.output_dir)
    (call,), _ = hear(
        "gnn/arxiv/run_student.sh", "--norm", "ContraNorm", "--scale", "1", DATA="dblp", SEED="3", TEACHER="t"
    )
    student = parse(call.split(), root, monkeypatch)
    assert (student.mode, student.teacher, student.data, student.seed, student.scale) == ("student", "t", "dblp", 3, 1)
    assert student.output_dir != published.output_dir


def test_the_sweep(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear(SWEEP, "--dry-run")
    assert [call.split()[1] for call in calls] == ["repro.sweep", "repro.sweep"]  # teachers, then students
    assert all(words[0] == "python" for words in lines)
    configs = [parse(words[1:], root, monkeypatch) for words in lines]
    assert len(configs) == 2 * 2 * 10
    assert [c.mode for c in configs] == ["teacher"] * 20 + ["student"] * 20
    assert {(c.norm, c.scale, c.tau, c.scaled_tau) for c in configs} == {
        ("none", None, 1.0, False), ("ContraNorm", 1.0, 1.0, False)
    }  # fmt: skip
    assert all((c.data, c.n_epochs, c.n_layers, c.n_hidden) == ("ogbn-arxiv", 1000, 2, 256) for c in configs)
    teachers = {c.output_dir: c for c in configs if c.mode == "teacher"}
    for student in configs[20:]:
        teacher = teachers[student.teacher or ""]
        assert (teacher.seed, teacher.norm) == (student.seed, student.norm)


def test_a_stand_in_ends_with_tables_and_the_figure(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear(
        SWEEP, DATA="dblp", SEEDS="0 1", EPOCHS="7", LAYERS="5", FLAGS="--n_hidden 64", RESULTS="/r/runs", JOBS="3"
    )
    modules = [call.split()[1] for call in calls]
    assert modules == ["repro.sweep"] * 2 + ["repro.report.tables"] * 2 + ["gnn.arxiv.activity"]
    assert "--records /r/runs" in calls[-1] and "--output /r/activity.png" in calls[-1] and "--jobs 3" in calls[0]
    configs = [parse(words[1:], root, monkeypatch) for words in lines]
    assert len(configs) == 2 * 3 * 2 and any(c.scaled_tau for c in configs)
    assert all((c.data, c.n_epochs, c.n_layers, c.n_hidden) == ("dblp", 7, 5, 64) for c in configs)


def test_gpu_hours_are_called_estimates(root: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "RESULTS": str(tmp_path / "runs"), "TFLOPS": "10"}
    done = subprocess.run(["bash", str(root / SWEEP), "--dry-run"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    hours = [line for line in done.stdout.splitlines() if "GPU hours" in line]
    assert len(hours) == 2 and all(line.startswith("estimate, not measured") for line in hours)
    assert "20 runs of 0.07 GPU hours" in hours[0]  # 1000 epochs x 6 x 0.444 TFLOP at 10 TFLOP/s
    assert not (tmp_path / "runs").exists()


def test_an_unknown_arm(root: Path) -> None:
    environment = {**os.environ, "ARMS": "none other"}
    done = subprocess.run(["bash", str(root / SWEEP), "--dry-run"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "not other" in done.stderr
