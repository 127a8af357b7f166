"""Many records in one file say what they said apart."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from repro.errors import UserError
from repro.report import collect
from repro.report.records import load_records


def test_one_file_reads_like_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "bac":
        record = {"experiment": "gnn", "protocol": "p", "selection": "s", "metrics": {"m": ord(name)}, "seed": 0}
        record |= {"config": {"seed": 0, "data": name}, "command": f"python {name}"}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "record.json").write_text(json.dumps(record))
    output = tmp_path / "new" / "records.jsonl"
    collect.main(["--records", str(tmp_path / "runs"), "--output", str(output)])
    assert "3 records" in capsys.readouterr().out
    assert [json.loads(line)["command"] for line in output.read_text().splitlines()] == [f"python {n}" for n in "abc"]
    assert all("cell" not in line for line in output.read_text().splitlines())  # packed as they were written
    apart, together = (load_records(place).drop(columns="path") for place in (tmp_path / "runs", output))
    pd.testing.assert_frame_equal(together, apart.sort_values("config.data", ignore_index=True), check_like=True)


def test_nothing_to_gather_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record.json"):
        collect.main(["--records", str(tmp_path), "--output", str(tmp_path / "records.jsonl")])
    assert not (tmp_path / "records.jsonl").exists()
