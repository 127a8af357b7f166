"""Other ways to the contrast term in time linear in N, to hold the polynomial of `contranorm.kernels.linear` against.

`python -m benchmarks.layer --approximations` prints time and error of each at N = 20,000 without excluded pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def random_features(x: Tensor, count: int) -> Tensor:
    """A·x with positive orthogonal random features, exp(q·k) = E exp(ω·q - ‖q‖²/2) exp(ω·k - ‖k‖²/2).

    For x (N, D) and m = `count` features in time O(N·m·D); the directions ω are orthogonal in groups of D.

    Source: Choromanski et al., "Rethinking Attention with Performers", ICLR 2021 (arXiv 2009.14794). The rows have
    length 1, so that the factors exp(-‖q‖²/2) cancel in the softmax.
    """
    d = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    groups = [torch.linalg.qr(torch.randn(d, d, generator=generator))[0] for _ in range(-(-count // d))]
    lengths = torch.randn(count, d, generator=generator).norm(dim=1, keepdim=True)
    directions = (torch.cat(groups)[:count] * lengths).to(x)  # ω, (m, D)
    exponent = F.normalize(x, dim=1) @ directions.mT  # (N, m)
    features = (exponent - exponent.detach().max()).exp()
    return _contrast(features, features, x)


def nystrom(x: Tensor, count: int) -> Tensor:
    """A·x with the kernel replaced by K_nm K_mm⁻¹ K_mn for m rows drawn at random.

    For x (N, D) and m = `count`, in time O(N·m·(D + m)).

    Source: Williams and Seeger, "Using the Nyström Method to Speed Up Kernel Machines", NIPS 2000.
    """
    unit = F.normalize(x, dim=1)
    chosen = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(0))[:count].to(x.device)
    across = (unit @ unit[chosen].mT).exp()  # K_nm, (N, m)
    inner = across[chosen]  # K_mm
    ridge = 1e-5 * inner.detach().diagonal().mean() * torch.eye(len(chosen), device=x.device, dtype=x.dtype)
    return _contrast(torch.linalg.solve(inner + ridge, across.mT).mT, across, x)


def _contrast(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """(L Rᵀ x) / (L Rᵀ 1), by the short way round."""
    return (left @ (right.mT @ x)) / (left @ right.sum(dim=0, keepdim=True).mT)
