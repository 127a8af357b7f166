"""A small graph in the place of the data sets, and settings for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnn.arxiv import train as training
from gnn.arxiv.config import Config
from gnn.arxiv.data import random_split
from gnn.data import Graph
from gnn.layers import Adjacency

NODES, CLASSES = 60, 3


def small_graph(name: str = "cora") -> Graph:
    """60 nodes, the last five isolated; signed (N, 8) features that tell the class, three disjoint sets of nodes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(NODES) % CLASSES
    x = torch.randn(NODES, 8, generator=generator)
    x[torch.arange(NODES), y] += 2
    edges = torch.randint(0, NODES - 5, (2, 4 * NODES), generator=generator)
    return Graph(name, x, y, edges, *random_split(NODES))


@pytest.fixture
def adjacency() -> Adjacency:
    return Adjacency.from_edges(small_graph().edge_index, NODES)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set becomes the small graph."""
    monkeypatch.setattr(training, "load", lambda config: small_graph(config.data))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "data_root": str(tmp_path), "data": "cora", "n_hidden": 4,
            "n_heads": 2, "n_layers": 4, "n_epochs": 6, "device": "cpu",
        }  # fmt: skip
        return Config(**settings | changes)

    return make
