"""What a process that was killed while it described a cell leaves behind."""

from __future__ import annotations

import fcntl
from pathlib import Path

from repro.sweep.runner import remove_leftovers


def test_leftovers_go_unless_the_cell_is_being_run(tmp_path: Path) -> None:
    leftover = tmp_path / ".cell.json.123.tmp"
    leftover.write_text("{")
    with open(tmp_path / "sweep.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert leftover.exists()
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    remove_leftovers(tmp_path / "not there")
