"""Sweeps whose processes die at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from repro.files import write_atomic
from repro.sweep.cell import read_cells

CELLS, STEPS, KILLS = 12, 24, 50


def alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


class Victims:
    """The sweep that runs now, its servers, and the cells of all sweeps, some of which have outlived theirs."""

    def __init__(self, sweep: int) -> None:
        self.sweep = psutil.Process(sweep)
        self.cells: set[psutil.Process] = set()
        self.servers: set[psutil.Process] = set()

    def look(self) -> None:
        """A cell holds a lock; a server has one in hand for a moment only, and then no cell's process is there yet."""
        for child in alive(set(self.sweep.children()) - self.cells - self.servers):
            with contextlib.suppress(psutil.Error):
                held = any(file.path.endswith("sweep.lock") for file in child.open_files())
                (self.cells if held else self.servers).add(child)

    def kill(self, what: str) -> bool:
        """SIGKILL the sweep, a cell, a server, or everything, as a power cut does; False when there was none."""
        self.sweep.suspend()  # so that it starts nothing between the look and the kill
        self.look()
        cells, servers = alive(self.cells), alive(self.servers)
        if what in ("cell", "server"):
            found = cells if what == "cell" else servers
            if found:
                found[-1].kill()
            self.sweep.resume()
            return bool(found)
        for process in [self.sweep, *(cells + servers if what == "all" else [])]:
            process.kill()
        os.waitpid(self.sweep.pid, 0)
        return True


def test_fifty_kills_cost_nothing(tmp_path: Path, tiny: Any, figures: dict[str, Any]) -> None:
    lines = tiny.lines(CELLS, STEPS)
    assert tiny.wait(tiny.start_sweep(tmp_path / "calm", lines)) == 0
    calm = {c.line: c.folder for c in read_cells(lines, tmp_path / "calm")[0]}
    disturbed = {c.line: c.folder for c in read_cells(lines, tmp_path / "disturbed")[0]}

    choose = random.Random(20230501)
    restarts, kinds = 0, {"sweep": 0, "cell": 0, "server": 0, "all": 0}
    leash = tmp_path / "leash"

    def begun() -> int:
        return sum(len(f.read_text().split()) for f in tmp_path.glob("disturbed/*/starts.txt"))

    def start() -> int:
        return int(tiny.start_sweep(tmp_path / "disturbed", lines, leash=leash))

    def loosen(kills: int) -> None:
        """However slow the machine is, the cells go on from kill to kill, and half of them end before the last."""
        write_atomic(leash, str((kills + 1) * CELLS * STEPS / (2 * KILLS)).encode())

    loosen(0)
    before, pid = 0, start()
    victims = Victims(pid)
    while sum(kinds.values()) < KILLS or begun() <= CELLS + 10:
        if choose.random() < 0.8:  # the others come while a sweep, or a server, is starting
            for _ in range(500):  # cells that have outlived their sweeps may hold all that is left
                if begun() > before or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.01)
        time.sleep(choose.uniform(0.01, 0.35))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:  # every cell was done or had been killed once: the next sweep takes up the killed ones
            assert os.waitstatus_to_exitcode(status) == 1, "the sweep was over before the killing was"
        else:
            what = choose.choice(("sweep", "cell", "server", "all"))
            kinds[what] += victims.kill(what)
            loosen(sum(kinds.values()))
            if what in ("cell", "server"):
                continue  # the sweep carries on without it
        restarts += 1
        before, pid = begun(), start()
        victims.sweep = psutil.Process(pid)
    loosen(2 * KILLS)
    os.kill(pid, signal.SIGTERM)
    tiny.wait(pid)
    assert tiny.wait(tiny.start_sweep(tmp_path / "disturbed", lines)) == 0  # the rest, undisturbed

    starts = {line: (folder / "starts.txt").read_text().split() for line, folder in disturbed.items()}
    lost = [line for line, folder in disturbed.items() if not (folder / "record.json").exists()]
    repeated = [line for line, found in starts.items() if "again" in found]
    differing = [line for line in lines if tiny.comparable(disturbed[line]) != tiny.comparable(calm[line])]
    figures["kills"] = {
        "kills": sum(kinds.values()), "of_the_sweep": kinds["sweep"], "of_a_cell": kinds["cell"],
        "of_a_server": kinds["server"], "of_everything": kinds["all"], "sweeps_started": restarts + 2, "cells": CELLS,
        "cell_starts": sum(map(len, starts.values())), "lost": len(lost), "run_again_after_record": len(repeated),
        "differing_records": len(differing),
    }  # fmt: skip
    assert not lost and not repeated and not differing
    assert not psutil.wait_procs(alive(victims.servers), timeout=10)[1], "a server has outlived its sweep"
    assert sum(map(len, starts.values())) > CELLS + 10  # the kills did hit
    leftovers = [p for folder in disturbed.values() for p in folder.rglob(".*tmp*")]
    assert not leftovers


def test_two_sweeps_share_a_folder(tmp_path: Path, tiny: Any, figures: dict[str, Any]) -> None:
    lines = tiny.lines(CELLS, 5)
    pids = [tiny.start_sweep(tmp_path, lines, pause=0.02) for _ in range(2)]
    assert [tiny.wait(pid) for pid in pids] == [0, 0]
    starts = [(c.folder / "starts.txt").read_text().split() for c in read_cells(lines, tmp_path)[0]]
    figures["two_sweeps"] = {"cells": CELLS, "cell_starts": sum(map(len, starts))}
    assert starts == [["start"]] * CELLS


def test_a_killed_cell_is_called_out_of_memory(tmp_path: Path, tiny: Any) -> None:
    """The kernel's out-of-memory killer sends SIGKILL: the sweep says so, and the next one resumes."""
    lines = tiny.lines(1, 20)
    (cell,) = read_cells(lines, tmp_path)[0]
    pid = tiny.start_sweep(tmp_path, lines, pause=0.05)
    while not list(cell.folder.glob("checkpoints/step-*")):
        time.sleep(0.01)
    Victims(pid).kill("cell")
    assert tiny.wait(pid) == 1
    assert "killed by SIGKILL (out of memory?)" in (tmp_path / "sweep.log").read_text()
    assert tiny.wait(tiny.start_sweep(tmp_path, lines)) == 0
    assert "resuming from step" in (cell.folder / "log.txt").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_stops_its_cells(tmp_path: Path, tiny: Any, signum: int) -> None:
    lines = tiny.lines(3, 40)
    cells = read_cells(lines, tmp_path)[0]
    pid = tiny.start_sweep(tmp_path, lines, pause=0.03)
    while not list(cells[1].folder.glob("checkpoints/step-*")):
        time.sleep(0.01)
    os.kill(pid, signum)
    assert tiny.wait(pid) == 128 + signum
    assert not any((cell.folder / "record.json").exists() for cell in cells)
    assert "stopped at step" in (cells[0].folder / "log.txt").read_text()
    assert tiny.wait(tiny.start_sweep(tmp_path, lines)) == 0
    assert "resuming from step" in (cells[0].folder / "log.txt").read_text()
