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
