"""What a forward pass costs, in multiply-adds: torch's counter, and what it leaves out or takes for dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ATEN = torch.ops.aten
# Products by the number of their left argument. torch's counter lacks all but the first two, and their sparse factors.
_PRODUCTS = {_ATEN.mm: 0, _ATEN.addmm: 1, _ATEN.addmm_: 1, _ATEN._sparse_addmm: 1, _ATEN.mv: 0}


def _entries(matrix: Tensor) -> int:
    """The stored entries of a sparse matrix, or all."""
    return matrix.numel() if matrix.layout == torch.strided else matrix.values().numel()


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula as one of tensors, not of shapes, as FlopCounterMode wants it."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _product(first: int) -> Callable[..., int]:
    """Each entry of the left factor, argument number `first`, meets a row of the right one."""
    return _raw(lambda *args, **_: 2 * _entries(args[first]) * args[first + 1].shape[1:].numel())


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


@torch.no_grad()
def multiply_adds(forward: Callable[..., Any], *inputs: Any) -> int:
    """Multiply-adds of all matrix products and attention calls in `forward(*inputs)`; a sparse factor by its entries.

    Elementwise work (norms, activations, differences along edges) is not counted. The number is of what was computed:
    a forward pass that chooses a faster or slower form by its inputs' values, as ContraNorm's linear one does, costs
    what it chose.
    """
    known: dict[Any, Callable[..., int]] = {op: _product(first) for op, first in _PRODUCTS.items()}
    # at the entries of a sparse pattern, products of rows
    known[_ATEN.sparse_sampled_addmm] = _raw(lambda at, left, *_, **__: 2 * _entries(at) * left.shape[1])
    known[_ATEN._scaled_dot_product_flash_attention_for_cpu] = _attention
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        forward(*inputs)
    return int(counter.get_total_flops()) // 2
