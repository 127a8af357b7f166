"""The table of what a run survives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import reliability
from repro.errors import UserError


def test_the_figures_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"one of two processes killed": {"seconds until the other ended": 3.5}}))
    reliability.main(["--figures", str(path)])
    assert "| one of two processes under torchrun killed | the other ended after 3.5 s" in capsys.readouterr().out
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a file of reliability figures"):
        reliability.main(["--figures", str(path)])


def test_every_kind_of_kill_is_named() -> None:
    kinds = {"of_the_sweep": 2, "of_a_cell": 3, "of_a_server": 1, "of_everything": 4}
    outcome = dict.fromkeys(("lost", "run_again_after_record", "differing_records"), 0)
    ((done, _),) = reliability.rows({"kills": {"kills": 10, "cells": 12} | kinds | outcome})
    assert done.endswith("(2 of the sweep, 3 of a cell, 1 of a server, 4 of everything)")
