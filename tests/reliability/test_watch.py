"""The table of a sweep at work."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from repro import reliability_table, watch
from repro.cells import read_cells
from repro.errors import UserError


def test_progress_of_a_sweep(tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tiny.lines(2, 4) + tiny.lines(3, 400)[2:]
    cells = read_cells(lines, tmp_path)[0]
    pid = tiny.start_sweep(tmp_path, lines, jobs=1, pause=0.01)
    while watch.last_metrics(cells[2].folder).get("epoch", 0) < 40:
        time.sleep(0.01)
    watch.main([str(tmp_path), "--once"])
    shown = capsys.readouterr().out.splitlines()
    os.kill(pid, signal.SIGKILL)
    tiny.wait(pid)
    assert shown[0].startswith("3 cells: 2 done, 1 running; time left 0")
    assert shown[2].split()[0] == "running" and cells[2].folder.name in shown[2]
    percent = int(shown[2].split("]")[1].split("%")[0])
    assert 10 <= percent < 100
    assert all(line.split()[:2] == ["done", "[##########]"] for line in shown[3:])


def test_share_of_odd_folders(tmp_path: Path) -> None:
    assert watch.share_done(tmp_path) is None
    (tmp_path / "args.yaml").write_text("epochs: 10\n")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 4}\n{"epo')  # a line that is being written
    assert watch.share_done(tmp_path) == 0.4
    (tmp_path / "args.yaml").write_text("{{")
    assert watch.share_done(tmp_path) is None
    with pytest.raises(UserError, match="no sweep was started"):
        watch.main([str(tmp_path), "--once"])


def test_the_figures_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"two_processes": {"seconds_until_the_run_ended": 3.5, "limit": 60}}))
    reliability_table.main(["--figures", str(path)])
    assert "| one of two training processes killed | ended after 3.5 s" in capsys.readouterr().out
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a file of reliability figures"):
        reliability_table.main(["--figures", str(path)])
