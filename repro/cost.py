"""What a forward pass costs, in multiply-adds: torch's counter, but sparse matrices by their entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def _by_entries(dense: Callable[..., int], first: int) -> Callable[..., int]:
    """The formula of a product whose left factor, argument number `first`, counts its stored entries if sparse."""

    def formula(*args: Any, **kwargs: Any) -> int:
        left, right = args[first], args[first + 1]
        if isinstance(left, Tensor) and left.layout != torch.strided:
            return 2 * left.values().numel() * int(right.shape[1])
        return dense(*args, **kwargs)

    formula._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes: FlopCounterMode's own mark
    return formula


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


@torch.no_grad()
def multiply_adds(forward: Callable[..., Any], *inputs: Any) -> int:
    """Multiply-adds of all matrix products and attention calls in `forward(*inputs)`; a sparse factor by its entries.

    Elementwise work (norms, activations, differences along edges) is not counted.
    """
    known = {op: _by_entries(flop_registry[op], first) for op, first in zip(_PRODUCTS, (0, 1), strict=True)}
    known[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention  # which torch's counter leaves out
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        forward(*inputs)
    return int(counter.get_total_flops()) // 2
