"""A sweep runs every cell once, whatever happens to it, to its cells and to its sisters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro.errors import UserError
from repro.sweep import cell as cells
from repro.sweep import sweep
from repro.sweep.cell import canonical, make_cell, read_cells, slug
from repro.sweep.launch import Attempt, SlurmLauncher, read_ledger
from repro.sweep.status import Status, status


def start(lines, results, *flags, cluster="local"):
    """A sweep in a process (and group) of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "repro.sweep", "--results", str(results), "--cluster", cluster, *flags],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.close()
    process.stdin = None
    return process


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


# -- lines and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m gnn.main --config gnn/configs/cora.yaml --nlayer 8 --norm_mode CN --norm_scale 0.2 --probe",
         "gnn.main-cora-nlayer8-CN-norm_scale0.2-probe"),
        ("torchrun --standalone --nproc-per-node=2 -m ViT_imagenet.main --depth 12",
         "nproc-per-node2-ViT_imagenet.main-depth12"),
        ("python x/run.py --lr=1e-3 --data /some/where", "run-lr1e-3"),
    ],
)  # fmt: skip
def test_folders_are_named_for_reading_and_stay_the_same(tmp_path, line, expected):
    assert slug(cells.normalise(line)) == expected
    first, second = make_cell(line, tmp_path), make_cell(line, tmp_path)
    assert first.folder == second.folder and re.fullmatch(re.escape(expected) + "-[0-9a-f]{8}", first.folder.name)


def test_the_folder_of_a_line_does_not_change_between_versions(tmp_path):
    """A changed hash would run every finished cell again."""
    line = "python -m gnn.main --nlayer 8 --seed 1"
    assert make_cell(line, tmp_path).folder.name == "gnn.main-nlayer8-seed1-32ee52a5"
    for same in (f"  {line}  # a comment", line.replace("python", "/usr/bin/python3.11"), line.replace(" ", "   ")):
        assert make_cell(same, tmp_path).folder == make_cell(line, tmp_path).folder


@given(st.lists(st.text(min_size=1), min_size=1))
def test_any_words_make_a_safe_folder_name(words):
    name = slug(words)
    assert re.fullmatch(r"[A-Za-z0-9._=+-]{1,120}", name) and name not in (".", "..")


def test_lines_that_cannot_be_used_are_named(tmp_path):
    for line, told in [
        ("python 'x", "line 2: No closing quotation"),
        ("A=1 python x", "line 2: 'A=1' sets a variable"),
        ("no-such-program x", "line 2: 'no-such-program' is no program"),
        ("python x --output_dir", "line 2: --output_dir without a folder"),
        ("python x --output_dir=", "line 2: --output_dir without a folder"),
    ]:
        with pytest.raises(UserError, match=re.escape(told)):
            read_cells(["python ok", line], tmp_path)
    with pytest.raises(UserError, match="is also that of"):
        read_cells(["python a --output_dir x", "python b --output_dir ./x"], tmp_path)


def test_repeated_and_empty_lines_are_left_out(tmp_path):
    found, repeated = read_cells(["python a", "", "# python b", "  ", "python  a # again", "python3 a"], tmp_path)
    assert [c.line for c in found] == ["python a"] and repeated == 2


def test_a_line_that_names_its_folder_keeps_it(tmp_path):
    cell = make_cell("python a --output_dir=x/y --output-dir z", tmp_path)
    assert cell.folder == Path("z") and cell.argv[1:] == ("a", "--output_dir=x/y", "--output-dir", "z")


def test_lines_that_are_no_text(run_sweep):
    with pytest.raises(UserError, match="standard input are no UTF-8"):
        run_sweep(["python a\udcff"])


def test_the_plan_is_read_whatever_became_of_it(tmp_path):
    """A torn line, a program of another machine, and a later line for the same folder."""
    with pytest.raises(UserError, match="no sweep was started over it"):
        sweep.known_cells(tmp_path)
    plan = tmp_path / sweep.PLAN
    plan.write_text("")
    with pytest.raises(UserError, match="no sweep was started over it"):
        sweep.known_cells(tmp_path)
    first, other = (make_cell(f"python a --x {x} --output_dir c", tmp_path) for x in (1, 2))
    plan.write_text(f"{first.line}\nno-such-program b\npython 'c")
    sweep._remember(tmp_path, [first, other])
    assert [cell.line for cell in sweep.known_cells(tmp_path)] == [other.line, "no-such-program b"]


# -- running ---------------------------------------------------------------------------------------------------------


def test_done_cells_are_skipped(experiment, run_sweep, capsys):
    lines = [experiment.line(name) for name in "ab"]
    assert run_sweep(lines) == 0
    assert run_sweep([*lines, experiment.line("c"), lines[0]]) == 0
    assert sorted(experiment.noted("starts")) == ["a", "b", "c"]
    told = capsys.readouterr().err
    assert "3 cells, 2 done, 1 to run" in told and "1 repeated lines left out" in told
    assert run_sweep(lines) == 0
    assert "2 cells, 2 done, 0 to run" in capsys.readouterr().err


def test_lines_never_go_through_a_shell(experiment, run_sweep, tmp_path):
    wild = f"; touch {tmp_path}/made && $(touch {tmp_path}/made) `touch {tmp_path}/made` > {tmp_path}/made | *"
    quoted = "'" + wild + "'"
    assert (
        run_sweep([experiment.line("a", **{"x": quoted}), experiment.line("b", y=f"1 ; touch {tmp_path}/made x")]) == 0
    )
    assert not (tmp_path / "made").exists()
    given = [json.loads(p.read_text())["argv"] for p in sorted(tmp_path.glob("results/*/record.json"))]
    assert any(wild in argv for argv in given) and any({";", "touch"} < set(argv) for argv in given)


def test_failing_cells_stop_nothing_and_are_listed_with_their_last_words(experiment, run_sweep, capsys, tmp_path):
    lines = [
        experiment.line("a", do="fail"), experiment.line("b"), experiment.line("c", do="kill"),
        experiment.line("d", do="nothing"), experiment.line("e"),
    ]  # fmt: skip
    assert run_sweep(lines, "--jobs", "2") == 1
    told = capsys.readouterr().err
    assert sorted(experiment.noted("finished")) == ["b", "e"]
    assert "exit code 3" in told and "last line: boom: the last line of a" in told
    assert "killed by SIGKILL (out of memory?)" in told and "exit code 0, but no record.json" in told
    assert run_sweep(lines, "--status") == 0
    told = capsys.readouterr().out
    assert "2 done, 0 running, 0 waiting, 0 interrupted, 0 cancelled, 3 failed" in told
    assert "boom: the last line of a" in told
    assert run_sweep([], "--status") == 0  # the lines are remembered
    assert capsys.readouterr().out == told
    Path(experiment.script).write_text(Path(experiment.script).read_text().replace('do == "fail"', "False"))
    assert run_sweep(lines[:2]) == 0  # the same sweep again tries only the failed ones
    assert Counter(experiment.noted("starts"))["a"] == 2 and Counter(experiment.noted("starts"))["b"] == 1


def test_the_plan_is_printed_and_nothing_is_run_or_written(experiment, run_sweep, capsys, tmp_path):
    assert run_sweep([experiment.line("a"), experiment.line("b")], "--dry_run") == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all(line.startswith("waiting ") for line in told) and "--name a" in told[0]
    assert not (tmp_path / "results").exists() and experiment.noted("starts") == []


def test_bad_input_runs_nothing(experiment, run_sweep, tmp_path):
    for lines, flags, told in [
        ([], [], "no cells"),
        (["python 'x"], [], "line 1"),
        ([experiment.line("a")], ["--jobs", "0"], "jobs"),
        ([experiment.line("a")], ["--cluster", "cloud"], "cluster"),
    ]:
        with pytest.raises(UserError, match=told):
            run_sweep(lines, *flags)
    (tmp_path / "results").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        run_sweep([experiment.line("a")])
    assert experiment.noted("starts") == []


def test_a_damaged_record_is_a_failure_that_is_told_not_a_finished_cell(experiment, run_sweep, capsys, tmp_path):
    line = experiment.line("a")
    folder = make_cell(line, tmp_path / "results").folder
    folder.mkdir(parents=True)
    for damage in ('{"metrics": ', "[]", "{}"):
        (folder / "record.json").write_text(damage)
        assert run_sweep([line]) == 1
        told = capsys.readouterr().err
        assert "delete it to run the cell again" in told
    assert experiment.noted("starts") == []


def test_cells_share_the_cores(experiment, run_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert run_sweep([experiment.line("a")], "--jobs", "4") == 0
    (record,) = tmp_path.glob("results/*/record.json")
    assert json.loads(record.read_text())["config"]["threads"] == "2"


# -- killed, stopped, and beside each other ----------------------------------------------------------------------------


def test_killed_in_the_middle_and_started_again_no_finished_cell_is_repeated_and_none_lost(experiment, tmp_path):
    names = [f"c{i}" for i in range(8)]
    lines = [experiment.line(name, sleep=0.3) for name in names]
    first = start(lines, tmp_path / "results", "--jobs", "2")
    wait_until(lambda: len(experiment.noted("finished")) >= 3)
    first.kill()
    first.communicate()
    second = start(lines, tmp_path / "results", "--jobs", "2")
    _, told = second.communicate(timeout=150)
    assert second.returncode == 0, told
    # The killed sweep's children live on, and hold their cells: even those are not run twice.
    assert Counter(experiment.noted("starts")) == Counter(names) == Counter(experiment.noted("finished"))
    assert len(list((tmp_path / "results").glob("*/record.json"))) == 8


def test_a_killed_cell_is_told_and_run_again(experiment, run_sweep, tmp_path, capsys):
    """Sweep and cell are killed at once, as when the machine loses power."""
    line = experiment.line("a", sleep=30)
    killed = start([line], tmp_path / "results")
    wait_until(lambda: experiment.noted("pids"))
    killed.kill()
    os.kill(int(experiment.noted("pids")[0]), signal.SIGKILL)
    killed.communicate()
    wait_until(lambda: status(make_cell(line, tmp_path / "results")).state == "failed")
    assert "exited without a status" in status(make_cell(line, tmp_path / "results")).message
    Path(experiment.script).write_text(Path(experiment.script).read_text().replace("time.sleep", "float"))
    assert run_sweep([line]) == 0
    assert experiment.noted("starts") == ["a", "a"] and experiment.noted("finished") == ["a"]


def test_two_sweeps_over_one_folder_run_no_cell_twice(experiment, tmp_path):
    names = [f"c{i}" for i in range(8)]
    lines = [experiment.line(name, sleep=0.1) for name in names]
    sweeps = [start(order, tmp_path / "results", "--jobs", "2") for order in (lines, lines[::-1])]
    for process in sweeps:
        _, told = process.communicate(timeout=150)
        assert process.returncode == 0, told
    assert Counter(experiment.noted("starts")) == Counter(names) == Counter(experiment.noted("finished"))


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
)
def test_ctrl_c_stops_the_cells_which_save_and_are_gone(experiment, tmp_path, signum, code):
    lines = [experiment.line(name, do="stop", sleep=60) for name in "abc"]
    process = start(lines, tmp_path / "results", "--jobs", "2")
    wait_until(lambda: len(experiment.noted("pids")) == 2)
    time.sleep(0.1)
    process.send_signal(signum)
    _, told = process.communicate(timeout=150)
    assert process.returncode == code, told
    assert not any(alive(pid) for pid in experiment.noted("pids"))
    assert sorted(experiment.noted("saved")) == sorted(experiment.noted("starts")) == ["a", "b"]
    states = [status(cell).state for cell in sweep.known_cells(tmp_path / "results")]
    assert states == ["interrupted", "interrupted", "waiting"]


# -- records of other sweeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "python -m gnn.main --nlayer 8 --norm_scale 1 --probe --seed 0",
        "/usr/bin/python3.11 -W ignore -X dev -m gnn.main --seed=0 --norm-scale=1.0 --nlayer 8.0 --probe=true",
        "python -u -m gnn.main --output_dir a --data-root d --nlayer 8 --probe True --seed 0 --norm_scale 1e0",
        "python -m gnn.main --device cuda --no_probe --nlayer 4 --nlayer 8 --norm_scale 1 --seed 0 --probe",
    ],
)
def test_one_command_in_several_spellings(other):
    assert canonical("python -m gnn.main --nlayer 8 --norm_scale 1 --seed 0 --probe") == canonical(other)


@pytest.mark.parametrize(
    "other",
    [
        "python -m gnn.main --nlayer 8 --seed 1", "python -m gnn.main --nlayer 8",
        "python gnn.main --nlayer 8 --seed 0", "python -c gnn.main --nlayer 8 --seed 0",
        "python -m gnn.main --nlayer 8 --seed 0 --probe", "python -m gnn.main --nlayer -8 --seed 0",
        "torchrun -m gnn.main --nlayer 8 --seed 0", "python -m vit.main --nlayer 8 --seed 0",
    ],
)  # fmt: skip
def test_other_commands_stay_apart(other):
    assert canonical("python -m gnn.main --nlayer 8 --seed 0") != canonical(other)


def test_a_named_folder_with_the_run_of_another_command_is_not_done(run_sweep, tmp_path, capsys):
    """The cell is started, and its run compares the settings."""
    folder = tmp_path / "named"
    folder.mkdir()
    lines = [f"python -S -m fake --epochs {epochs} --output_dir {folder}" for epochs in (120, 1000)]
    (folder / "record.json").write_text(json.dumps({"metrics": {}, "command": lines[0]}))
    for line, state in zip(lines, ["done", "waiting"], strict=True):
        assert run_sweep([line], "--dry_run") == 0
        assert capsys.readouterr().out.split()[0] == state


def test_a_killed_cell_whose_own_child_lives_on_is_told_once(tmp_path):
    """As a loader's worker does: it holds the cell's lock until it notices."""
    code = "import os, signal, time; os.fork() or time.sleep(8) or os._exit(0); os.kill(os.getpid(), signal.SIGKILL)"
    process = start([f'python -S -c "{code}"'], tmp_path)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and told.count("killed by SIGKILL") == 1
    assert len(list(tmp_path.rglob("log.txt"))) == 1 and "# try 2" not in next(tmp_path.rglob("log.txt")).read_text()
    assert time.monotonic() - began < 60


class Queue(SlurmLauncher):
    """SLURM without SLURM: of what is queued, one job ends at every look."""

    capacity = 3

    def __init__(self, folder):
        self.poll_seconds, self._ledger, self.arrays = 0, folder / "jobs.jsonl", []

    def queued(self, cells):
        return []

    def start(self, cells):
        self.arrays.append(len(cells))
        return [Attempt(cell, cell.line, str(number)) for number, cell in enumerate(cells)]

    def finished(self, attempts):
        for attempt in attempts[:1]:
            self._note(attempt, finished="COMPLETED")
        return attempts[:1]

    def final_status(self, attempt):
        return Status("done")


def test_one_array_at_a_time(tmp_path):
    """Each holds --jobs to its limit, so that two would run twice as many; and no line of the ledger hides the next."""
    queue = Queue(tmp_path)
    queue._ledger.write_text('{"line": "torn')
    found, _ = read_cells([f"python a {number}" for number in range(8)], tmp_path)
    sweep.Sweep(found, queue).run(len(found), 0)
    assert queue.arrays == [3, 3, 2]
    assert set(read_ledger(queue._ledger)) == {cell.line for cell in found}


def test_cells_with_a_committed_record_are_done(experiment, run_sweep, tmp_path, capsys):
    head = f"python -S {experiment.script}"
    base = {"experiment": "fake", "protocol": "p", "selection": "last epoch", "metrics": {}, "config": {}}
    records = [
        base | {"seed": 0, "command": f"{head} --seed 0 --sleep=0 --name a --output_dir elsewhere"},
        base | {"seed": 1, "command": f"{head} --name b --sleep 0.0 --seeds 0,1"},
        base | {"seed": 2, "command": "python 'unbalanced"},
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [experiment.line(name, sleep=0, seed=seed) for name, seed in (("a", 0), ("b", 1), ("b", 2))]
    assert run_sweep(lines, "--records", str(path), "--dry_run") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["done", "done", "waiting"]
    assert f"recorded in {path}:1" in told[0] and f"recorded in {path}:2" in told[1]
    assert run_sweep(lines, "--records", f"[{path}]") == 0
    assert experiment.noted("starts") == ["b"]
    assert len(sweep.known_cells(tmp_path / "results")) == 1  # the others are no work of this folder
    assert run_sweep(lines, "--records", str(path), "--status") == 0
    told = capsys.readouterr().out
    assert "3 done, 0 running" in told and told.count("recorded in") == 2
    with pytest.raises(UserError, match="no record"):
        run_sweep(lines, "--records", str(tmp_path / "nowhere"))
