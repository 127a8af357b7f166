"""The benchmark of self-supervised training measures what it says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ssl
from contranorm import spectral_filter
from repro.errors import UserError


def test_every_part_is_measured_against_its_plain_form(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ssl, "BANK_ROWS", 2_000)
    path = tmp_path / "ssl.json"
    ssl.main(["--only", "augment,filter,bank,memory", "--rounds", "1", "--images", "8", "--json", str(path)])
    content = json.loads(path.read_text())
    assert {row["part"] for row in content["rows"]} == {"augment", "filter", "bank", "memory"}
    assert all(row["ms"] > 0 for row in content["rows"] if row["part"] != "memory")
    assert all(row["extra MiB"] > 0 for row in content["rows"] if row["part"] == "memory")
    assert {goal["goal"].split(",")[0] for goal in content["goals"]} == {
        "augment",
        "filter",
    }  # the bank's is for 256 rows
    assert "goals met" in capsys.readouterr().out


def test_the_share_of_a_step_and_of_arcl(monkeypatch):
    config = ssl.Config(rounds=1, images=8)
    monkeypatch.setattr(ssl, "STEPS", {"simsiam_multi": ssl.STEPS["simsiam_multi"]})
    (row,) = [row for rows in ssl.step(config) for row in rows]
    assert row["case"] == "simsiam_multi" and 0 <= row["share outside"] < 1
    rows = [row for rows in ssl.arcl(config) for row in rows]
    assert {row["case"] for row in rows} == {"4 views", "8 views"} and len(rows) == 4
    named = [ssl.check_goals([row, *rows])[i]["goal"] for i in range(2)]
    assert named == ["arcl, 8 views: times faster", "step: largest share outside the network"]


def test_both_ways_to_whiten_agree():
    z = torch.randn(16, 40, dtype=torch.float64)
    torch.testing.assert_close(ssl.whitened_by_svd(z), spectral_filter(z, "poly", -1, location="target"))


def test_an_unknown_part_is_named():
    with pytest.raises(UserError, match="unknown name 'banks'"):
        ssl.main(["--only", "banks"])
