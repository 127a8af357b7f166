"""Weights from other people's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from repro.checkpoint import save_checkpoint
from repro.errors import UserError
from repro.weights import read_weights


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state, "epoch": 3}])
def test_a_state_dict_as_it_is_or_under_model(wrap, tmp_path: Path) -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(3)}
    torch.save(wrap(state), tmp_path / "w.pth")
    read = read_weights(str(tmp_path / "w.pth"))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {"epoch": 3}, torch.ones(2)])
def test_what_is_no_state_dict_is_one_line(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no weights readable there .it holds no state dict"):
        read_weights(str(tmp_path / "w.pth"))


def test_a_checkpoint_without_a_model(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints", 1, {"lines": 0, "seconds": 0.0, "state": {"x": torch.ones(1), "n": 2}})
    with pytest.raises(UserError, match="no state dict"):
        read_weights(str(tmp_path))
