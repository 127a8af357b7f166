"""Trackers beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from repro.errors import UserError
from repro.run.run import Run


class Heard:
    """A tracker that remembers."""

    requires_logging_directory = True
    calls: list[Any] = []

    def __init__(self, project: str, folder: str) -> None:
        self.calls.append(("open", project, folder))

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values["steps"]))

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self.calls.append(("log", values["loss"], step))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_lines_reach_the_trackers(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["heard"])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "heard", Heard)
    config = tiny.Config(str(tmp_path), steps=7)
    with Run(config.output_dir, "tiny", config, report_to="heard") as run:
        run.log({"epoch": 3, "loss": 0.5})
    assert Heard.calls == [("open", "tiny", str(tmp_path)), ("config", 7), ("log", 0.5, 3), ("finish",)]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 3, "loss": 0.5}\n'


def test_an_absent_tracker_is_told(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    config = tiny.Config(str(tmp_path / "run"), steps=7)
    with pytest.raises(UserError, match="--report_to wandb: not installed"):
        Run(config.output_dir, "tiny", config, report_to="wandb")
    assert not (tmp_path / "run").exists()
