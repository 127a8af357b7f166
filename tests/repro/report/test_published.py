"""Numbers from elsewhere: each has a source, each is a fraction, and what the file may hold is checked."""

from __future__ import annotations

import pytest
import yaml

from repro.errors import UserError
from repro.report.published import KINDS, PAPER, Entry, load_entries

ENTRY = {
    "table": "t", "kind": "published", "source": "s", "match": {"data": "cora"}, "metric": "test_accuracy", "mean": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("entry", load_entries(), ids=lambda e: f"{e.table}-{e.match}")
def test_every_number_of_the_paper_has_a_source(entry):
    assert entry.kind in KINDS and len(entry.source) > 20 and 0 < entry.mean < 1
    assert entry.source in yaml.safe_load(PAPER.read_text())["sources"].values()
    assert (entry.std is None) or 0 < entry.std < 0.2
    if entry.kind == "reference-run":
        assert entry.n and entry.std is not None and entry.match["protocol"]
    else:
        assert entry.what


def test_every_source_is_used_and_no_cell_is_there_twice():
    entries = load_entries()
    assert {e.source for e in entries} == set(yaml.safe_load(PAPER.read_text())["sources"].values())
    cells = [(e.kind, e.metric, tuple(sorted(map(str, e.match.items())))) for e in entries]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"source": "nobody"}, "source 'nobody' is not listed"),
        ({"source": None}, "source None is not listed"),
        ({"kind": "hearsay"}, "kind 'hearsay'"),
        ({"mean": 81.7}, "mean 81.7 is no fraction"),
        ({"mean": "0.5"}, "mean '0.5' is no fraction"),
        ({"mean": True}, "mean True is no fraction"),
        ({"std": -0.1}, "std -0.1 is no fraction"),
        ({"n": 0}, "n 0 is no number of runs"),
        ({"match": {}}, "match must name"),
        ({"colour": "red"}, "unknown keys"),
    ],
)
def test_a_wrong_entry_is_named_by_its_number(tmp_path, change, told):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"sources": {"s": "somewhere"}, "entries": [ENTRY, ENTRY | change]}))
    with pytest.raises(UserError, match="entry 2") as refused:
        load_entries(path)
    assert told in str(refused.value)


@pytest.mark.parametrize("content", [[], {"entries": []}, {"sources": {}, "entries": [], "more": 1}, None])
def test_a_file_of_another_form_is_refused(tmp_path, content):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="must hold the keys sources and entries"):
        load_entries(path)


@pytest.mark.parametrize("missing", ["table", "metric", "mean", "match"])
def test_a_missing_key_is_named(tmp_path, missing):
    path = tmp_path / "p.yaml"
    entry = {k: v for k, v in ENTRY.items() if k != missing}
    path.write_text(yaml.safe_dump({"sources": {"s": "somewhere"}, "entries": [entry]}))
    with pytest.raises(UserError, match=missing):
        load_entries(path)


def test_a_number_belongs_to_a_cell_only_when_all_its_fields_agree():
    entry = Entry("t", "published", "s", {"data": "cora", "norm_scale": 1.0, "flag": True}, "test_accuracy", 0.5)
    cell = {"data": "cora", "norm_scale": 1, "flag": True, "more": 3}
    assert entry.fits(cell, "test_accuracy")
    assert not entry.fits(cell, "val_accuracy")
    for change in ({"data": "dblp"}, {"norm_scale": 0.9}, {"flag": False}, {"flag": None}):
        assert not entry.fits(cell | change, "test_accuracy")
    assert not entry.fits({"data": "cora"}, "test_accuracy")
