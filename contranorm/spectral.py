"""`spectral_filter`: functions of a batch's singular values, the asymmetry of the rank differential mechanism."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contranorm.options import Filter, Location, check_filter

RELATIVE_FLOOR = 1e-4  # of singular values, to the largest: below it the Gram matrix of float32 features is noise
SMALLEST_FLOOR = 1e-100  # of eigenvalues: all-zero features stay finite


class Spectrum(NamedTuple):
    """Eigenvalues λ of the smaller Gram matrix of a batch, ascending, (r,) with r = min(N, D), and its vectors."""

    eigenvalues: Tensor  # ≥ 0
    clamped: Tensor  # at least (RELATIVE_FLOOR · largest singular value)²
    vectors: Tensor  # (r, r), one per column

    @property
    def condition(self) -> float:
        """Largest singular value over the smallest, after clamping. Collapsed: 1 / RELATIVE_FLOOR. Healthy: 1."""
        return float((self.clamped[-1] / self.clamped[0]).sqrt())

    @property
    def clamped_count(self) -> int:
        """How many singular values were below the floor. Collapsed: all but one. Healthy: none."""
        return int((self.eigenvalues < self.clamped).sum())


def gram_spectrum(z: Tensor) -> Spectrum:
    """The spectrum of z Zᵀ or Zᵀ Z, whichever is smaller, for z of shape (N, D); float64, without gradient."""
    rows = z.detach().double()
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp_min(0)
    floor = (RELATIVE_FLOOR**2 * eigenvalues[-1]).clamp_min(SMALLEST_FLOOR)
    return Spectrum(eigenvalues, eigenvalues.clamp_min(floor), vectors)


def spectral_filter(z: Tensor, kind: Filter, sigma: float, *, location: Location) -> Tensor:
    r"""The batch z = U diag(s) Vᵀ (thin SVD) with its singular values multiplied by a function g of them.

    ============  ======================  ===========================================================
    kind          g(s)                    the target's rank stays above the online side's for
    ============  ======================  ===========================================================
    poly          s^σ                     σ > 0 online, σ < 0 on the target (σ = -1 whitens)
    log           log s                   online, as log_1 and log_2: they take no σ, and no target
    log_1, log_2  log(1 + s), log(1 + s²)
    contranorm    1 - σ (s / s_max)²      σ < 0 online, σ > 0 on the target (½ halves the largest)
    ============  ======================  ===========================================================

    poly and log: "Towards a Unified Theoretical Understanding of Non-contrastive Learning via Rank Differential
    Mechanism", Zhuo, Wang, Ma, Wang, ICLR 2023. contranorm is one step of `contra_norm` to first order: for centred
    rows and a large temperature τ, H - t softmax(H Hᵀ / τ) H has singular values s (1 - t s² / (N τ)), so that
    σ = t s_max² / (N τ).

    On the target the result has no gradient. Online it is z W with W = V diag(g(s)) Vᵀ a constant, so that the gradient
    of each row is filtered by W. W is zero on the null space of z, and σ = 0 of poly and contranorm is z itself. Below
    `RELATIVE_FLOOR` times the largest singular value, g is taken at that floor; online, times s² over the floor's.

    Args:
        z: batch of all processes, (N, D), neither centred nor normalized; N and D change what is whitened: features for
            N ≥ D, samples for N < D.
        kind: which g.
        sigma: σ, see the table; at least -1 for poly, at most 1 for contranorm.
        location: online or target.

    Returns:
        (N, D) in the dtype of z, computed in float64. An all-zero batch gives zeros.

    Raises:
        ValueError: z is no float matrix, or the filter is not defined, see `contranorm.options.check_filter`.
    """
    check_filter(kind, sigma, location)
    if z.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"z must be a float tensor (N, D), got {z.dtype} {tuple(z.shape)}")
    if sigma == 0 and kind in ("poly", "contranorm"):
        return z if location == "online" else z.detach()
    spectrum = gram_spectrum(z)
    gains, vectors = _gains(kind, spectrum.clamped.sqrt(), sigma), spectrum.vectors
    frozen, by_samples = z.detach().double(), len(z) <= z.shape[1]
    if location == "target":
        smoother = (vectors * gains) @ vectors.T
        return (smoother @ frozen if by_samples else frozen @ smoother).to(z.dtype)
    # W = V diag(g) Vᵀ with V = Zᵀ Q diag(1/s) for N ≤ D: no D x D matrix. The share λ / clamped keeps W thin.
    if by_samples:
        filtered = (z.double() @ frozen.T) @ ((vectors * (gains / spectrum.clamped)) @ (vectors.T @ frozen))
    else:
        filtered = z.double() @ ((vectors * (gains * spectrum.eigenvalues / spectrum.clamped)) @ vectors.T)
    return filtered.to(z.dtype)


def _gains(kind: Filter, s: Tensor, sigma: float) -> Tensor:
    """The function g of `spectral_filter`, for singular values s in ascending order."""
    if kind == "poly":
        return s**sigma
    if kind == "contranorm":
        return 1 - sigma * (s / s[-1]).square()
    return {"log": torch.log, "log_1": torch.log1p, "log_2": lambda s: torch.log1p(s.square())}[kind](s)
