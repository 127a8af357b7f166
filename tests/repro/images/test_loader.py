from __future__ import annotations

import pytest

from repro.images.loader import eval_batches


@pytest.mark.parametrize(("length", "world"), [(11, 1), (11, 2), (1, 2), (16, 3)])
def test_evaluation_takes_every_image_once(length: int, world: int) -> None:
    seen = [t.index for rank in range(world) for batch in eval_batches(length, 4, rank, world) for t in batch]
    assert sorted(seen) == list(range(length))
