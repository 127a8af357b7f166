"""The same seed, the same numbers; a saved state goes on where it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from repro.checkpoint import read_checkpoint, save_checkpoint
from repro.seeding import derive_seed, rng_state, seed_everything, set_rng_state


def draw():
    return [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.randn(), *torch.randn(5).tolist()]


@pytest.fixture(autouse=True)
def _leave_the_generators_alone():
    before = rng_state()
    yield
    set_rng_state(before)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5])
def test_seeds_repeat_and_differ(seed):
    seed_everything(seed)
    first = draw()
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert draw() != first


def test_a_state_goes_through_a_checkpoint_also_between_two_gaussians(tmp_path):
    """Box-Muller makes two numbers at a time: the second must not be lost."""
    seed_everything(3)
    draw()
    np.random.randn()
    random.gauss(0, 1)
    path = save_checkpoint(tmp_path, 1, rng_state())
    expected = [draw() for _ in range(3)]
    seed_everything(99)
    set_rng_state(read_checkpoint(path))
    assert [draw() for _ in range(3)] == expected


def test_derived_seeds_differ_by_place() -> None:
    seeds = {derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
