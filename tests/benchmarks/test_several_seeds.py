"""The measurement of several seeds in one process against a process each."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import end_to_end
from gnn.config import CommandLine
from repro.config import parse_config


def test_both_ways_train_the_same_runs(monkeypatch, tmp_path):
    measured = []

    def run(commands):
        measured.append([parse_config(CommandLine, words, prog="gnn.main").runs() for words in commands])
        return 6.0 if len(commands) > 1 else 2.0, 1.0

    monkeypatch.setattr(end_to_end, "run_processes", run)
    rows, _ = end_to_end.seeds_together(end_to_end.Config(epochs=7), tmp_path)
    assert [row["times faster"] for row in rows] == [1, 3, 1, 3]
    for separate, together in (measured[:2], measured[2:]):
        assert [len(runs) for runs in separate] == [1, 1, 1] and len(together) == 1
        for (one,), other in zip(separate, together[0], strict=True):
            assert vars(one) | {"output_dir": ""} == vars(other) | {"output_dir": ""} and one.epochs == 7


def test_processes_are_timed_and_must_succeed(tmp_path):
    wall, cpu = end_to_end.run_processes([["--help"], ["--help"]])
    assert 0 < cpu < 60 and wall > cpu / 4
    with pytest.raises(subprocess.CalledProcessError):
        end_to_end.run_processes([["--epochs", "0", "--output_dir", str(tmp_path / "x")]])
