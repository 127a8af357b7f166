from __future__ import annotations

import math
import random

import pytest

from repro.holdout import check_hold_out, split_off


@pytest.mark.parametrize(("examples", "share", "held"), [(50, 0.1, 5), (25, 0.1, 2), (3, 0.01, 1), (3, 0.99, 2)])
def test_every_example_is_in_one_part_and_never_in_another(examples: int, share: float, held: int) -> None:
    parts = split_off(examples, share)
    assert len(parts[1]) == held and sorted([*parts[0], *parts[1]]) == list(range(examples))
    random.seed(7)
    state = random.getstate()
    assert split_off(examples, share) == parts  # whatever the run's seed
    assert random.getstate() == state


@pytest.mark.parametrize("share", [0, 1, -0.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="--hold_out is a share of the training examples, between 0 and 1"):
        check_hold_out(share)
    check_hold_out(None)
