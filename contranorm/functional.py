"""`contra_norm`: the equation of ContraNorm in every form in which the experiments use it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from contranorm import kernels
from contranorm.kernels.autograd import is_traced, is_transformed
from contranorm.kernels.masks import with_padding, without_padding
from contranorm.kernels.plain import softmax_weights, unit_rows
from contranorm.options import Axis, Implementation, check_positive, check_switches


def contra_norm(
    x: Tensor,
    scale: float | Tensor,
    *,
    tau: float | Tensor = 1.0,
    identity: bool = False,
    scaled_identity: bool = False,
    axis: Axis = "tokens",
    symmetric: bool = False,
    pre_norm: bool = False,
    mask: Tensor | None = None,
    exclude: Tensor | None = None,
    implementation: Implementation = "auto",
    degree: int = 2,
) -> Tensor:
    r"""One gradient step of the uniformity loss on the features: pushes rows apart that point the same way.

    With :math:`\hat x = x / \|x\|` row by row and :math:`A = \mathrm{softmax}_{rows}(\hat x \hat x^\top / \tau)`:

    .. math::
        x \mapsto x - s\,A x \quad\text{(Eq. 6)}, \qquad
        x \mapsto (1 + s)\,x - s\,A x \quad\text{(identity=True)}

    from "ContraNorm: A Contrastive Learning Perspective on Oversmoothing and Beyond", Guo, Wang, Du, Wang, ICLR 2023
    (arXiv 2303.06562). The LayerNorm that follows it in the paper is in `contranorm.ContraNorm`.

    Args:
        x: features, (B, N, D) or (N, D), any float dtype. Computed in float32 at least, returned in the dtype of `x`.
        scale: the step s, > 0; a number, or a tensor of shape (D,) for one step per feature. One that requires a
            gradient is learned and may have any sign.
        tau: temperature, > 0. A large one gives plain centring. A tensor () gets its gradient, from the plain form.
        identity: keep the identity's share: (1 + s) x instead of x, as the released code does in BERT and on graphs.
            Followed by a LayerNorm it is Eq. 6 with the step s / (1 + s).
        scaled_identity: s x - s A x in place of both, which is what the released code computes where it learns s. After
            a LayerNorm a constant s then drops out.
        axis: "tokens" compares rows (N x N). "features" compares columns (D x D, the paper's D-ContraNorm):
            ``x - s x softmax_rows(x̂ᵀx̂ / tau)``.
        symmetric: both terms of the gradient ("dual softmax"): ``A + softmax_columns`` in place of ``A``.
        pre_norm: x̂ in place of x everywhere.
        mask: (B, N), or (N,) for an (N, D) input; True for real tokens. The others neither move nor count.
        exclude: sparse CSR (N, N) whose stored entries (i, j), whatever their values, leave row i's softmax: the graph
            form, with x (N, D); or a dense bool (N, N), for the plain form. A row that has nothing left in its softmax
            has a contrast term of 0.
        implementation: "plain" stores the N x N matrix and is the definition; "fused" does so with a backward of its
            own; "blocked" is exact and never does; "sdpa" is attention with q = k = x̂; "linear" replaces exp by a
            polynomial, in time linear in N, or answers with "blocked", after a warning, where its error bound
            (`contranorm.kernels.linear`) is broken; "auto" chooses among the exact ones by shape and device. While
            torch traces or transforms the program, "plain" stands in for those with a backward of their own.
        degree: of the polynomial, 1 (faster) or 2 (more exact); where the bound of 1 is broken, 2 is taken.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        ValueError: shapes, dtypes or switches that do not go together; the message names the one that is wrong.
    """
    for name, value in (("scale", scale), ("tau", tau)):
        if isinstance(value, Tensor):
            _check_positive(name, value)
        else:
            check_positive(name, value)
    check_switches(axis=axis, symmetric=symmetric, implementation=implementation, degree=degree)
    scale, tau = (value if isinstance(value, Tensor) else float(value) for value in (scale, tau))  # NumPy's too
    return apply_step(
        x, scale, tau=tau, identity=identity, scaled_identity=scaled_identity, axis=axis, symmetric=symmetric,
        pre_norm=pre_norm, mask=mask, exclude=exclude, implementation=implementation, degree=degree,
    )  # fmt: skip


def apply_step(
    x: Tensor,
    scale: float | Tensor,
    *,
    tau: float | Tensor,
    identity: bool,
    scaled_identity: bool,
    axis: Axis,
    symmetric: bool,
    pre_norm: bool,
    mask: Tensor | None,
    exclude: Tensor | None,
    implementation: Implementation,
    degree: int,
) -> Tensor:
    """`contra_norm` with switches that have been checked, and a scale that may have been learned: any sign."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # jit.trace makes tensors of sizes
        _check_tensors(x, scale, axis, mask, exclude)
    work = x if x.dtype == torch.float64 else x.float()
    batch = work if x.dim() == 3 else work.unsqueeze(0)  # (B, N, D)
    keep = None if mask is None else mask.reshape(batch.shape[:2])  # (B, N)
    kernel = "features"
    if axis == "tokens":
        kernel = kernels.resolve(implementation, batch, tau=tau, symmetric=symmetric, exclude=exclude)
    fused = kernel == "fused" and not isinstance(scale, Tensor)
    if keep is not None and (pre_norm or not fused):
        batch = without_padding(batch, keep)
    if pre_norm:
        batch = unit_rows(batch)  # x̂; a zero row stays zero
    if fused:
        own = scale if scaled_identity else 1.0 + scale if identity else 1.0
        numbers: dict[str, Any] = {"own": own, "scale": scale, "tau": tau}
        moved = kernels.fused_step(batch, **numbers, keep=keep)
        return _restore(moved, x, keep if pre_norm else None)
    if kernel == "features":
        unit = batch if pre_norm else unit_rows(batch)
        contrast = kernels.feature_contrast(unit, batch, tau=tau, symmetric=symmetric)
    else:
        contrast = kernels.token_contrast(
            batch, tau=tau, symmetric=symmetric, keep=keep, exclude=exclude, implementation=kernel, degree=degree
        )
    step = scale.to(batch.dtype) if isinstance(scale, Tensor) else scale
    if scaled_identity:
        moved = step * (batch - contrast)
    elif isinstance(step, Tensor):
        moved = (1 + step) * batch - step * contrast if identity else batch - step * contrast
    elif identity:
        moved = torch.lerp(batch, contrast, -step)  # x - s (A x - x), in one pass
    else:
        moved = torch.sub(batch, contrast, alpha=step)
    return _restore(moved, x, keep)


torch.fx.wrap("apply_step")  # symbolic tracing calls it as it is, whatever the shapes will be


def scripted_step(
    x: Tensor,
    step: Tensor,
    tau: float,
    identity: bool,
    scaled_identity: bool,
    axis: str,
    symmetric: bool,
    pre_norm: bool,
    mask: Tensor | None,
) -> Tensor:
    """`apply_step` in what torch.jit.script can compile: the plain form, with a step of shape (D,)."""
    batch = x if x.dtype == torch.float64 else x.float()
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must be bool of shape {x.shape[:-1]} (True for real tokens), got {mask.shape}")
        batch = batch.masked_fill(~mask.unsqueeze(-1), 0.0)
    unit = unit_rows(batch)
    if pre_norm:
        batch = unit
    if axis == "features":
        contrast = batch @ softmax_weights(unit.mT @ unit / tau, symmetric, None, None)
    else:
        contrast = softmax_weights(unit @ unit.mT / tau, symmetric, mask, None) @ batch
    step = step.to(batch.dtype)
    own = step if scaled_identity else 1 + step if identity else torch.ones_like(step)
    moved = own * batch - step * contrast
    if mask is not None:
        real = mask.unsqueeze(-1)  # TorchScript's gradient of torch.where multiplies by 0: NaN would stay
        moved = moved.masked_fill(~real, 0.0) + x.to(moved.dtype).masked_fill(real, 0.0)
    return moved.to(x.dtype)


def _restore(moved: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    """The result in the shape and dtype of x, and the rows of x where `keep` is False."""
    if keep is not None:
        moved = with_padding(moved, x.reshape(moved.shape).to(moved.dtype), keep)
    return moved.reshape(x.shape).to(x.dtype)


def _check_positive(name: str, value: Tensor) -> None:
    """`check_positive` for a tensor, unless it is learned or holds no numbers that can be looked at."""
    if name == "tau" and value.dim() > 0:
        raise ValueError(f"tau must be a number, or a tensor (), got {tuple(value.shape)}")
    if value.requires_grad or is_transformed() or is_traced(value):
        return
    if not bool((value > 0).logical_and(value.isfinite()).all()):
        raise ValueError(f"{name} must be > 0 and finite in every element, got {value}")


def _check_tensors(x: Tensor, scale: float | Tensor, axis: str, mask: Tensor | None, exclude: Tensor | None) -> None:
    shape = tuple(x.shape)
    if x.dim() not in (2, 3):
        raise ValueError(
            f"x must be (B, N, D) or (N, D), got {shape}: a similarity across any other axis would mix samples; "
            "reshape so that the rows to be contrasted are the second last axis"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be a float tensor, got {x.dtype}")
    if isinstance(scale, Tensor) and scale.dim() > 0 and scale.shape != x.shape[-1:]:
        raise ValueError(f"scale must be a number or of shape ({shape[-1]},), got {tuple(scale.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(
            f"mask must be bool of shape {shape[:-1]} (True for real tokens), got {mask.dtype} {tuple(mask.shape)}"
        )
    if exclude is not None:
        if axis == "features":
            raise ValueError("exclude names pairs of rows: it has no meaning with axis='features'")
        if exclude.layout != torch.sparse_csr and (exclude.layout != torch.strided or exclude.dtype != torch.bool):
            raise ValueError(f"exclude must be a torch.sparse_csr tensor, got {exclude.layout}: call .to_sparse_csr()")
        if x.dim() != 2 or exclude.shape != (shape[0], shape[0]):
            raise ValueError(f"exclude must be (N, N) for x of (N, D), got {tuple(exclude.shape)} for {shape}")
