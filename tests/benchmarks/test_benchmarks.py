"""The benchmark programs measure what they say."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from scipy import stats

from benchmarks import common, flags, layer, table, training_step
from benchmarks.approximations import nystrom, random_features
from contranorm import contra_norm
from repro.errors import UserError


def test_layer_measures_every_implementation_and_checks_goals(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer, "SHAPES", {"cora": layer.Shape((120, 8), 500), "bert": layer.Shape((2, 20, 8))})
    path = tmp_path / "out" / "layer.json"
    layer.main(["--only", "cora,bert", "--rounds", "3", "--json", str(path)])
    content = json.loads(path.read_text())
    measured = {(row["shape"], row["implementation"]) for row in content["rows"]}
    assert measured >= {("cora", n) for n in ("plain", "blocked", "linear-1", "linear-2")} | {("bert", "sdpa")}
    for row in content["rows"]:
        assert row["ms"] > 0 and row["output error"] < (0.02 if row["implementation"] == "linear-1" else 3e-3)
        assert row["implementation"].startswith("linear") or row["output error"] < 1e-6
    assert [g["goal"] for g in content["goals"]] == ["cora: blocked against plain, times faster"]
    assert "of 1 goals met" in capsys.readouterr().out
    assert content["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    table.main(["--file", str(path)])
    header = capsys.readouterr().out.splitlines()[0].replace(" ", "")
    assert header.startswith("|shape|implementation|ms|")


def test_every_comparison_keeps_to_one_device(monkeypatch):
    """The meta device in the place of a GPU: tensors of two devices do not go together there either."""
    monkeypatch.setattr(layer, "DEVICE", "meta")
    monkeypatch.setattr(layer, "alternate_ms", lambda runs, **_: {name: (run(), 1.0)[1] for name, run in runs.items()})
    monkeypatch.setattr(layer, "SHAPES", {"cora": layer.Shape((120, 8), 500)})
    assert len(layer.compare_sizes("blocked", "TILE", ("cora",), (32, 64))) == 2
    assert layer.find_crossover() and layer.measure_growth()[0]


def test_unknown_shapes_are_named():
    with pytest.raises(UserError, match="there are cora"):
        layer.main(["--only", "pubmed"])
    with pytest.raises(UserError, match="no such file"):
        table.main(["--file", "nowhere.json"])


def test_peak_memory_is_seen_and_freed_memory_is_not_added_up():
    def touch() -> None:
        for _ in range(3):
            torch.ones(16, 2**20).sum()  # 64 MiB each, one after the other

    assert 50 < common.peak_extra_mb(touch) < 120


def test_a_measured_process_that_dies_is_an_error():
    def die() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="exit code 3"):
        common.peak_extra_mb(die)


@pytest.mark.parametrize(("value", "at_least", "met"), [(5.0, True, True), (4.9, True, False), (5.1, False, False)])
def test_goals(value, at_least, met):
    assert common.goal("g", value, 5.0, at_least=at_least)["met"] is met


def test_random_graphs_have_loops_and_the_asked_number_of_edges():
    for directed in (False, True):
        dense = layer.random_graph(500, 3000, directed).to_dense()
        assert (dense.diagonal() == 1).all()
        assert 2800 <= int((dense != 0).sum()) <= 3000
        assert torch.equal(dense, dense.T) != directed


def test_choices_are_where_blocked_stays_faster(monkeypatch, tmp_path):
    path = tmp_path / "choices.json"
    path.write_text('{"blocked_from": {"graph": 1, "set": 1}}')
    monkeypatch.setattr(layer.kernels, "__file__", str(tmp_path / "__init__.py"))
    times = {"graph": {64: 0.5, 128: 1.2, 256: 0.9, 512: 1.5, 1024: 2.0}, "set": {64: 0.1, 128: 0.2}}
    layer.update_choices([{"form": f, "N": n, "times other": t} for f in times for n, t in times[f].items()])
    assert json.loads(path.read_text())["blocked_from"] == {"graph": 512, "set": 256}
    with pytest.raises(UserError, match="--update belongs to --crossover"):
        layer.main(["--update"])


@pytest.mark.parametrize("approximation", [random_features, nystrom])
def test_other_approximations_come_closer_with_their_size(approximation):
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()
    exact = x - contra_norm(x, 1.0, implementation="plain")
    errors = [float((approximation(x, count) - exact).norm() / exact.norm()) for count in (8, 64, 256)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.1


def test_approximations_are_compared(monkeypatch):
    monkeypatch.setattr(layer, "COMPARED", (300, 8))
    rows = layer.compare_approximations(rounds=1)
    assert len(rows) == 8 and all(row["ms"] > 0 and 0 < row["output error"] < 0.5 for row in rows)


def test_flags_are_compared_with_the_runs_that_have_none():
    def run(seed: int, accuracy: float, **flags: object) -> dict[str, object]:
        config = {"implementation": "plain", "degree": 2, "eval_every": 1, **flags}
        return {"experiment": "gnn", "seed": seed, "metrics": {"test_accuracy": accuracy}, "config": config}

    off = [run(seed, 0.7 + seed / 100) for seed in range(3)]
    same = [run(seed, 0.7 + seed / 100, implementation="blocked") for seed in range(3)]
    unread = [run(seed, 0.7 + seed / 100, eval_every=None) for seed in range(3)]
    other = [run(seed, 0.8, implementation="linear", degree=1) for seed in range(3)]
    lines = flags.compare(off + same + unread + other)
    assert [line["flags"] for line in lines] == [
        "all off", "eval_every=off", "implementation=blocked", "implementation=linear, degree=1"
    ]  # fmt: skip
    assert [line.get("difference") for line in lines] == [None, "+0.00", "+0.00", "+9.00"]
    assert [line.get("runs with the very same metric") for line in lines] == [None, "3 of 3", "3 of 3", "0 of 3"]
    assert lines[0]["mean ± std (n), %"] == "71.00 ± 1.00 (3)"
    pairs = stats.ttest_rel([0.8] * 3, [0.70, 0.71, 0.72]).pvalue
    assert float(lines[3]["p (Holm)"]) == pytest.approx(pairs, rel=0.05)  # the others have no spread, and do not count
    assert lines[1]["p (Holm)"] is None
    with pytest.raises(UserError, match="every speed flag off"):
        flags.compare(same)


def test_variants_are_measured_beside_vanilla(monkeypatch, tmp_path):
    monkeypatch.setattr(training_step, "has_bfloat16", lambda: False)
    monkeypatch.setattr(training_step, "IMAGE", 32)
    create = timm.create_model
    monkeypatch.setattr(training_step.timm, "create_model", lambda name, **settings: create(
        name, **settings, depth=2, embed_dim=12, img_size=32))  # fmt: skip
    path = tmp_path / "variants.json"
    training_step.main(["--only", "variants", "--batch", "2", "--rounds", "1", "--json", str(path)])
    content = json.loads(path.read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == ["vanilla", "contranorm", *training_step.VARIANTS]
    plain = rows["vanilla"]
    assert rows["attn_scale"]["parameters"] - plain["parameters"] == 2 * 3  # one per head
    assert rows["feat_scale"]["parameters"] - plain["parameters"] == 2 * 2 * 12
    assert rows["neutreno"]["parameters"] == plain["parameters"]
    assert rows["gfsa"]["GMAC an image"] > plain["GMAC an image"] == rows["attn_scale"]["GMAC an image"]
    assert {goal["target"] for goal in content["goals"]} == {"≤ 1.05", "≤ 1.15"} and len(content["goals"]) == 5
