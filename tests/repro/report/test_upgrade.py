"""Records of schema 1 read as schema 2, with the numbers that they hold."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path

import pytest

from repro.errors import UserError
from repro.report.cells import aggregate
from repro.report.records import iterate_records, load_records
from repro.report.upgrade import SCHEMA, upgrade

ROOT = Path(__file__).resolve().parents[3]
COMMITTED = sorted([*(ROOT / "results").rglob("record.json"), *(ROOT / "results").rglob("records.jsonl")])


def record(experiment="gnn", **parts):
    config = {"seed": 1, "output_dir": "r/x/seed1", **parts.pop("config", {})}
    return {"schema": 1, "experiment": experiment, "protocol": "p", "selection": "s", "metrics": {"m": 0.5}, "seed": 1,
            "config": config, **parts}  # fmt: skip


def test_the_schema_is_that_of_what_a_run_writes():
    from repro.run import run

    assert run.SCHEMA == SCHEMA
    new = record() | {"schema": SCHEMA}
    assert upgrade(new | {"experiment": "other"}, "here") == new | {"experiment": "other"}
    # A setting that came after the record has the value that it stood for; one that the record names stays.
    read = upgrade(new | {"config": new["config"] | {"nhead": 4}}, "here")
    assert read["config"]["fea_norm"] is True and read["config"]["nhead"] == 4
    assert {**read, "config": 0} == {**new, "config": 0} and "fea_norm" not in new["config"]
    for schema in (SCHEMA + 1, 0, "1", None):
        with pytest.raises(UserError, match=r"here:3: record of schema .*: update the checkout") as refused:
            upgrade(record() | {"schema": schema}, "here:3")
        assert "\n" not in str(refused.value)


GNN = {
    "data": "cora",
    "model": "DeepGCN",
    "nlayer": 8,
    "norm_mode": "None",
    "norm_scale": None,
    "use_layer_norm": False,
}


@pytest.mark.parametrize(
    ("config", "method", "order", "scale"),
    [
        ({}, "vanilla", [0, 0, 0, 0], None),
        ({"use_layer_norm": True}, "vanilla + LayerNorm", [0, 0, 0, 1], None),
        ({"norm_mode": "LN"}, "LN", [1, 0, 0, 0], None),
        ({"norm_mode": "PN-SI"}, "PN-SI", [3, 0, 1.0, 0], 1.0),
        ({"norm_mode": "PN-SI", "norm_scale": 1.0}, "PN-SI", [3, 0, 1.0, 0], 1.0),
        ({"norm_mode": "PN-SI", "norm_scale": 5.0, "use_layer_norm": True}, "PN-SI s=5 + LayerNorm", [3, 0, 5, 1], 5),
        ({"norm_mode": "BatchNorm"}, "BatchNorm", [5, 0, 0, 0], None),
        ({"norm_mode": "CN", "norm_scale": 1.0}, "ContraNorm s=1", [10, 0, 1, 0], 1),
        ({"norm_mode": "CN", "norm_scale": 2, "use_layer_norm": True}, "ContraNorm s=2 + LayerNorm", [10, 0, 2, 1], 2),
        ({"norm_mode": "CN", "norm_scale": 0.5, "identity": False}, "ContraNorm (Eq. 6) s=0.5", [10, 1, 0.5, 0], 0.5),
    ],
)  # fmt: skip
def test_cells_of_graph_runs(config, method, order, scale):
    new = upgrade(record(config=GNN | config), "")
    assert new["cell"] == {
        "data": "cora", "model": "DeepGCN", "method": method, "order": order, "depth": 8, "scale": scale,
    }  # fmt: skip
    contranorm = (GNN | config)["norm_mode"] == "CN"  # other norms have no form, and PairNorm's scale starts at 1
    assert new["config"]["identity"] is (config.get("identity", True) if contranorm else None)
    assert new["config"]["scale"] == scale and "norm_scale" not in new["config"]
    assert "implementation" in new["execution_fields"] and new["schema"] == 2


BERT = {"model_name_or_path": "/m/minilm", "task_name": "rte", "scale": 0.01, "use_v2": False, "identity": None}


@pytest.mark.parametrize(
    ("config", "sites", "method", "order"),
    [
        ({"scale": None}, [], "vanilla", [0]),
        ({}, [], "vanilla", [0]),
        ({}, ["attention_sum"], "ContraNorm s=0.01", [1, 0.01, 3]),
        ({}, ["ffn_sum"], "ContraNorm s=0.01 at ffn_sum", [1, 0.01, 6]),
        ({}, ["attention_sum", "ffn_sum"], "ContraNorm s=0.01 at attention_sum+ffn_sum", [1, 0.01, 3]),
        ({"use_v2": True, "num_hidden_layers": 2}, ["attention_sum"], "D-ContraNorm s=0.01", [1, 0.01, 3]),
    ],
)
def test_cells_of_glue_runs(config, sites, method, order):
    layers = {f"bert.encoder.layer.{n}": sites for n in (0, 1)} if sites else {}
    old = record("BERT_glue", config=BERT | config, sites=layers, task="rte", model="minilm", norm="ContraNorm")
    new = upgrade(old, "")
    assert new["cell"] == {
        "data": "rte", "model": "minilm", "method": method, "order": order, "depth": config.get("num_hidden_layers"),
        "scale": 0.01 if sites else None,
    }  # fmt: skip
    assert new["config"]["axis"] == ("features" if config.get("use_v2") else "tokens")
    assert new["config"]["identity"] is True and not {"task", "model", "norm"} & set(new)
    own = BERT | {"model_name_or_path": "albert-base-v2", "task_name": None, "validation_file": "a/own.csv"}
    new = upgrade(record("BERT_glue", config=own), "")
    assert new["cell"]["data"] == "own" and new["config"]["identity"] is False


def test_cells_of_image_runs_and_their_collapse():
    config = {"data_set": "CIFAR10", "model": "deit", "depth": 6, "norm": "contra", "scale": 0.1, "temp": 1.0}
    config |= {"dual_norm": True}
    collapse = [{"layer": n, "module": f"blocks.{n}", "mean_cosine": n / 10, "variance": 1.0} for n in (0, 1)]
    old = record("ViT_imagenet", config=config, collapse=collapse)
    before = copy.deepcopy(old)
    new = upgrade(old, "")
    assert old == before
    cell = {
        "data": "CIFAR10",
        "model": "deit",
        "method": "ContraNorm s=0.1",
        "order": [1, 0.1],
        "depth": 6,
        "scale": 0.1,
    }
    assert new["cell"] == cell
    assert new["collapse"] == {"layer": [1, 2], "mean_cosine": [0.0, 0.1], "variance": [1.0, 1.0]}
    assert {"tau": 1.0, "symmetric": True, "identity": False}.items() <= new["config"].items()
    assert not {"temp", "dual_norm"} & set(new["config"])
    new = upgrade(record("ViT_imagenet", config=config | {"norm": "layer", "scale": None}), "")
    assert new["cell"] == cell | {"method": "vanilla", "order": [0], "scale": None}
    assert new["config"]["norm"] == "vanilla" and "collapse" not in new


def test_a_graph_probe_becomes_collapse():
    new = upgrade(record(config=GNN, probe={"mean_cosine": [0.5, 0.6], "variance": [1, "nan"]}), "")
    assert (
        new["collapse"] == {"layer": [1, 2], "mean_cosine": [0.5, 0.6], "variance": [1, "nan"]} and "probe" not in new
    )


@pytest.mark.parametrize("join", [" ", "="])
def test_the_command_of_several_seeds_becomes_that_of_one(join):
    command = f"python -m gnn.main --nlayer 2 --seeds{join}0,1,2 --output_dir{join}r/x"
    assert (
        upgrade(record(command=command), "")["command"]
        == f"python -m gnn.main --nlayer 2 --seed 1 --output_dir{join}r/x/seed1"
    )
    alone = "python -m BERT_glue.run_glue_no_trainer --seed 1 --output_dir r/other"
    assert upgrade(record(command=alone), "")["command"] == alone


def test_an_experiment_that_is_not_known_has_no_cell():
    new = upgrade(record("fake"), "")
    assert new["cell"] == {} and new["config"] == record("fake")["config"]


# -- every record that there is --------------------------------------------------------------------------------------

OLD_KEYS = {
    "gnn": ("data", "nlayer", "norm_mode", "norm_scale", "use_layer_norm", "identity", "implementation", "degree",
            "eval_every"),
    "BERT_glue": ("task_name", "scale", "sites", "pos", "group_by_length", "compact_embeddings", "skip_unread_tokens",
                  "fused_optimizer", "cheap_dropout"),
    "ViT_imagenet": ("data_set", "depth", "norm", "scale", "cache", "mixed_precision", "channels_last",
                     "fused_optimizer"),
    "arxiv": ("data", "mode", "n_layers", "n_epochs", "norm", "scale", "scaled_tau"),
    "SSL_cifar": ("data_set", "method", "epochs", "sigma", "pred_location", "lam", "beta", "num_views", "align",
                  "center_path", "offsets", "mask_ratio_min"),
    "SSL_cifar.tokens": ("data_set", "patch_size", "k", "teacher"),
}  # fmt: skip
METRIC = {"gnn": "test_accuracy", "BERT_glue": "score", "ViT_imagenet": "test_accuracy", "arxiv": "test_accuracy",
          "SSL_cifar": "linear_accuracy", "SSL_cifar.tokens": "tcas"}  # fmt: skip
NEW_NAMES = {"norm_scale": "config.scale", "scale": "config.scale", "depth": "config.depth", "data": "config.data",
             "sites": "sites", "nlayer": "nlayer"}  # fmt: skip


def check_file(path):
    """Mean, standard deviation and n of each cell: from the raw lines by the old keys, and as the tables have them."""
    raw = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    raw = raw or [json.loads(path.read_text())]
    frame = load_records(path)
    assert len(frame) == len(raw) and frame["method"].notna().all() and frame["data"].notna().all()
    for experiment, part in frame.groupby("experiment"):
        old = [r for r in raw if r["experiment"] == experiment]
        by_cell: dict[tuple[str, ...], list[float]] = {}
        for one in old:
            key = tuple(_text(_old(one["config"], name), name) for name in OLD_KEYS[experiment])
            by_cell.setdefault(key, []).append(one["metrics"][METRIC[experiment]])
        keys = [NEW_NAMES.get(name, name) for name in OLD_KEYS[experiment]]
        keys = [name for name in keys if name in part]
        cells = aggregate(part, keys, METRIC[experiment])
        expected = in_order(
            (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else -1, len(v)) for v in by_cell.values()
        )
        spreads = ((c["mean"], -1 if math.isnan(c["std"]) else c["std"], c["n"]) for c in cells.to_dict("records"))
        found = in_order(spreads)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-12)
        # The cell's own fields tell the runs apart as finely, but for how they were computed.
        modes = {tuple(_text(_old(r["config"], k), k) for k in OLD_KEYS["gnn"][:6]) for r in old if experiment == "gnn"}
        if experiment == "gnn":
            assert len(modes) == len(part[["data", "method", "depth"]].drop_duplicates())


def in_order(cells):
    """By mean, then spread; means that differ by rounding alone are one."""
    return sorted(cells, key=lambda cell: tuple(round(number, 9) for number in cell))


def _old(config, name):
    """A setting by its old name, or by the one that it has since; PairNorm's scale of 1 was once left unset."""
    value = config.get(name, config.get(name.removeprefix("norm_")))
    return None if name == "norm_scale" and value == 1 and str(config.get("norm_mode")).startswith("PN") else value


def _text(value, name=""):
    if name == "identity":  # once the only form, and no setting of other norms
        return "Eq. 6" if value is False else ""
    return "" if value is None else str(value)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: str(p.relative_to(ROOT / "results")))
def test_committed_records_give_the_same_numbers(path):
    if not any(one["config"].get("tuning_trials") for _, one in iterate_records(path)):
        check_file(path)  # its keys, of the time before, do not tell chosen learning rates apart
    for where, one in iterate_records(path):
        assert one["schema"] == SCHEMA, where
        if "collapse" in one:
            lists = one["collapse"]
            assert lists["layer"] == list(range(1, len(lists["layer"]) + 1))
            assert {len(v) for v in lists.values()} == {len(lists["layer"])} and len(lists) >= 4


def test_records_of_the_evidence_give_the_same_numbers(data_root):
    files = sorted((data_root.parent / "evidence").rglob("*.jsonl"))
    if not files:
        pytest.skip("no evidence beside the data sets")
    for path in files:
        check_file(path)
        assert all("--seeds" not in one["command"] for _, one in iterate_records(path))
