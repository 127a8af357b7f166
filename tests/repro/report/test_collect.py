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


def test_a_run_s_curve_is_packed_thinned_with_its_first_and_last_epoch(tmp_path: Path) -> None:
    record = {"experiment": "gnn", "protocol": "p", "selection": "s", "metrics": {"m": 1}, "seed": 0, "config": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    lines = [
        {"epoch": n, "loss": 1 / n, "note": "text"} | ({"accuracy": 0.5} if n == 100 else {}) for n in range(1, 101)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "records.jsonl"
    collect.main(["--records", str(tmp_path / "run"), "--output", str(output)])
    curve = json.loads(output.read_text())["curve"]
    assert set(curve) == {"epoch", "loss", "accuracy"} and len(curve["epoch"]) == 40
    assert curve["epoch"][0] == 1 and curve["epoch"][-1] == 100 and curve["loss"][-1] == 0.01
    assert curve["accuracy"][-1] == 0.5 and curve["accuracy"][0] is None
    again = tmp_path / "again.jsonl"
    collect.main(["--records", str(output), "--output", str(again)])
    assert again.read_text() == output.read_text()
