"""Training: the epoch of label reuse, the same numbers from the same seed, kills, and teachers that do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnn.arxiv import activity
from gnn.arxiv import train as training
from gnn.arxiv.__main__ import main, train_cell
from gnn.arxiv.config import Config
from gnn.arxiv.models import RevGAT
from gnn.arxiv.teacher import FILE
from gnn.arxiv.train import evaluate, prepare, training_step
from repro.errors import UserError
from repro.report.records import comparable
from repro.run.run import Run

Make = Callable[..., Config]
pytestmark = pytest.mark.usefixtures("small_data")
DCN = {"norm": "ContraNorm", "scale": 1.0, "scaled_tau": True}


def record(folder: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "record.json").read_text())
    return found


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def teacher(config: Make, tmp_path: Path) -> str:
    folder = str(tmp_path / "teacher")
    train_cell(config(output_dir=folder, n_layers=2))
    return folder


# -- one epoch ---------------------------------------------------------------------------------------------------------


class Recorder(RevGAT):
    """Remembers the label channels of every forward pass, and whether gradients were on."""

    def forward(self, parts: Any, adjacency: Any) -> torch.Tensor:
        self.seen = [*getattr(self, "seen", []), (parts[-1].clone(), torch.is_grad_enabled(), self.training)]
        return super().forward(parts, adjacency)


def test_label_reuse(config: Make) -> None:
    setup = prepare(config(n_label_iters=2))
    torch.manual_seed(0)
    model, graph = Recorder(setup.config, 8 + 3, 3), setup.graph
    training_step(model, torch.optim.RMSprop(model.parameters()), setup)
    (shown, *_), *filled = model.seen
    assert [grad for _, grad, _ in model.seen] == [False, False, True] and all(mode for *_, mode in model.seen)
    rows = shown.sum(dim=1)
    assert set(rows.tolist()) == {0.0, 1.0} and not rows[~graph.train].any()
    hidden = rows == 0
    assert 0 < int((hidden & graph.train).sum()) < int(graph.train.sum())
    for labels, *_ in filled:
        assert torch.equal(labels[~hidden], shown[~hidden])
        torch.testing.assert_close(labels[hidden].sum(dim=1), torch.ones(int(hidden.sum())))  # predictions
    model.seen = []
    metrics, logits = evaluate(model, setup)
    first, *rest = (labels for labels, *_ in model.seen)
    assert len(rest) == 2 and not any(mode for *_, mode in model.seen)
    assert torch.equal(first[graph.train].argmax(dim=1), graph.y[graph.train]) and not first[~graph.train].any()
    right = (logits.argmax(dim=1) == graph.y)[graph.test].double().mean()
    assert metrics["test_accuracy"] == float(right)


def test_an_epoch_is_four_forward_passes(config: Make) -> None:
    setup = prepare(config())
    model = Recorder(setup.config, 8 + 3, 3)
    training_step(model, torch.optim.RMSprop(model.parameters()), setup)
    evaluate(model, setup)
    assert [grad for _, grad, _ in model.seen] == [False, True, False, False]


@pytest.mark.parametrize("settings", [{"n_label_iters": 0}, {"use_labels": False, "n_label_iters": 0}])
def test_without_label_passes(settings: dict[str, Any], config: Make) -> None:
    train_cell(config(**settings, n_epochs=2))
    assert record(config().output_dir)["protocol"] == "ogb"


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_the_record(config: Make) -> None:
    settings = config(**DCN, n_epochs=30, probe=True)
    train_cell(settings)
    found, logged = record(settings.output_dir), lines(settings.output_dir)
    assert (found["protocol"], found["selection"]) == ("ogb", "lowest validation loss")
    best = min(logged, key=lambda line: line["validation_loss"])
    assert found["epoch"] == best["epoch"]
    assert all(best[name] == value for name, value in found["metrics"].items())
    assert found["collapse"]["layer"] == found["activity"]["layer"] == [1, 2, 3]
    assert len(found["collapse"]["effective_rank"]) == 3
    assert found["activity"]["relative_move"] == pytest.approx(best["relative_move"])
    history = found["activity_history"]
    assert history["epoch"] == list(range(31)) and len(history["off_diagonal"]) == 31
    assert history["relative_move"][best["epoch"]] == best["relative_move"]
    assert found["input_features"] == {"name": "raw", "columns": 8}
    assert found["cell"]["method"] == "D-ContraNorm s=1 tau=N/D"
    assert not (Path(settings.output_dir) / "checkpoints").exists()


def test_a_student_learns_from_its_teacher(config: Make, teacher: str, tmp_path: Path) -> None:
    settings = config(mode="student", teacher=teacher, n_layers=2)
    train_cell(settings)
    found = record(settings.output_dir)
    assert found["teacher"]["sha256"] == record(teacher)["predictions"]["sha256"]
    assert found["teacher"]["metrics"] == record(teacher)["metrics"] and found["teacher"]["method"] == "vanilla"
    assert not (Path(settings.output_dir) / FILE).exists()
    alone = config(output_dir=str(tmp_path / "alone"), mode="student", teacher=teacher, n_layers=2, alpha=0.0)
    train_cell(alone)
    labels_only = [{**line, "epoch": 0} for line in lines(alone.output_dir)]
    assert labels_only == [{**line, "epoch": 0} for line in lines(teacher)]  # alpha = 0 is the teacher's training
    assert lines(settings.output_dir) != lines(teacher)


def test_same_seed_same_numbers(config: Make, tmp_path: Path) -> None:
    found = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        train_cell(config(**DCN, output_dir=str(tmp_path / name), seed=seed))
        found.append((comparable(record(tmp_path / name)), lines(tmp_path / name)))
    assert found[0] == found[1]
    assert found[0][1] != found[2][1]


@pytest.mark.parametrize("norm", [{}, DCN, {"norm": "ContraNorm", "scale": 1.0}], ids=["vanilla", "tau=N/D", "tau=1"])
def test_reversible_or_not_training_is_the_same(norm: dict[str, Any], config: Make, tmp_path: Path) -> None:
    """In float32, over some epochs."""
    logs = []
    for reversible in (True, False):
        folder = str(tmp_path / str(reversible))
        train_cell(config(**norm, output_dir=folder, n_layers=5, reversible=reversible, n_epochs=8))
        logs.append([(line["loss"], line["validation_loss"]) for line in lines(folder)])
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-4, atol=1e-4)


# -- interruptions -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program sees it."""


@pytest.mark.parametrize("mode", ["teacher", "student"])
@pytest.mark.parametrize("moment", ["log 1", "log 8", "checkpoint 2", "finish 1"])
def test_killed_anywhere_and_started_again(
    moment: str, mode: str, config: Make, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {**DCN, "mode": mode, "teacher": teacher if mode == "student" else None, "n_epochs": 10}
    whole, broken = (
        config(**common, output_dir=str(tmp_path / name), checkpoint_every=3) for name in ("whole", "broken")
    )
    train_cell(whole)
    method, number = moment.split()
    original, calls = getattr(Run, method), [0]

    def dies(self: Run, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
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
    if mode == "teacher":
        assert (tmp_path / "broken" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_changed_teacher_is_noticed_when_a_student_resumes(
    config: Make, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = config(mode="student", teacher=teacher, n_epochs=4, checkpoint_every=1)

    def dies(self: Run, *args: Any, **kwargs: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", dies)
        with pytest.raises(Killed):
            train_cell(student)
    (Path(teacher) / "record.json").unlink()
    os.rename(teacher, teacher + "-old")
    train_cell(config(output_dir=teacher, n_layers=2, n_epochs=3))
    with pytest.raises(UserError, match="not the predictions with which"):
        train_cell(student)


@pytest.mark.slow
def test_signals_in_real_processes(python: str, data_root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """SIGKILL, then SIGTERM, then the same command, on Cora: the record of an undisturbed run; teacher and student."""
    monkeypatch.undo()

    def command(folder: Path, *more: str) -> list[str]:
        line = f"-m gnn.arxiv --data cora --n_hidden 8 --n_epochs 12 --checkpoint_every 2 --data_root {data_root}"
        return [python, *line.split(), "--output_dir", str(folder), *more]

    def start(argv: list[str], folder: Path, epochs: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while not ((log := folder / "metrics.jsonl").exists() and log.read_text().count("\n") >= epochs):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        return process

    subprocess.run(command(tmp_path / "teacher-whole"), check=True, capture_output=True)
    student = ("--mode", "student", "--teacher", str(tmp_path / "teacher-whole"))
    subprocess.run(command(tmp_path / "student-whole", *student), check=True, capture_output=True)
    for name, more in (("teacher", ()), ("student", student)):
        folder = tmp_path / name
        first = start(command(folder, *more), folder, 3)
        first.kill()
        first.communicate()
        second = start(command(folder, *more), folder, 6)
        second.send_signal(signal.SIGTERM)
        assert second.communicate()[1] and second.returncode == 128 + signal.SIGTERM
        main(command(folder, *more)[3:])
        assert comparable(record(folder)) == comparable(record(tmp_path / f"{name}-whole"))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"data": "dblp"}, "trained with --data cora, this run has dblp"), ({"seed": 3}, "--seed 0, this run has 3")],
)
def test_a_teacher_of_other_data_or_another_seed(
    settings: dict[str, Any], message: str, config: Make, teacher: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_cell(config(mode="student", teacher=teacher, **settings))
    assert not Path(config().output_dir).exists()


def test_a_teacher_of_other_features(config: Make, teacher: str) -> None:
    """GIANT's student is named after its own features, and set beside published numbers."""
    path = Path(teacher) / "record.json"
    found = record(teacher)
    path.write_text(json.dumps({**found, "config": {**found["config"], "features": "giant"}}))
    with pytest.raises(UserError, match="trained with --features giant, this run has raw"):
        train_cell(config(mode="student", teacher=teacher))


def test_teachers_that_are_none(config: Make, teacher: str, tmp_path: Path) -> None:
    def refuse(folder: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            prepare(config(mode="student", teacher=folder))
        assert "\n" not in str(caught.value)

    refuse(str(tmp_path), "no finished teacher")
    student = config(output_dir=str(tmp_path / "student"), mode="student", teacher=teacher, n_epochs=1)
    train_cell(student)
    refuse(student.output_dir, "not that of a teacher")
    predictions = Path(teacher) / FILE
    whole = predictions.read_bytes()
    predictions.write_bytes(whole[:-1] + b"x")
    refuse(teacher, "not what the record says")
    predictions.unlink()
    refuse(teacher, f"{FILE} is missing")
    predictions.write_bytes(whole)
    (Path(teacher) / "record.json").write_text("{}")
    refuse(teacher, "not that of a teacher")


def test_a_loss_that_is_no_number_ends_the_run(config: Make) -> None:
    with pytest.raises(UserError, match="smaller --lr"):
        train_cell(config(lr=1e20, n_epochs=60))


# -- the figure --------------------------------------------------------------------------------------------------------


def test_activity_over_training_is_drawn_and_listed(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        train_cell(config(**DCN, output_dir=str(tmp_path / "runs" / str(seed)), seed=seed, n_epochs=2))
    output = tmp_path / "figures" / "activity.png"
    activity.main(["--records", str(tmp_path / "runs"), "--output", str(output)])
    assert output.stat().st_size > 1000
    capsys.readouterr()
    activity.main(["--records", str(tmp_path / "runs")])
    header, _, *rows = capsys.readouterr().out.splitlines()[2:]
    moves = [json.loads((tmp_path / "runs" / s / "record.json").read_text())["activity_history"] for s in "01"]
    assert "at initialization" in header and len(rows) == len(moves[0]["relative_move"][0])
    first = sum(move["relative_move"][0][0] for move in moves) / 2
    assert rows[0].split("|")[5:7] == [" 2    ", f" {first:.1g}".ljust(len(header.split("|")[6]))]
    train_cell(config(**DCN, output_dir=str(tmp_path / "runs" / "2"), seed=2, n_epochs=3))
    with pytest.raises(UserError, match="runs of different length"):
        activity.main(["--records", str(tmp_path / "runs")])
    with pytest.raises(UserError, match="no student with D-ContraNorm"):
        activity.main(["--records", str(tmp_path / "runs"), "--output", str(output), "--mode", "student"])


def test_features_are_sparse_where_that_pays(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(prepare(config()).features, torch.Tensor)
    original = training.load

    def mostly_zero(settings: Config) -> Any:
        graph = original(settings)
        graph.x = graph.x * (graph.x > 2)
        return graph

    monkeypatch.setattr(training, "load", mostly_zero)
    assert not isinstance(prepare(config()).features, torch.Tensor)
    train_cell(config(n_epochs=1))
