"""The implementations behind `contra_norm`. They compute the contrast term alone: A·v for A = softmax(x̂ x̂ᵀ / τ).

This file chooses among them. `plain` is the definition, `fused` and `blocked` are exact and faster, `linear` replaces
exp by a polynomial; `masks` says which pairs count, `edges` serves `linear` on graphs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from contranorm.kernels.autograd import is_traced, is_transformed
from contranorm.kernels.blocked import MAX_LOGIT_DOUBLE, blocked_contrast
from contranorm.kernels.fused import fused_step
from contranorm.kernels.linear import linear_contrast
from contranorm.kernels.masks import on_kept_rows
from contranorm.kernels.plain import (
    feature_contrast,
    no_autocast,
    plain_contrast,
    product_dtype,
    sdpa_contrast,
    unit_rows,
)

__all__ = ["feature_contrast", "fused_step", "resolve", "token_contrast"]

# Number of rows from which the blocked form is the faster exact one, with excluded pairs ("graph") and without ("set"):
# measured on two CPU cores and written by `python -m benchmarks.layer --crossover --update`.
BLOCKED_FROM: dict[str, int] = json.loads(Path(__file__).with_name("choices.json").read_text())["blocked_from"]


def resolve(implementation: str, x: Tensor, *, tau: float | Tensor, symmetric: bool, exclude: Tensor | None) -> str:
    """The implementation that will run; a ValueError where the one asked for cannot express the form.

    Where torch records or transforms the program, and where there is nothing to compute, it is one of torch's own
    operations: "plain" or, unless a transform is at work, "sdpa".
    """
    if implementation in ("fused", "sdpa") and (symmetric or exclude is not None):
        raise ValueError(f"implementation={implementation!r} knows neither symmetric=True nor exclude: use 'blocked'")
    if isinstance(tau, Tensor):
        if implementation not in ("auto", "plain"):
            raise ValueError(f"implementation={implementation!r} takes no tensor tau: use 'plain', or a number")
        return "plain"
    if is_transformed():
        return "plain"
    if is_traced(x):
        attention = implementation == "sdpa" or (implementation == "auto" and x.is_cuda and not symmetric)
        return "sdpa" if attention and exclude is None else "plain"
    if exclude is not None and exclude.layout == torch.strided:
        if implementation not in ("auto", "plain"):
            raise ValueError(f"implementation={implementation!r} takes exclude as sparse CSR: call .to_sparse_csr()")
        return "plain"
    if x.numel() == 0 or (implementation in ("blocked", "linear") and 1 / tau > MAX_LOGIT_DOUBLE):
        return "plain"
    return choose(x, symmetric=symmetric, exclude=exclude) if implementation == "auto" else implementation


def choose(x: Tensor, *, symmetric: bool, exclude: Tensor | None) -> str:
    """The implementation that "auto" stands for, by shape and device; always an exact one.

    On GPUs, where nothing was measured, attention's flash kernels are taken wherever they can express the form.
    """
    if exclude is not None:
        return "blocked" if x.shape[1] >= BLOCKED_FROM["graph"] else "plain"
    if x.is_cuda and not symmetric:
        return "sdpa"
    if x.shape[1] >= BLOCKED_FROM["set"]:
        return "blocked"
    return "plain" if symmetric else "fused"


def token_contrast(
    x: Tensor,
    *,
    tau: float | Tensor,
    symmetric: bool,
    keep: Tensor | None,
    exclude: Tensor | None,
    implementation: str,
    degree: int,
) -> Tensor:
    """A·x, or (A + softmax over columns)·x, by an implementation that `resolve` named; (B, N, D) → (B, N, D)."""
    if implementation == "fused" and not isinstance(tau, Tensor):
        return fused_step(x, own=0.0, scale=-1.0, tau=tau, keep=keep)
    dtype = product_dtype(x)
    with no_autocast(x):
        unit = unit_rows(x)  # x̂; a zero row stays zero
        if implementation == "plain" or isinstance(tau, Tensor):
            return plain_contrast(unit, x, tau=tau, symmetric=symmetric, keep=keep, exclude=exclude, dtype=dtype)
        if implementation == "sdpa":
            return sdpa_contrast(unit, x, tau=tau, keep=keep, dtype=dtype)
        compute = functools.partial(blocked_contrast, tau=tau, symmetric=symmetric, dtype=dtype)
        if implementation == "linear":
            compute = functools.partial(linear_contrast, tau=tau, symmetric=symmetric, dtype=dtype, degree=degree)
        return on_kept_rows(compute, unit, x, keep, exclude)  # by samples: a tile is larger than most sequences
