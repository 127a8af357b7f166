"""Several seeds in one process: each the run that it is alone, also after a kill; the summary is no run of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gnn import data as graphs
from gnn import train as training
from gnn.config import CommandLine, Config
from gnn.main import main
from repro.config import parse_config
from repro.errors import Interrupted, UserError
from repro.report import collect, tables
from repro.report.records import comparable, load_records
from repro.run.run import Run
from repro.sweep.cell import is_done

Read = Callable[[str | Path], dict[str, Any]]
pytestmark = pytest.mark.usefixtures("small_digits")
COMMON = "--data digits --hid 8 --nlayer 3 --device cpu --checkpoint_every 3 --epochs 8".split()
EVERYTHING = (
    "--norm_mode CN --norm_scale 1.0 --use_layer_norm --dropedge 0.3 --missing_rate 30 --protocol standard --probe"
).split()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def together(folder: Path, *flags: str, seeds: str = "0,1,2") -> None:
    main([*COMMON, *flags, "--seeds", seeds, "--output_dir", str(folder)])


def alone(folder: Path, seed: int, *flags: str) -> None:
    main([*COMMON, *flags, "--seed", str(seed), "--output_dir", str(folder)])


def assert_same_run(one: Path, other: Path, record: Read) -> None:
    assert comparable(record(one)) == comparable(record(other))
    assert lines(one) == lines(other)
    first, second = (yaml.safe_load((folder / "args.yaml").read_text()) for folder in (one, other))
    assert first | {"output_dir": None} == second | {"output_dir": None}


# -- each seed is the run that it is alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [EVERYTHING, [], *(["--model", model, "--norm_mode", "PN"] for model in ("SGC", "DeepGAT", "GIN"))],
    ids=["everything", "plain", "SGC", "DeepGAT", "GIN"],
)
def test_each_seed_has_the_numbers_that_it_has_alone(flags: list[str], tmp_path: Path, record: Read) -> None:
    together(tmp_path / "x", *flags, seeds="0,2,1")
    for seed in (0, 1, 2):
        alone(tmp_path / str(seed), seed, *flags)
        assert_same_run(tmp_path / "x" / f"seed{seed}", tmp_path / str(seed), record)
    assert lines(tmp_path / "0") != lines(tmp_path / "1") != lines(tmp_path / "2")


def test_the_graph_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    original = training.load_graph
    monkeypatch.setattr(training, "load_graph", lambda *a, **k: loaded.append(a) or original(*a, **k))
    together(tmp_path / "x")
    assert len(loaded) == 1
    shutil.rmtree(tmp_path / "x/seed1")
    together(tmp_path / "x")
    assert len(loaded) == 2 and is_done(tmp_path / "x")
    together(tmp_path / "x")  # finished: no data is needed to say so
    assert len(loaded) == 2


# -- stopped and started again -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program sees it."""


@pytest.mark.parametrize("by", ["kill", "SIGTERM"])
@pytest.mark.parametrize("goes_on", ["together", "alone"])
def test_stopped_in_the_middle_of_the_second_seed(
    by: str, goes_on: str, tmp_path: Path, record: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seed stays as it is; the second goes on from its checkpoint, also under a command of its own."""
    folder, original = tmp_path / "x", Run.log

    def log(self: Run, values: dict[str, Any]) -> None:
        original(self, values)
        if self.folder.name == "seed1" and values["epoch"] == 5:
            if by == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises((Killed, Interrupted)) as left:
            together(folder, *EVERYTHING)
    assert by == "kill" or left.value.code == 128 + signal.SIGTERM
    finished = (folder / "seed0/record.json").stat().st_mtime_ns
    assert not (folder / "seed1/record.json").exists() and not (folder / "record.json").exists()

    trained: list[tuple[str, int]] = []
    monkeypatch.setattr(
        Run, "log", lambda self, values: (trained.append((self.folder.name, values["epoch"])), original(self, values))
    )
    if goes_on == "alone":
        alone(folder / "seed1", 1, *EVERYTHING)
    together(folder, *EVERYTHING)
    first = 4 if by == "kill" else 6  # after the checkpoint of epoch 3; after the one that SIGTERM had made
    assert trained == [*(("seed1", n) for n in range(first, 9)), *(("seed2", n) for n in range(1, 9))]
    assert (folder / "seed0/record.json").stat().st_mtime_ns == finished
    for seed in (1, 2):
        alone(tmp_path / str(seed), seed, *EVERYTHING)
        assert_same_run(folder / f"seed{seed}", tmp_path / str(seed), record)


@pytest.mark.parametrize("moment", ["finish", "__enter__", "__exit__"])
def test_a_stop_between_two_seeds_is_heeded(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(Run, moment)

    def stopped(self: Run, *args: Any, **kwargs: Any) -> Any:
        if moment != "finish":
            result = original(self, *args, **kwargs)
        if self.folder.name == "seed0":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs) if moment == "finish" else result

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, moment, stopped)
        with pytest.raises(Interrupted) as left:
            together(tmp_path / "x")
    assert left.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "x/seed1").exists()
    together(tmp_path / "x")
    assert is_done(tmp_path / "x")


def test_killed_before_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("gnn.seeds.SeedGroup.summarize", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            together(tmp_path / "x")
    assert not is_done(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_graph", lambda *a, **k: pytest.fail("nothing is left to train"))
        together(tmp_path / "x")
    assert is_done(tmp_path / "x")


# -- the summary -------------------------------------------------------------------------------------------------------


def test_the_summary(tmp_path: Path, record: Read, capsys: pytest.CaptureFixture[str]) -> None:
    together(tmp_path / "x")
    said = capsys.readouterr().out.splitlines()[-1]
    found = record(tmp_path / "x")
    runs = [record(tmp_path / "x" / name) for name in found["runs"]]
    accuracies = [run["metrics"]["test_accuracy"] for run in runs]
    assert (found["seeds"], found["runs"]) == ([0, 1, 2], ["seed0", "seed1", "seed2"])
    assert [run["seed"] for run in runs] == [0, 1, 2] and found["values"]["test_accuracy"] == accuracies
    assert found["metrics"]["test_accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert found["std"]["test_accuracy"] == pytest.approx(statistics.stdev(accuracies))
    assert found["seconds"] == pytest.approx(sum(run["seconds"] for run in runs), abs=0.01)
    mean, std = found["metrics"]["test_accuracy"], found["std"]["test_accuracy"]
    each = ", ".join(f"seed {seed} {accuracy:.4f}" for seed, accuracy in enumerate(accuracies))
    assert said == f"test accuracy: {each}; mean {mean:.4f} ± {std:.4f}, {tmp_path / 'x/record.json'}"


def test_one_seed_has_no_spread(tmp_path: Path, record: Read, capsys: pytest.CaptureFixture[str]) -> None:
    together(tmp_path / "x", seeds="7")
    found = record(tmp_path / "x")
    assert found["std"]["test_accuracy"] is None and found["seeds"] == [7]
    assert "±" not in capsys.readouterr().out


def test_the_summary_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together(tmp_path / "runs/x")
    alone(tmp_path / "runs/y", 3)
    assert sorted(load_records(tmp_path / "runs")["seed"]) == [0, 1, 2, 3]
    capsys.readouterr()
    tables.main(["--preset", "table3", "--records", str(tmp_path / "runs")])
    assert "(4)" in capsys.readouterr().out
    collect.main(["--records", str(tmp_path / "runs"), "--output", str(tmp_path / "records.jsonl")])
    assert len(load_records(tmp_path / "records.jsonl")) == 4
    with pytest.raises(UserError, match="only summaries of several seeds"):
        load_records(tmp_path / "runs/x/record.json")


def test_a_cell_is_done_with_its_last_seed_only(tmp_path: Path) -> None:
    together(tmp_path / "x", seeds="0,1")
    assert is_done(tmp_path / "x")
    (tmp_path / "x/seed1/record.json").unlink()
    assert not is_done(tmp_path / "x")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    together(tmp_path / "x", seeds="0,1")
    (tmp_path / "x/record.json").unlink()
    (tmp_path / "x/seed1/record.json").write_text('{"metrics": 3}')
    with pytest.raises(UserError, match=r"seed1/record.json: damaged record"):
        together(tmp_path / "x", seeds="0,1")


# -- what does not go together -----------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together(tmp_path / "x", seeds="0,1")
    capsys.readouterr()
    for flags, seeds in (([], "0,1,2"), (["--lr", "0.1"], "0,1")):
        with pytest.raises(UserError, match="holds a run with other settings"):
            together(tmp_path / "x", *flags, seeds=seeds)
    with pytest.raises(UserError, match="holds a run with other settings"):
        alone(tmp_path / "x", 0)
    alone(tmp_path / "x/seed1", 1)  # but a seed's folder is that seed's run
    assert "done already" in capsys.readouterr().out
    alone(tmp_path / "y", 0)
    with pytest.raises(UserError, match="holds a run with other settings"):
        together(tmp_path / "y")
    assert not list((tmp_path / "y").glob("seed*"))


def test_bad_data_leaves_nothing_behind(
    make_data: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    data.x[3, 1] = float("nan")
    monkeypatch.setattr(graphs, "digits", lambda: data)
    with pytest.raises(UserError, match="digits: the features of node 3 hold NaN"):
        together(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("given", ["3,1,2", "[3, 1, 2]", " 3, 1,2"])
def test_the_seeds_may_be_written_in_two_ways(given: str) -> None:
    asked = parse_config(CommandLine, [f"--seeds={given}", "--output_dir=x"], prog="gnn.main")
    assert [(run.seed, run.output_dir) for run in asked.runs()] == [(3, "x/seed3"), (1, "x/seed1"), (2, "x/seed2")]
    assert all(type(run) is Config for run in asked.runs())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--seed 0 --seeds 0,1", "--seed and --seeds do not go together"),
        ("--seeds 0,1,0", "--seeds names 0 twice"),
        ("--seeds=", "--seeds is empty"),
        ("--seeds []", "--seeds is empty"),
        ("--seeds 0,x", "whole numbers"),
        ("--seeds 0.5", "whole numbers"),
        ("--seeds 0,1 --norm_mode CN", "needs --norm_scale"),
    ],
)
def test_seeds_that_make_no_sense(flags: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        main([*flags.split(), "--data", "digits", "--output_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_without_seeds_there_is_one_run(tmp_path: Path) -> None:
    for flags, seed in (([], 0), (["--seed", "5"], 5)):
        asked = parse_config(CommandLine, [*flags, "--output_dir=x"], prog="gnn.main")
        assert [(run.seed, run.output_dir) for run in asked.runs()] == [(seed, "x")]
