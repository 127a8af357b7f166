"""Small graphs and settings for the tests of gnn/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnn import data as graphs
from gnn.config import Config
from gnn.pyg import Data


def small_data(nodes: int = 60, classes: int = 3, seed: int = 0) -> Data:
    """A random graph whose features tell the class; (N, 12) features, mostly zero, and some isolated nodes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    x = torch.rand(nodes, 12, generator=generator) * (torch.rand(nodes, 12, generator=generator) < 0.15)
    x[torch.arange(nodes), y] += 1
    edges = torch.randint(0, nodes - 5, (2, 4 * nodes), generator=generator)  # the last five are isolated
    kind = torch.randperm(nodes, generator=generator)
    masks = [torch.zeros(nodes, dtype=torch.bool) for _ in range(3)]
    for mask, part in zip(masks, (kind[:20], kind[20:35], kind[35:50]), strict=True):  # ten nodes in no set
        mask[part] = True
    return Data(x=x, y=y, edge_index=edges, train_mask=masks[0], val_mask=masks[1], test_mask=masks[2])


@pytest.fixture
def make_data() -> Callable[..., Data]:
    return small_data


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data digits` becomes a graph of 60 nodes, so that a run takes a blink."""
    monkeypatch.setattr(graphs, "digits", small_data)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "data": "digits", "hid": 8, "nlayer": 3, "epochs": 3, "device": "cpu",
        }  # fmt: skip
        return Config(**settings | changes)

    return make


@pytest.fixture
def record() -> Callable[[str | Path], dict[str, Any]]:
    def read(folder: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((Path(folder) / "record.json").read_text())
        return found

    return read
