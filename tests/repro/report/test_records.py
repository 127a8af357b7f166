"""Records are read back as they were written, and what is no record is named."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.config import CellLabel, RunConfig
from repro.errors import UserError
from repro.report import figures
from repro.report.records import comparable, find_records, load_records
from repro.run.run import Run

PARTS = '{"experiment": 1, "protocol": 1, "selection": 1, '
NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**53), 2**53)


@dataclass(kw_only=True)
class Config(RunConfig):
    rate: float
    name: str
    scale: float | None

    def label(self) -> CellLabel:
        return CellLabel(data="d", model="m", method="vanilla")


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.text("abcdefgh_", min_size=1), NUMBERS, min_size=1, max_size=4),
    st.builds(
        Config, output_dir=st.just("o"), seed=st.integers(0, 2**32), rate=st.floats(allow_nan=False),
        name=st.text(st.characters(exclude_categories=["C"])), scale=st.none() | st.floats(0, 1),
    ),
)  # fmt: skip
def test_what_a_run_writes_is_read_back(metrics, config):
    with tempfile.TemporaryDirectory() as folder:
        with Run(folder, "test", config) as run:
            run.finish({k: np.float64(v) for k, v in metrics.items()}, protocol="p", selection="s", parameters=7)
        (row,) = load_records(folder).to_dict("records")
    for name, value in metrics.items():
        read = row[f"metrics.{name}"]
        assert read == float(value) or (math.isnan(read) and math.isnan(value))
    # A config's field has its own name, but where every record has a column of that name.
    assert {name: row[name] for name in ("config.seed", "rate", "name", "config.scale")} == {
        "config.seed": config.seed, "rate": config.rate, "name": config.name, "config.scale": config.scale,
    }  # fmt: skip
    assert row["seed"] == config.seed and row["scale"] is None
    assert (row["experiment"], row["protocol"], row["selection"], row["parameters"]) == ("test", "p", "s", 7)


def test_folders_files_lines_and_patterns(write_records, tmp_path):
    folder = Path(write_records([0.1, 0.2], data="cora"))
    records = sorted(folder.rglob("record.json"))
    (tmp_path / "all").mkdir()
    lines = [json.dumps(json.loads(p.read_text())) for p in records]
    (tmp_path / "all" / "records.jsonl").write_text("\n".join(lines) + "\n\n")
    for place in (
        folder,
        str(folder),
        tmp_path / "all",
        tmp_path / "all" / "records.jsonl",
        str(folder / "*" / "*.json"),
    ):
        frame = load_records(place)
        assert sorted(frame["metrics.test_accuracy"]) == [0.1, 0.2], place
    assert len(load_records([folder, records[0], str(folder)])) == 2  # each file once
    assert load_records(tmp_path / "all")["path"][1].endswith("records.jsonl:2")
    assert find_records([records[1], records[0]]) == [records[1], records[0]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"metrics"', "damaged record"),
        ("[]", "not a run's record"),
        ("{}", "experiment, protocol, selection, metrics, config missing"),
        (PARTS + '"metrics": 3, "config": {}}', "metrics is no mapping"),
        (PARTS + '"metrics": {}, "config": {}, "cell": "vanilla"}', "cell is no mapping"),
        (PARTS + '"metrics": {}, "config": {}, "cell": {"order": 3}}', "order is no list"),
        (PARTS + '"metrics": {}, "config": {}, "curve": {"loss": [1]}}', "curve has no epoch"),
        (PARTS + '"metrics": {}, "config": {}, "curve": {"epoch": [1, 2], "loss": [1]}}', "lists of one length"),
        (PARTS + '"metrics": {}, "config": {}, "collapse": {"layer": [1], "variance": 1}}', "lists of one length"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, text, told):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=told) as refused:
        load_records(tmp_path)
    assert str(path) in str(refused.value)


def test_a_damaged_line_is_named_by_its_number(write_records, tmp_path):
    (path,) = Path(write_records([0.1])).rglob("record.json")
    whole = json.dumps(json.loads(path.read_text()))
    (tmp_path / "records.jsonl").write_text(f"{whole}\n{whole[:40]}\n")
    with pytest.raises(UserError, match=r"records\.jsonl:2: damaged"):
        load_records(tmp_path / "records.jsonl")


def test_nothing_there_and_no_text_are_told(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", str(tmp_path / "*.jsonl")):
        with pytest.raises(UserError, match=r"no record\.json or records\.jsonl there"):
            load_records(place)
    (tmp_path / "record.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_records(tmp_path)


def test_comparable_leaves_out_times_and_places_only(write_records):
    first, second = (
        json.loads(next(Path(write_records([v], folder=f, data="cora")).rglob("record.json")).read_text())
        for f, v in (("a", 0.5), ("b", 0.5))
    )
    second |= {"seconds": 9.0, "command": "other", "environment": {"device": "x"}, "peak_rss_mb": 2.0}
    assert first != second and comparable(first) == comparable(second)
    for change in ({"metrics": {"test_accuracy": 0.6}}, {"protocol": "q"}, {"seed": 1}, {"config": {"data": "dblp"}}):
        assert comparable(first | change) != comparable(first)


def test_what_a_probe_says_of_the_last_layer(write_records):
    """Four equal singular values of five hold 80 %, all five 90 %; one that is alone holds everything."""
    extra = {
        "collapse": {"layer": [1, 2], "mean_cosine": [0.1, 0.2], "variance": [1.0, "nan"]},
        "spectrum": [0.2] * 5,
        "spectrum_untrained": [1.0, 0.0, 0.0],
    }
    (row,) = load_records(write_records([0.5], extra=extra)).to_dict("records")
    assert row["metrics.mean_cosine"] == 0.2 and math.isnan(row["metrics.variance"])
    assert row["metrics.dimensions"] == 5 and row["metrics.dimensions_untrained"] == 1
    extra = {"spectrum": ["nan"] * 4, "spectrum_untrained": [0.0] * 4}
    (row,) = load_records(write_records([0.5], folder="unknown", extra=extra)).to_dict("records")
    assert not any("dimensions" in name for name in row)


def test_records_of_no_seed_and_of_no_hidden_layer_are_read(write_records):
    """A probe of a network of one layer finds nothing to measure."""
    extra = {"seed": None, "collapse": {"layer": [], "variance": []}, "spectrum": []}
    folder = write_records([0.5], extra=extra)
    (path,) = Path(folder).rglob("record.json")
    record = json.loads(path.read_text())
    del record["seed"]
    path.write_text(json.dumps(record))
    (row,) = load_records(folder).to_dict("records")
    assert row["seed"] is None and "metrics.variance" not in row
    with pytest.raises(UserError, match="no record holds spectrum"):
        figures.main(["--records", folder, "--kind", "spectrum", "--output", "x.svg"])
