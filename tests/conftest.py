"""Fixtures for all rooms."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Commands under test are started as processes of their own: they must find this checkout, and no test may reach a hub.
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one share per xdist worker
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real data sets: $CONTRANORM_DATA, else a shared/data beside the checkout; skips where there is neither."""
    places = [os.environ.get("CONTRANORM_DATA"), str(ROOT.parent / "shared" / "data")]
    for place in places:
        if place and (Path(place) / "graphs").is_dir():
            return Path(place)
    pytest.skip("no local data sets: set CONTRANORM_DATA to a folder in the layout of the README")


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that runs the tests."""
    return sys.executable


@pytest.fixture(autouse=True)
def fresh_accelerator_state() -> None:
    """accelerate keeps one precision per process: a test must not inherit that of the one before."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
