"""Graphs: known facts of the data sets, and every way in which files can be wrong."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnn import data as graphs
from gnn.data import Graph, as_graph, features, load_graph, random_split
from repro.errors import UserError

CORA = "graphs/planetoid/Cora/raw"
# name: nodes, stored edges, features, classes; train, validation and test of the data set's own (first) split
FACTS = {
    "cora": ((2708, 10556, 1433, 7), (140, 500, 1000)),
    "citeseer": ((3327, 9104, 3703, 6), (120, 500, 1000)),
    "chameleon": ((2277, 36101, 2325, 5), (1092, 729, 456)),
    "squirrel": ((5201, 217073, 2089, 5), (2496, 1664, 1041)),
    "texas": ((183, 325, 1703, 5), (87, 59, 37)),
    "wisconsin": ((251, 515, 1703, 5), (120, 80, 51)),
    "cornell": ((183, 298, 1703, 5), (87, 59, 37)),
    "actor": ((7600, 30019, 932, 5), (3648, 2432, 1520)),
    "dblp": ((17716, 105734, 1639, 4), (80, 500, 17136)),
    "coauthor_cs": ((18333, 163788, 6805, 15), (300, 500, 17533)),
}


def sizes(graph: Graph) -> tuple[int, ...]:
    return tuple(int(mask.sum()) for mask in (graph.train, graph.validation, graph.test))


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of everything below a folder."""
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


# -- the embedded graph ------------------------------------------------------------------------------------------------


def test_digits_is_the_graph_that_the_readme_describes() -> None:
    graph = load_graph("digits", "nowhere")
    assert graph.x.shape == (1797, 64) and graph.classes == 10
    assert torch.bincount(graph.y[graph.train]).tolist() == [20] * 10
    assert sizes(graph) == (200, 500, 1097)
    a, b = graph.edge_index
    assert (graph.y[a] == graph.y[b]).float().mean().item() == pytest.approx(0.96, abs=0.005)  # homophily
    pairs = set(zip(*graph.edge_index.tolist(), strict=True))
    assert all((b, a) in pairs and a != b for a, b in pairs)
    assert torch.bincount(graph.edge_index[0]).min() >= 10  # ten neighbours chosen, and those that chose the node
    again = load_graph("digits", "elsewhere")
    assert torch.equal(graph.train, again.train) and torch.equal(graph.validation, again.validation)


def test_protocols_test_on_different_nodes(make_data: Callable[..., Any]) -> None:
    graph = as_graph("small", make_data())
    assert torch.equal(graph.test_nodes("standard"), graph.test)
    assert torch.equal(graph.test_nodes("reference"), ~(graph.train | graph.validation))
    assert int(graph.test.sum()) == 15 and int(graph.test_nodes("reference").sum()) == 25


# -- real data ---------------------------------------------------------------------------------------------------------


LARGE = ("squirrel", "dblp", "coauthor_cs")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in FACTS])
def test_real_graphs_have_the_published_counts(name: str, data_root: Path) -> None:
    before = listing(data_root / "graphs" / graphs.SOURCES[name].root)
    graph = load_graph(name, data_root)
    counts, split = FACTS[name]
    assert (len(graph.y), graph.edge_index.shape[1], graph.x.shape[1], graph.classes) == counts
    assert sizes(graph) == split
    assert int((graph.train & graph.validation | graph.train & graph.test).sum()) == 0
    assert listing(data_root / "graphs" / graphs.SOURCES[name].root) == before


def test_cora_protocols(data_root: Path) -> None:
    graph = load_graph("cora", data_root)
    assert int(graph.test_nodes("reference").sum()) == 2068
    assert int(graph.test_nodes("standard").sum()) == 1000


def test_ten_splits_differ(data_root: Path) -> None:
    first, third = (load_graph("texas", data_root, split=i) for i in (0, 2))
    assert torch.equal(first.x, third.x) and not torch.equal(first.train, third.train)
    assert torch.equal(load_graph("texas", data_root).train, first.train)


@pytest.fixture
def cora_copy(tmp_path: Path, data_root: Path) -> Path:
    shutil.copytree(data_root / CORA, tmp_path / "data" / CORA)
    return tmp_path / "data"


def test_read_only_root_is_enough(cora_copy: Path) -> None:
    for path in [cora_copy, *cora_copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing(cora_copy)
    try:
        assert len(load_graph("cora", cora_copy).y) == 2708
        assert listing(cora_copy) == before
    finally:
        for path in [cora_copy, *cora_copy.rglob("*")]:
            path.chmod(0o755)


# -- files that are wrong ----------------------------------------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def test_a_changed_file_is_refused_before_it_is_unpickled(cora_copy: Path, tmp_path: Path) -> None:
    (cora_copy / CORA / "ind.cora.graph").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    with pytest.raises(UserError, match=r"graphs/planetoid/Cora/raw/ind\.cora\.graph: truncated or changed"):
        load_graph("cora", cora_copy)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kept", [0, 100])
def test_a_truncated_file_is_refused(kept: int, cora_copy: Path) -> None:
    path = cora_copy / CORA / "ind.cora.allx"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"ind\.cora\.allx: truncated or changed .*{kept} bytes"):
        load_graph("cora", cora_copy)


def test_a_missing_file_is_named(cora_copy: Path) -> None:
    (cora_copy / CORA / "ind.cora.test.index").unlink()
    with pytest.raises(UserError, match=r"Cora/raw/ind\.cora\.test\.index: missing"):
        load_graph("cora", cora_copy)


def test_a_pubmed_pickle_with_code_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "graphs/planetoid/PubMed/raw"
    raw.mkdir(parents=True)
    for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        (raw / f"ind.pubmed.{part}").write_bytes(pickle.dumps(Bomb(tmp_path / "touched"), protocol=2))
    with pytest.raises(UserError, match=r"refers to '.* mkdir', which no graph file does"):
        load_graph("pubmed", tmp_path)
    (raw / "ind.pubmed.x").write_bytes(pickle.dumps({1: [2]}, protocol=2)[:-3])
    with pytest.raises(UserError, match=r"ind\.pubmed\.x: not a whole pickle"):
        load_graph("pubmed", tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_newer_pickle_protocol_hides_nothing(tmp_path: Path) -> None:
    """STACK_GLOBAL has no argument to compare: refused as a whole."""
    with pytest.raises(UserError, match="which no graph file does"):
        graphs._scan_pickle(pickle.dumps(Bomb(tmp_path / "touched"), protocol=4), "ind.pubmed.x")


def test_no_files_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"dblp: no folder .*set --data_root"):
        load_graph("dblp", tmp_path)

    def offline(self: Any) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(graphs.datasets.Planetoid, "download", offline)
    with pytest.raises(UserError, match="cora: could not be downloaded: the network is unreachable"):
        load_graph("cora", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_download_is_checked_and_kept_outside_the_data_root(
    cora_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[int] = []

    def download(self: Any) -> None:
        calls.append(1)
        shutil.copytree(cora_copy / CORA, self.raw_dir, dirs_exist_ok=True)

    monkeypatch.setattr(graphs.datasets.Planetoid, "download", download)
    empty = tmp_path / "empty"
    empty.mkdir()
    for _ in range(2):  # the second time from the cache
        assert len(load_graph("cora", empty).y) == 2708
    assert calls == [1] and not any(empty.iterdir())
    shutil.rmtree(tmp_path / "cache")
    (cora_copy / CORA / "ind.cora.ty").write_bytes(b"half")
    with pytest.raises(UserError, match=r"ind\.cora\.ty: truncated or changed"):
        load_graph("cora", empty)
    assert not (tmp_path / "cache").exists()


# -- graphs that make no sense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers(value: float, make_data: Callable[..., Any]) -> None:
    data = make_data()
    data.x[7, 3] = value
    with pytest.raises(UserError, match="small: the features of node 7 hold NaN or infinity"):
        as_graph("small", data)


@pytest.mark.parametrize("node", [60, -1])
def test_an_edge_to_a_missing_node(node: int, make_data: Callable[..., Any]) -> None:
    data = make_data()
    data.edge_index[1, 4] = node
    source = int(data.edge_index[0, 4])
    with pytest.raises(UserError, match=rf"small: the edge {source} - {node} leads to a missing node .*0 to 59"):
        as_graph("small", data)


def test_masks_that_overlap_or_are_empty(make_data: Callable[..., Any]) -> None:
    data = make_data()
    data.val_mask = data.train_mask.clone()
    with pytest.raises(UserError, match="disjoint"):
        as_graph("small", data)
    data = make_data()
    data.test_mask[:] = False
    with pytest.raises(UserError, match="no test node"):
        as_graph("small", data)


def test_labels_of_the_wrong_length(make_data: Callable[..., Any]) -> None:
    data = make_data()
    data.y = data.y[:-1]
    with pytest.raises(UserError, match="labels must be 60 numbers"):
        as_graph("small", data)


# -- features ----------------------------------------------------------------------------------------------------------


def test_random_split_partitions_the_nodes() -> None:
    y = torch.arange(700) % 4
    train, validation, test = random_split(y)
    assert torch.equal(train.int() + validation.int() + test.int(), torch.ones(700, dtype=torch.int32))
    assert torch.bincount(y[train]).tolist() == [20] * 4 and int(validation.sum()) == 500


def test_features_are_divided_by_their_row_sum(make_data: Callable[..., Any]) -> None:
    data = make_data()
    data.x[:2] = 0
    data.x[0, :2] = torch.tensor([1.0, 3.0])
    x = features(as_graph("small", data), missing_rate=0, seed=0)
    torch.testing.assert_close(x[:2, :2], torch.tensor([[0.25, 0.75], [0.0, 0.0]]))
    torch.testing.assert_close(x[2:].sum(dim=1), torch.ones(58))
    assert torch.equal(features(as_graph("small", data), missing_rate=0, seed=0, normalize=False), data.x)


def test_missing_features_spare_the_training_nodes(make_data: Callable[..., Any]) -> None:
    graph = as_graph("small", make_data())
    whole, erased, other = (features(graph, missing_rate=rate, seed=s) for rate, s in ((0, 0), (50, 0), (50, 1)))
    empty = erased.abs().sum(1) == 0
    assert int(empty.sum()) == 20 and not (empty & graph.train).any()  # half of the 40 nodes outside
    assert torch.equal(erased[~empty], whole[~empty])
    assert not torch.equal(erased, other)
    assert (features(graph, missing_rate=100, seed=0)[~graph.train] == 0).all()
    assert (graph.x.abs().sum(1) > 0).all()  # the graph itself is left alone
