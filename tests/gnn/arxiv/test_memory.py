"""Memory of a training step by depth, measured in processes of their own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks import arxiv
from benchmarks.arxiv import Variant, in_fresh_process

SMALL = Variant(nodes=20_000, edges=40_000, features=8, hidden=16, norm="D-ContraNorm")
TENSOR = 20_000 * 3 * 16 * 4 / 2**20  # MiB of all nodes' hidden features


def tensors(**changes: object) -> float:
    return in_fresh_process(replace(SMALL, **changes))["MiB"] / TENSOR  # type: ignore[arg-type]


def test_memory_is_flat_in_depth_with_reversible_blocks() -> None:
    """D-ContraNorm between the blocks included; each layer keeps a bit of every edge, and its matrix."""
    growth = (tensors(layers=9) - tensors(layers=3)) / 6
    assert growth < 0.15, f"{growth} tensors a layer"


@pytest.mark.slow
def test_memory_grows_with_depth_without_them() -> None:
    growth = (tensors(layers=9, reversible=False) - tensors(layers=3, reversible=False)) / 6
    assert growth > 3


@pytest.mark.slow
def test_the_benchmark(tmp_path, capsys) -> None:
    path = tmp_path / "arxiv.json"
    arxiv.main(["--fraction", "0.004", "--json", str(path)])
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 10 and all(row["CPU seconds"] > 0 for row in content["rows"])
    assert len(content["goals"]) == 2
    assert "of 2 goals met" in capsys.readouterr().out


def test_what_does_not_fit_is_left_out(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Variant, "expected_gib", lambda self: 1e6 if self.layers == 5 or self.convolution else 0.1)
    monkeypatch.setattr(arxiv, "in_fresh_process", lambda variant: {"seconds": 1.0, "CPU seconds": 1.0, "MiB": 1.0})
    arxiv.main([])
    said = capsys.readouterr()
    assert said.out.count("left out: it takes about 1000000 GiB") == 7
    assert len([line for line in said.out.splitlines() if " 169343 " in line]) == 3
