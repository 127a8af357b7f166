"""One run, one folder: held by one process, of one config, resumed to the line, its record written last and whole."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repro import checkpoint
from repro.config import CellLabel, RunConfig
from repro.errors import Interrupted, UserError, run_main
from repro.report.records import comparable, load_records
from repro.run import run as run_module
from repro.run.run import Run


@dataclass(kw_only=True)
class Config(RunConfig):
    rate: float = 0.5

    def label(self):
        return CellLabel(data="d", model="m", method="vanilla", depth=2)


@pytest.fixture
def config(tmp_path):
    return Config(output_dir=str(tmp_path / "run"), data_root="data")


def open_run(config, **settings):
    return Run(config.output_dir, "test", config, **settings)


def finish(run, **metrics):
    return run.finish(metrics, protocol="p", selection="last epoch")


def lines(config):
    path = Path(config.output_dir, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_from_start_to_record(config, capsys):
    with open_run(config) as run:
        assert not run.done and run.restore() is None
        run.log({"epoch": 1, "loss": torch.tensor(0.25), "many": np.arange(2), "nan": float("nan")})
        run.checkpoint(1, {"x": torch.ones(2)})
        record = finish(run, accuracy=np.float32(0.5), loss=torch.tensor(math.inf), nan=math.nan)
    folder = Path(config.output_dir)
    assert lines(config) == [{"epoch": 1, "loss": 0.25, "many": [0, 1], "nan": "nan"}]
    assert json.loads((folder / "record.json").read_text()) == record
    assert record["metrics"] == {"accuracy": 0.5, "loss": "inf", "nan": "nan"}
    places = {"output_dir": config.output_dir, "data_root": "data", "report_to": "none", "tuning_trials": None}
    assert record["config"] == places | {"seed": 0, "rate": 0.5}
    cell = {"data": "d", "model": "m", "method": "vanilla", "order": [0], "depth": 2, "scale": None}
    cell |= {"family": None, "note": ""}
    assert record["cell"] == cell and record["execution_fields"] == ["output_dir", "data_root", "report_to"]
    assert record["seed"] == 0 and record["seconds"] >= 0 and record["peak_rss_mb"] > 10
    assert record["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert sorted(p.name for p in folder.iterdir()) == ["args.yaml", "env.json", "lock", "metrics.jsonl", "record.json"]
    row = load_records(folder).iloc[0]
    assert row["metrics.accuracy"] == 0.5 and row["metrics.loss"] == math.inf and math.isnan(row["metrics.nan"])


def test_a_done_run_says_so_and_keeps_its_record(config, capsys):
    with open_run(config) as run:
        finish(run, accuracy=1.0)
    before = Path(config.output_dir, "record.json").read_bytes()
    with open_run(config) as run:
        assert run.done
    assert "done already" in capsys.readouterr().out
    assert Path(config.output_dir, "record.json").read_bytes() == before


def test_resuming_cuts_the_log_back_and_adds_the_seconds(config, capsys):
    with open_run(config) as run:
        run.restore()
        for epoch in (1, 2, 3):
            run.log({"epoch": epoch})
            if epoch < 3:
                run.checkpoint(epoch, {"epoch": epoch})
        time.sleep(0.05)
        spent = run.seconds
        run.checkpoint(2, {"epoch": 2, "again": True})
        run.log({"epoch": 4})
    with open(Path(config.output_dir, "metrics.jsonl"), "a") as file:
        file.write('{"epoch": 5, "lo')  # a line that a killed process had begun
    with open_run(config) as run:
        assert run.restore() == (2, {"epoch": 2, "again": True})
        assert [line["epoch"] for line in lines(config)] == [1, 2, 3]
        run.log({"epoch": 4})
        assert run.seconds >= spent >= 0.05
        assert finish(run, accuracy=1.0)["seconds"] >= 0.05
    assert [line["epoch"] for line in lines(config)] == [1, 2, 3, 4]
    assert "resuming from step 2" in capsys.readouterr().out


def test_started_over_the_log_is_empty(config):
    with open_run(config) as run:
        run.restore()
        run.log({"epoch": 1})
    with open_run(config) as run:
        assert run.restore() is None
        run.log({"epoch": 1})
    assert lines(config) == [{"epoch": 1}]


def test_other_settings_are_refused_and_named_but_places_may_differ(config):
    with open_run(config):
        pass
    before = sorted((p.name, p.read_bytes()) for p in Path(config.output_dir).iterdir())
    with pytest.raises(UserError, match=r"rate=0\.5 there, 0\.1 here.*choose another"):
        with open_run(replace(config, rate=0.1)):
            pass
    with pytest.raises(UserError, match="seed=0 there, 1 here"):
        with open_run(replace(config, seed=1)):
            pass
    assert sorted((p.name, p.read_bytes()) for p in Path(config.output_dir).iterdir()) == before
    with open_run(replace(config, data_root="elsewhere")) as run:
        assert not run.done


def test_a_refused_run_lets_go_of_the_folder(config):
    with open_run(config):
        pass
    refused = open_run(replace(config, rate=0.1))
    with pytest.raises(UserError):
        refused.__enter__()
    with open_run(config):  # `refused` still exists
        pass


def test_damaged_settings_are_told_in_one_line(config):
    with open_run(config):
        pass
    for damage in ("", "a: [1", "- 1\n"):
        Path(config.output_dir, "args.yaml").write_text(damage)
        with pytest.raises(UserError, match="args.yaml"):
            with open_run(config):
                pass


def test_a_folder_is_held_by_one_process(config):
    folder = Path(config.output_dir)
    folder.mkdir()
    program = (
        "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", program, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing this run"):
            with open_run(config):
                pass
        assert not (folder / "args.yaml").exists()
    finally:
        holder.kill()
        holder.communicate()
    with open_run(config) as run:  # a killed process holds nothing
        assert not run.done


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 140)])
def test_a_signal_saves_at_the_next_checkpoint_and_leaves(config, capsys, signum, code):
    def main():
        with open_run(config) as run:
            start, _ = run.restore() or (0, None)
            for epoch in range(start + 1, 5):
                run.log({"epoch": epoch})
                if epoch == 2 and start == 0:
                    os.kill(os.getpid(), signum)
                    assert run.stop_requested
                run.checkpoint(epoch, {"epoch": epoch})
            finish(run, last=epoch)

    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == code and isinstance(left.value, Interrupted)
    assert signal.getsignal(signum) is before
    assert "stopped at step 2" in capsys.readouterr().err
    assert not Path(config.output_dir, "record.json").exists()
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 0
    assert [line["epoch"] for line in lines(config)] == [1, 2, 3, 4]


def test_a_record_is_there_whole_or_not_at_all(config, monkeypatch):
    with open_run(config) as run:
        run.checkpoint(1, {"x": 1})
        monkeypatch.setattr(checkpoint.os, "replace", failing)
        with pytest.raises(OSError, match="No space left"):
            finish(run, accuracy=1.0)
        monkeypatch.undo()
        assert not run.done
    with open_run(config) as run:
        assert run.restore() == (1, {"x": 1})  # and the checkpoints stay until the record is there
        finish(run, accuracy=1.0)
        assert run.done


def failing(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_written_is_one_line(config, capsys, monkeypatch):
    def enter(path):
        with Run(path, "test", config):
            pass

    blocked = Path(config.output_dir).parent / "file"
    blocked.write_text("")
    for path in (blocked, blocked / "run", Path("/proc/nowhere/run")):
        with pytest.raises(SystemExit) as left:
            run_main(lambda path=path: enter(path))
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and str(path) in told and "cannot be written" in told
    monkeypatch.setattr(run_module.Path, "mkdir", lambda *a, **k: failing_read_only())
    with pytest.raises(UserError, match="Read-only file system"):
        enter(Path(config.output_dir))


def failing_read_only():
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_helping_processes_write_nothing(config):
    with open_run(config) as main_run:
        main_run.log({"epoch": 1})
        main_run.checkpoint(1, {"x": 1})
        before = sorted((p.name, p.stat().st_mtime_ns) for p in Path(config.output_dir).rglob("*"))
        with open_run(config, main=False) as run:  # in the same folder at the same time
            assert run.restore() == (1, {"x": 1})
            run.log({"epoch": 2})
            run.checkpoint(2, {"x": 2})
            finish(run, accuracy=1.0)
        assert sorted((p.name, p.stat().st_mtime_ns) for p in Path(config.output_dir).rglob("*")) == before


def test_equal_runs_have_equal_records_but_for_the_circumstances(config, tmp_path):
    records = []
    for name in ("a", "b"):
        with open_run(replace(config, output_dir=str(tmp_path / name))) as run:
            records.append(finish(run, accuracy=0.25))
    assert comparable(records[0]) == comparable(records[1])
    assert comparable(records[0])["metrics"] == {"accuracy": 0.25}


def test_several_processes_leave_at_the_step_they_agree_on(config, monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(run_module, "any_process", lambda flag: next(answers))
    with pytest.raises(Interrupted) as left, open_run(config) as run:
        assert not run.agree_to_stop()
        os.kill(os.getpid(), signal.SIGUSR2)  # too late for this step: the others know nothing of it
        run.checkpoint(1, {})
        assert run.agree_to_stop()
        run.checkpoint(2, {})
    assert left.value.code == 128 + signal.SIGUSR2


def test_a_process_without_a_signal_leaves_with_the_others(config, monkeypatch):
    monkeypatch.setattr(run_module, "any_process", lambda flag: True)
    with pytest.raises(Interrupted) as left, open_run(config) as run:
        assert run.agree_to_stop() and not run.stop_requested
        run.checkpoint(1, {})
    assert left.value.code == 128 + signal.SIGTERM


def test_any_process_asks_them_all(tmp_path):
    program = (
        "import os, sys, torch.distributed as dist\nfrom repro.run.track import any_process\nrank = int(sys.argv[1])\n"
        "alone = any_process(True), any_process(False)\n"
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)\n"
        "print(*alone, any_process(rank == 1), any_process(False), flush=True)\ndist.barrier()\nos._exit(0)"
    )
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen([*command, str(r), str(tmp_path / "s")], stdout=subprocess.PIPE) for r in (0, 1)]
    assert [process.communicate(timeout=120)[0] for process in started] == [b"True False True False\n"] * 2
