"""Cells get GPUs of their own. The GPUs are stand-ins: names that a cell finds in CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from repro.errors import UserError
from repro.sweep import sweep
from repro.sweep.cell import make_cell, processes
from repro.sweep.devices import Devices
from repro.sweep.status import read_details


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test's own: others may have stand-ins of the same names."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("GPUS", raising=False)


def seen(results: Path) -> list[str]:
    """What the cells found in CUDA_VISIBLE_DEVICES; cell.json says the same."""
    found = {p.parent: json.loads(p.read_text())["config"]["gpus"] for p in sorted(results.glob("*/record.json"))}
    assert [read_details(folder)["gpus"] for folder in found] == list(found.values())
    return list(found.values())


def overlaps(results: Path) -> bool:
    """Whether two cells had one GPU at the same time, by the times that the cells have noted."""
    spans = [json.loads(path.read_text()) for path in results.rglob("span.json")]
    pairs = [(a, b) for a in spans for b in spans if a["folder"] < b["folder"] and set(a["gpus"]) & set(b["gpus"])]
    return any(a["began"] < b["ended"] and b["began"] < a["ended"] for a, b in pairs)


SPAN = """
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, began = flags["--output_dir"], time.time()
time.sleep(float(flags["--sleep"]))
gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
with open(folder + "/span.json", "w") as f:
    json.dump({"folder": folder, "gpus": gpus, "began": began, "ended": time.time()}, f)
with open(folder + "/record.json", "w") as f:
    json.dump({"metrics": {}, "seconds": 1.0, "config": {"gpus": ",".join(gpus)}}, f)
"""


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., list[str]]:
    (tmp_path / "span.py").write_text(SPAN)

    def make(count: int, **flags: Any) -> list[str]:
        more = "".join(f" --{name} {value}" for name, value in flags.items())
        return [f"python -S {tmp_path / 'span.py'} --name {n} --sleep 0.3{more}" for n in range(count)]

    return make


def test_six_cells_on_four_gpus_never_share(lines: Any, run_sweep: Any, tmp_path: Path, capsys: Any) -> None:
    assert run_sweep(lines(6), "--jobs", "6", "--gpus", "0,1,2,3") == 0
    assert set(seen(tmp_path / "results")) == {"0", "1", "2", "3"} and len(seen(tmp_path / "results")) == 6
    assert not overlaps(tmp_path / "results")
    capsys.readouterr()
    assert run_sweep([], "--status") == 0
    assert len(re.findall(r"^done .* on GPU [0-3]$", capsys.readouterr().out, re.MULTILINE)) == 6


def test_the_variable_of_the_shell_scripts(
    lines: Any, run_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUS", "gpu-a,gpu-b")
    assert run_sweep(lines(2), "--jobs", "2", "--gpus_per_cell", "2") == 0
    assert seen(tmp_path / "results") == ["gpu-a,gpu-b"] * 2 and not overlaps(tmp_path / "results")


def test_each_process_of_torchrun_gets_one(lines: Any, run_sweep: Any, tmp_path: Path) -> None:
    """The flag says how many, wherever in the line it stands; here a cell that is not torchrun has it as well."""
    assert run_sweep(lines(4, **{"nproc-per-node": 2}), "--jobs", "4", "--gpus", "0,1,2,3") == 0
    assert set(seen(tmp_path / "results")) <= {"0,1", "2,3", "0,3", "1,2", "0,2", "1,3"}
    assert not overlaps(tmp_path / "results")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("python -m gnn.main", 1),
        ("torchrun --standalone --nproc-per-node=2 -m ViT_imagenet.main", 2),
        ("torchrun --nproc_per_node 4 -m ViT_imagenet.main", 4),
        ("torchrun --nproc_per_node gpu -m ViT_imagenet.main", None),
        ("accelerate launch --num_processes 3 -m BERT_glue.main", 3),
    ],
)
def test_processes_of_a_line(line: str, count: int | None, tmp_path: Path) -> None:
    cell = make_cell(line, tmp_path)
    assert cell is not None and processes(cell) == count


def test_sharing_has_to_be_asked_for(lines: Any, run_sweep: Any, tmp_path: Path) -> None:
    assert run_sweep(lines(4), "--jobs", "4", "--gpus", "0,1", "--share_gpus") == 0
    assert sorted(seen(tmp_path / "results")) == ["0", "0", "1", "1"] and overlaps(tmp_path / "results")


def test_two_sweeps_on_one_machine_never_share(lines: Any, tmp_path: Path) -> None:
    sweeps = []
    for name in "ab":
        flags = ["--results", str(tmp_path / "results" / name), "--gpus", "0,1"]
        (tmp_path / f"lines-{name}").write_text("\n".join(lines(3, sweep=name)))
        with open(tmp_path / f"lines-{name}") as cells:
            sweeps.append(subprocess.Popen(
                [sys.executable, "-m", "repro.sweep", *flags], stdin=cells, env=os.environ | {"TMPDIR": str(tmp_path)}
            ))  # fmt: skip
    assert [process.wait(timeout=250) for process in sweeps] == [0, 0]
    assert len(list(tmp_path.glob("results/*/*/span.json"))) == 6 and not overlaps(tmp_path / "results")


def test_waiting_for_the_gpus_of_others_is_said_once(lines: Any, run_sweep: Any, capsys: Any) -> None:
    lent = Devices("0").lend(1)
    assert lent is not None
    threading.Timer(0.5, lent.close).start()
    assert run_sweep(lines(2), "--gpus", "0") == 0
    assert capsys.readouterr().err.count("note: other cells have the GPUs") == 1


def test_a_gpu_is_free_again_when_its_holder_is_gone() -> None:
    devices = Devices("0,1")
    first, second = devices.lend(1), devices.lend(1)
    assert first is not None and second is not None and (first.names, second.names) == ("0", "1")
    assert devices.lend(1) is None and Devices("1").lend(1) is None
    second.close()
    assert devices.lend(2) is None
    again = devices.lend(1)
    assert again is not None and again.names == "1"
    first.close()
    again.close()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--gpus 0,1 --gpus_per_cell 3", "needs 3 GPUs, but --gpus names 2"),
        ("--gpus 0,0", "names a device twice"),
        ("--share_gpus", "name them in --gpus"),
        ("--gpus_per_cell 0 --gpus 0", "must be positive"),
        ("--cluster slurm --gpus 4", "on SLURM a cell gets --gpus_per_cell N"),
    ],
)
def test_what_cannot_work_is_refused(flags: str, told: str, lines: Any, run_sweep: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        run_sweep(lines(1), *flags.split())
    assert not (tmp_path / "results").exists()


# -- the plan's hours --------------------------------------------------------------------------------------------------


def plan(run_sweep: Any, capsys: Any, lines: list[str], *flags: str) -> str:
    capsys.readouterr()
    assert run_sweep(lines, "--dry-run", "--jobs", "2", *flags) == 0
    return str(capsys.readouterr().err.splitlines()[-1])


def test_the_plan_says_how_long_it_takes_or_that_nobody_knows(run_sweep: Any, tmp_path: Path, capsys: Any) -> None:
    def line(depth: int, seed: int) -> str:
        return f"python -m gnn.main --nlayer {depth} --seed {seed}"

    base = {"experiment": "gnn", "protocol": "p", "selection": "s", "metrics": {}, "config": {}}
    times = [(0, 3600), (1, 7200), (2, 72000)]
    records = [base | {"seed": seed, "command": line(2, seed), "seconds": seconds} for seed, seconds in times]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    known, unknown = [line(2, seed) for seed in (3, 4)], [line(4, seed) for seed in (0, 1, 2)]

    told = plan(run_sweep, capsys, known, "--records", str(path))
    assert told == "time: 4 h for 2 cells, by the records of their settings; 2 h with 2 side by side"
    told = plan(run_sweep, capsys, unknown)
    neither = "no record has their settings, no datasheet a time, and --hours_per_cell is not given"
    assert told == f"time: unknown for 3 cells: {neither}"
    told = plan(run_sweep, capsys, known + unknown, "--records", str(path), "--hours_per_cell", "0.5")
    assert told == (
        "time: 4 h for 2 cells, by the records of their settings; 1.5 h for 3 cells, by --hours_per_cell; "
        "2.8 h with 2 side by side"
    )
    done = make_cell(unknown[0], tmp_path / "results")
    assert done is not None
    done.folder.mkdir(parents=True)
    (done.folder / "record.json").write_text(json.dumps({"metrics": {}, "seconds": 1800}))
    told = plan(run_sweep, capsys, unknown)
    assert told == "time: 1 h for 2 cells, by the records of their settings; 0.5 h with 2 side by side"


def test_the_plan_quotes_the_datasheet_of_a_config(run_sweep: Any, tmp_path: Path, capsys: Any) -> None:
    sheet, silent = tmp_path / "sheet.yaml", tmp_path / "silent.yaml"
    sheet.write_text("# Hardware: 4 GPUs\n# Time:     two hours\n#           on these.\n# Expect:   1\na: 1\n")
    silent.write_text("a: 1\n")
    lines = [f"python -m gnn.main --config {sheet} --seed {seed}" for seed in (0, 1)]
    told = plan(run_sweep, capsys, [*lines, f"python -m gnn.main --config={silent}", "python -m gnn.main"])
    assert told == (
        f"time: 2 cells, by the datasheet {sheet}: two hours on these; unknown for 2 cells: no record has their "
        "settings, no datasheet a time, and --hours_per_cell is not given"
    )
    told = plan(run_sweep, capsys, lines, "--hours_per_cell", "2")
    assert told == "time: 4 h for 2 cells, by --hours_per_cell; 2 h with 2 side by side"


def test_settings_of_the_plan_need_no_slurm() -> None:
    with pytest.raises(UserError, match="must be positive"):
        sweep.main(["--results", "r", "--hours_per_cell", "-1"])
