from __future__ import annotations

import torch
from torch.nn import functional as F

from repro.cost import multiply_adds


def test_products_and_attention_are_counted_on_this_processor_too() -> None:
    x = torch.randn(3, 5)
    assert multiply_adds(torch.nn.Linear(5, 7), x) == 3 * 5 * 7
    q = torch.randn(2, 4, 6, 8)  # B, H, N, d: q kᵀ and A v
    assert multiply_adds(F.scaled_dot_product_attention, q, q, q) == 2 * (2 * 4 * 6 * 6 * 8)


def test_a_sparse_factor_counts_by_its_entries() -> None:
    sparse = torch.eye(6).to_sparse_csr()
    dense = torch.randn(6, 4)
    assert multiply_adds(torch.mm, sparse, dense) == 6 * 4
    assert multiply_adds(torch.sparse.mm, sparse, dense) == 6 * 4
    assert multiply_adds(torch.mv, sparse, dense[:, 0]) == 6
    assert multiply_adds(lambda out: out.addmm_(sparse, dense), torch.zeros(6, 4)) == 6 * 4
    assert multiply_adds(torch.sparse.sampled_addmm, sparse, dense, dense.mT) == 6 * 4


def test_products_in_place_are_counted() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 2)
    assert multiply_adds(lambda: torch.zeros(5, 2).addmm_(a, b)) == 5 * 7 * 2
    assert multiply_adds(lambda: torch.mm(a, b, out=torch.zeros(5, 2))) == 5 * 7 * 2
    assert multiply_adds(lambda: torch.addmm(torch.zeros(5, 2), a, b)) == 5 * 7 * 2
    assert multiply_adds(lambda: a @ b[:, 0]) == 5 * 7
