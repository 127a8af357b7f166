"""The measurement of a sweep's cells against a fresh interpreter for each."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest

from benchmarks import end_to_end
from gnn.config import Config
from repro.config import parse_config


@pytest.mark.parametrize("differing", [False, True])
def test_both_ways_train_the_same_runs(monkeypatch, tmp_path, differing):
    def run(commands, lines=""):
        swept = bool(lines)
        if swept:
            (sweep,) = commands
            assert sweep[:3] == ["-m", "repro.sweep", "--results"]
            commands = [
                [*shlex.split(line)[1:], "--output_dir", f"{sweep[3]}/{n}"] for n, line in enumerate(lines.splitlines())
            ]
        for words in commands:
            assert words[:2] == ["-m", "gnn.main"]
            config = parse_config(Config, words[2:], prog="gnn.main")
            configs.append(vars(config) | {"output_dir": ""})
            folder = tmp_path / config.output_dir
            folder.mkdir(parents=True)
            record = {"seed": config.seed, "metrics": {"accuracy": 0.5 + swept * differing}}
            (folder / "record.json").write_text(json.dumps(record))
        return 2.0 if swept else 6.0

    configs: list[dict] = []
    monkeypatch.setattr(end_to_end, "run_processes", run)
    if differing:
        with pytest.raises(RuntimeError, match="other metrics"):
            end_to_end.startup(end_to_end.Config(epochs=7), tmp_path)
        return
    rows, goals = end_to_end.startup(end_to_end.Config(epochs=7), tmp_path)
    assert [row["times faster"] for row in rows] == [1, 3, 1, 3] and goals[0]["met"]
    assert configs[:5] == configs[5:10] != configs[10:15] == configs[15:]
    assert [c["seed"] for c in configs[:5]] == [0, 1, 2, 3, 4] and {c["epochs"] for c in configs} == {7}


def test_processes_are_timed_and_must_succeed():
    assert end_to_end.run_processes([["-c", "import time; time.sleep(0.2)"]] * 2) > 0.4
    assert end_to_end.run_processes([["-c", "assert input() == 'line'"]], lines="line\n") > 0
    with pytest.raises(subprocess.CalledProcessError):
        end_to_end.run_processes([["-c", "raise SystemExit(2)"]])
