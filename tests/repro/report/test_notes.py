"""What tables say of methods: by name, with the run's settings, and each note with its source."""

from __future__ import annotations

import pytest

from repro.errors import UserError
from repro.report.notes import load_notes, notes_of
from repro.report.records import load_records

SETTINGS = {"hid": 48, "epochs": 7, "conv_wd": None}


def test_notes_go_by_the_parts_of_a_name():
    (first, second) = notes_of("gnn", "GCNII (symmetric)", SETTINGS)
    assert "here 48 columns, 7 epochs without patience, none on the convolutions (chennnM/GCNII@" in first
    assert "D^-1 (A+I)" in second
    assert any("lambda is a setting" in note for note in notes_of("gnn", "DGN + LayerNorm", SETTINGS))
    assert notes_of("gnn", "vanilla + LayerNorm", SETTINGS) == [] == notes_of("BERT_glue", "GCNII", SETTINGS)


def test_a_record_that_says_so_itself_is_believed(write_records):
    own = {"data": "cora", "extra": {"experiment": "gnn"}, "family": "G2", "epochs": 7}
    frame = load_records(write_records([0.5], method="G2 p=2", note="G2: as it was run", **own))
    assert frame["note"].tolist() == ["G2: as it was run"]
    frame = load_records(write_records([0.5], folder="old", method="G2 p=2", **own))
    assert "here 7 epochs without patience" in frame["note"].iloc[0]


def test_a_damaged_file_of_notes_is_refused(tmp_path):
    path = tmp_path / "methods.yaml"
    path.write_text("- {experiment: gnn, methods: [G2], text: wrong key}")
    with pytest.raises(UserError, match="entry 1 must hold experiment, methods and note"):
        load_notes(path)
