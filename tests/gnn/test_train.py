"""Training: the same numbers from the same seed, also after a kill; protocols; bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch

from gnn import data as graphs
from gnn import train as training
from gnn.config import Config, ModelName, NormName
from gnn.data import Graph, as_graph
from gnn.layers import Adjacency
from gnn.main import main, train_cell
from gnn.train import TrainingSetup, accuracies
from repro.errors import Interrupted, UserError
from repro.report.records import comparable
from repro.run.run import Run

Make = Callable[..., Config]
Read = Callable[[str | Path], dict[str, Any]]
pytestmark = pytest.mark.usefixtures("small_digits")


def lines(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_diverged_run_has_no_accuracy(config: Make, record: Read, tmp_path: Path) -> None:
    """Argmax answers with a class even where all is NaN; repro.tune takes such a run last."""
    train_cell(config(output_dir=str(tmp_path / "run"), nlayer=4, epochs=3, lr=1e30))
    assert set(record(tmp_path / "run")["metrics"].values()) == {"nan"}


# -- every combination -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", get_args(ModelName))
def test_one_epoch_of_every_norm(model: str, config: Make, record: Read, tmp_path: Path) -> None:
    for norm in get_args(NormName):
        scale = 1.0 if norm == "CN" else None
        folder = tmp_path / norm
        train_cell(config(output_dir=str(folder), model=model, norm_mode=norm, scale=scale, epochs=1, nlayer=3))
        found = record(folder)
        assert 0 <= found["metrics"]["test_accuracy"] <= 1
        assert found["nodes"] == {"train": 20, "validation": 15, "test": 25}
        assert not (folder / "checkpoints").exists()


# -- determinism and interruption --------------------------------------------------------------------------------------

EVERYTHING = {
    "norm_mode": "CN", "scale": 1.0, "use_layer_norm": True, "dropedge": 0.3, "missing_rate": 30.0,
    "protocol": "standard", "epochs": 12, "checkpoint_every": 3, "probe": True,
}  # fmt: skip


def test_same_seed_same_numbers(config: Make, record: Read, tmp_path: Path) -> None:
    runs = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        train_cell(config(**EVERYTHING, output_dir=str(tmp_path / name), seed=seed))
        runs.append((comparable(record(tmp_path / name)), lines(tmp_path / name)))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program sees it."""


@pytest.mark.parametrize("moment", ["log 1", "log 5", "log 12", "checkpoint 3", "checkpoint 12", "finish 1"])
def test_killed_anywhere_and_started_again(
    moment: str, config: Make, record: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (config(**EVERYTHING, output_dir=str(tmp_path / name)) for name in ("whole", "broken"))
    train_cell(whole)
    method, number = moment.split()
    original, calls = getattr(Run, method), [0]

    def dies(self: Run, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 3 if method == "checkpoint" else 1  # counted in epochs
        if calls[0] == int(number):
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, method, dies)
        with pytest.raises(Killed):
            train_cell(broken)
    assert not (tmp_path / "broken/record.json").exists()
    train_cell(broken)
    assert comparable(record(tmp_path / "broken")) == comparable(record(tmp_path / "whole"))
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def command(python: str, folder: Path, *more: str) -> list[str]:
    line = "-m gnn.main --data digits --nlayer 3 --norm_mode PN --dropedge 0.2 --epochs 40 --checkpoint_every 5"
    return [python, *line.split(), "--device", "cpu", "--output_dir", str(folder), *more]


def start_and_wait(argv: list[str], folder: Path, epochs: int) -> subprocess.Popen[str]:
    """Start a run, and return when it has logged that many epochs."""
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= epochs):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_signals_in_real_processes(python: str, tmp_path: Path, record: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, then SIGTERM, then the same command: the record of an undisturbed run."""
    monkeypatch.undo()  # the real digits, in this process as in the others
    folder = tmp_path / "run"
    first = start_and_wait(command(python, folder), folder, epochs=7)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    second = start_and_wait(command(python, folder), folder, epochs=12)
    second.send_signal(signal.SIGTERM)
    errors = second.communicate(timeout=120)[1]
    assert second.returncode == 128 + signal.SIGTERM, errors
    assert re.search(r"stopped at step \d+; ", errors) and not (folder / "record.json").exists()
    main(command(python, folder)[3:])
    main(command(python, tmp_path / "whole")[3:])
    assert comparable(record(folder)) == comparable(record(tmp_path / "whole"))
    assert lines(folder) == lines(tmp_path / "whole")


def test_sigterm_saves_at_once(config: Make, record: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (config(epochs=8, output_dir=str(tmp_path / name)) for name in ("whole", "stopped"))
    train_cell(whole)
    original = Run.log

    def log(self: Run, values: dict[str, Any]) -> None:
        original(self, values)
        if values["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(Interrupted) as left:
            train_cell(stopped)
    assert left.value.code == 128 + signal.SIGTERM and len(lines(tmp_path / "stopped")) == 3
    train_cell(stopped)
    assert comparable(record(tmp_path / "stopped")) == comparable(record(tmp_path / "whole"))


def test_a_finished_run_is_left_alone(config: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train_cell(config())
    written = (tmp_path / "run/record.json").stat().st_mtime_ns
    train_cell(config())
    assert "done already" in capsys.readouterr().out
    assert (tmp_path / "run/record.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"other settings \(seed=0 there, 1 here\)"):
        train_cell(config(seed=1))


# -- what is reported --------------------------------------------------------------------------------------------------


def test_reference_protocol_reports_the_last_epoch(config: Make, record: Read, tmp_path: Path) -> None:
    train_cell(config(eval_every=1, epochs=6))
    found = record(tmp_path / "run")
    assert (found["protocol"], found["selection"], found["epoch"]) == ("reference", "last epoch", 6)
    assert found["metrics"]["test_accuracy"] == lines(tmp_path / "run")[-1]["test_accuracy"]
    assert found["nodes"]["test"] == 25


def test_standard_protocol_reports_the_first_best_epoch(config: Make, record: Read, tmp_path: Path) -> None:
    train_cell(config(protocol="standard", epochs=15, lr=0.05))
    found, log = record(tmp_path / "run"), lines(tmp_path / "run")
    best = max(log, key=lambda line: line["validation_accuracy"])  # the first of equals
    assert (found["selection"], found["epoch"]) == ("best validation accuracy", best["epoch"])
    assert found["metrics"] == {name: best[name] for name in ("test_accuracy", "validation_accuracy")}
    assert found["nodes"]["test"] == 15


def test_accuracies_count_right_answers(make_data: Callable[..., Any], config: Make) -> None:
    graph: Graph = as_graph("small", make_data())

    class Oracle(torch.nn.Module):
        def forward(self, x: Any, adjacency: Any) -> torch.Tensor:
            answers = graph.y.clone()
            answers[graph.test.nonzero()[:3, 0]] += 1  # three of the 15 test nodes wrong
            return torch.nn.functional.one_hot(answers % 4, 4).float()

    def measured(protocol: str) -> dict[str, float]:
        adjacency = Adjacency.from_edges(graph.edge_index, len(graph.y))
        setup = TrainingSetup(config(protocol=protocol), torch.device("cpu"), graph, adjacency, graph.x)
        return accuracies(Oracle(), setup)

    assert measured("standard") == {"test_accuracy": 12 / 15, "validation_accuracy": 1.0}
    assert measured("reference")["test_accuracy"] == 22 / 25


def test_probe_has_one_value_per_hidden_layer(config: Make, record: Read, tmp_path: Path) -> None:
    train_cell(config(probe=True, nlayer=5, norm_mode="PN"))
    probe = record(tmp_path / "run")["collapse"]
    frame = pd.read_csv(tmp_path / "run/probe.csv")
    assert frame["layer"].tolist() == probe["layer"] == [1, 2, 3, 4]
    assert probe.keys() == {"layer", "mean_cosine", "effective_rank", "variance"}
    for name in ("mean_cosine", "effective_rank", "variance"):
        assert frame[name].tolist() == pytest.approx(probe[name])
    assert all(0 <= c <= 1 for c in probe["mean_cosine"]) and all(r >= 1 for r in probe["effective_rank"])


def test_probe_before_and_after_training(config: Make, record: Read, tmp_path: Path) -> None:
    """The same lists of the same layers before training, and the spectrum of the last hidden features."""
    train_cell(config(probe=True, nlayer=5, norm_mode="PN", epochs=20, lr=0.05))
    found = record(tmp_path / "run")
    after, before = found["collapse"], found["collapse_untrained"]
    assert before["layer"] == after["layer"] and before.keys() == after.keys()
    assert before["mean_cosine"] != after["mean_cosine"]
    for name, collapse in (("spectrum", after), ("spectrum_untrained", before)):
        values = torch.tensor(found[name])
        assert len(values) == 8 and values.sum().item() == pytest.approx(1) and (values.diff() <= 0).all()
        rank = torch.special.entr(values).sum().exp().item()
        assert rank == pytest.approx(collapse["effective_rank"][-1], rel=1e-4)


@pytest.mark.parametrize("changes", [{"nlayer": 1}, {"model": "SGC", "nlayer": 2}], ids=str)
def test_probe_of_other_shapes(changes: dict[str, Any], config: Make, record: Read, tmp_path: Path) -> None:
    train_cell(config(probe=True, **changes))
    found = record(tmp_path / "run")
    hidden = 0 if changes["nlayer"] == 1 else 2  # a single convolution has no hidden layer
    assert len(found["collapse"]["layer"]) == len(found["collapse_untrained"]["layer"]) == hidden
    assert len(found["spectrum"]) == 12 * bool(hidden)  # SGC keeps the input's width


def test_the_loss_can_be_followed(config: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every line of metrics.jsonl has it, and the progress bar shows it."""
    train_cell(config(epochs=4))
    log = lines(tmp_path / "run")
    assert [line["epoch"] for line in log] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in log)
    assert f"loss={log[-1]['loss']:.3f}" in capsys.readouterr().err


def test_probing_does_not_change_the_numbers(config: Make, record: Read, tmp_path: Path) -> None:
    for name, probe in (("a", True), ("b", False)):
        train_cell(config(output_dir=str(tmp_path / name), probe=probe, use_layer_norm=True))
    assert record(tmp_path / "a")["metrics"] == record(tmp_path / "b")["metrics"]


def test_a_record_holds_what_a_reader_needs(config: Make, record: Read, tmp_path: Path) -> None:
    train_cell(config(norm_mode="CN", scale=0.5, use_layer_norm=True))
    found = record(tmp_path / "run")
    assert found["experiment"] == "gnn" and found["seed"] == 0 and found["config"]["scale"] == 0.5
    assert found["seconds"] > found["epoch_seconds"] > 0 and found["peak_rss_mb"] > 0 and found["parameters"] > 0
    assert "scale=0.5" in found["norm"] and "shared by all hidden layers" in found["norm"]


def test_a_small_graph_is_trained_on_one_thread(config: Make, record: Read, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_cell(config(epochs=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / "run/env.json").read_text())["threads"] == 1
    assert record(tmp_path / "run")["environment"]["threads"] == 1


def test_a_large_graph_keeps_its_threads(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ONE_THREAD_BELOW", 60)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_cell(config(epochs=1))
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / "run/env.json").read_text())["threads"] == 2


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_by_bad_graphs(
    make_data: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data()
    data.x[3, 1] = float("nan")
    monkeypatch.setattr(graphs, "digits", lambda: data)
    flags = ["--data", "digits", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="digits: the features of node 3 hold NaN"):
        main(flags)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--data_root"):
        main(["--data", "dblp", "--data_root", str(tmp_path), *flags[2:]])
    assert not (tmp_path / "out").exists()


def test_no_gpu(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no GPU"):
        train_cell(config(device="cuda"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--norm_mode CN", "--data karate", "--colour red", "--nlayer -2"])
def test_exit_code_2_and_one_line(flags: str, python: str, tmp_path: Path) -> None:
    argv = [python, "-m", "gnn.main", *flags.split(), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: gnn.main: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_wait_for_libraries_that_it_does_not_use(python: str, tmp_path: Path, data_root: Path) -> None:
    argv = f"--data texas --data_root {data_root} --epochs 1 --device cpu --output_dir {tmp_path / 'out'}".split()
    unused = ("pandas", "transformers", "matplotlib", "submitit", "datasets", "sklearn", "timm")
    code = (
        # Parsing needs no torch: a typing error is reported at once.
        "import sys; import gnn.main, gnn.config; assert 'torch' not in sys.modules\n"
        f"gnn.main.main({argv!r})\n"
        f"print([name for name in {unused} if name in sys.modules])\n"
        "import pandas, transformers\n"  # but they can be had
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
