"""A part of the training examples, split off for choosing settings where a data set has no validation set to spare."""

from __future__ import annotations

import random


def split_off(examples: int, share: float) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on, and of the `share` held out: the same for every run, at least one each."""
    count = min(max(round(share * examples), 1), examples - 1)
    held = set(random.Random(0).sample(range(examples), count))
    return [number for number in range(examples) if number not in held], sorted(held)


def check_hold_out(share: float | None) -> None:
    """Refuse a `--hold_out` that is no share.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--hold_out is a share of the training examples, between 0 and 1, got {share}")
