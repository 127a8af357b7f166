"""Embeddings kept from earlier steps: by the number of their image, or first in, first out.

Both are replicated, not shared out and not broadcast: every process writes the rows of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class IndexBank(nn.Module):
    """One row for each image, double-buffered: an epoch reads what the one before it has written.

    Memory: 2 x images x dim numbers. At an epoch's end both halves are equal, and a checkpoint holds one.

    Args:
        images: number of rows.
        dim: their width.
        dtype: float32, or bfloat16 for half the memory.
    """

    def __init__(self, images: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(images, dim, dtype=dtype))
        self.register_buffer("present", torch.zeros(images, dim, dtype=dtype))
        self.dirty = False  # whether the halves may differ

    def read(self, index: Tensor) -> Tensor:
        """The rows of images (B,) as the last epoch left them, (B, dim) in the bank's dtype."""
        rows: Tensor = self.past[index]
        return rows

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Keep rows (B, dim) for the next epoch."""
        self.present[index] = rows.to(self.present.dtype)
        self.dirty = True

    def end_epoch(self) -> None:
        """What was written can be read from now on."""
        self.past.copy_(self.present)
        self.dirty = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.dirty:
            del destination[f"{prefix}present"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.dirty = f"{prefix}present" in state_dict
        if not self.dirty:
            state_dict[f"{prefix}present"] = state_dict[f"{prefix}past"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class Queue(nn.Module):
    """The last `size` unit vectors, first in, first out (MoCo; He et al., CVPR 2020); random ones at first."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def push(self, rows: Tensor) -> None:
        """Let (B, dim) rows, B ≤ size, take the places of the oldest."""
        places = (self.place + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[places] = rows.to(self.rows.dtype)
        self.place.copy_((self.place + len(rows)) % len(self.rows))
