"""The live table: what it says of cells in every state."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from repro.errors import UserError
from repro.sweep.cell import read_cells
from repro.sweep.launch import look
from repro.sweep.watch import main, progress, render


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A sweep with a done, a running, a failed and two waiting cells."""
    lines = [f"python run.py --x {x}" for x in range(5)]
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    cells, _ = read_cells(lines, tmp_path)
    for cell in cells[:3]:
        cell.folder.mkdir()
    began = (datetime.now(UTC) - timedelta(seconds=30)).isoformat(timespec="seconds")
    (cells[0].folder / "record.json").write_text('{"metrics": {}}')
    (cells[0].folder / "cell.json").write_text(json.dumps({"state": "done", "seconds": 60}))
    (cells[1].folder / "cell.json").write_text(json.dumps({"state": "running", "started": began}))
    (cells[1].folder / "args.yaml").write_text("epochs: 200\n")
    (cells[1].folder / "metrics.jsonl").write_text('{"epoch": 49}\n{"epoch": 50}\n{"epo')
    (cells[2].folder / "cell.json").write_text(json.dumps({"state": "failed", "exit": 2, "seconds": 3}))
    (cells[2].folder / "log.txt").write_text("start\nerror: no such graph\n")
    return tmp_path


def test_table(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = (p.parent for p in results.rglob("args.yaml"))
    with open(folder / "sweep.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main([str(results)])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("5 cells: 1 running, 1 failed, 0 cancelled, 0 interrupted, 2 waiting, 1 done; about 02:")
    assert rows[1].endswith("] 20%")
    assert rows[2].split()[:2] == ["running", "25%"]
    assert rows[3].split()[0] == "failed" and rows[3].endswith("exit code 2: error: no such graph")
    assert len(rows) == 7


def test_a_dead_cell_is_not_called_running(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(results), "--once"])
    out = capsys.readouterr().out
    assert "0 running, 2 failed" in out and "exited without a status" in out


def test_long_sweeps_are_cut_to_the_terminal(results: Path) -> None:
    cells, _ = read_cells((results / "sweep.txt").read_text().splitlines(), results)
    text = render(look(cells, results), 40, 6)
    assert text.count("\n") == 5 and "... and 3 more" in text
    assert all(len(row) <= 40 for row in text.splitlines()[2:])


def test_progress_is_unknown_without_a_length(tmp_path: Path) -> None:
    assert progress(tmp_path) is None
    (tmp_path / "args.yaml").write_text("steps: 3\n")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert progress(tmp_path) is None


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_folder_without_a_sweep_is_one_line(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "r")
    with pytest.raises(UserError, match="r: no such folder|r holds no sweep.txt"):
        main([str(tmp_path / "r")])
