"""`contra_norm`: the equation of ContraNorm in every form in which the experiments use it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contranorm import kernels
from contranorm.options import Axis, Implementation, check_switches


def contra_norm(
    x: Tensor,
    scale: float | Tensor,
    *,
    tau: float = 1.0,
    identity: bool = False,
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
        scale: the step s; a number, or a tensor of shape (D,) for one step per feature. 0 means no step.
        tau: temperature, > 0. A large one gives plain centring.
        identity: keep the identity's share: (1 + s) x instead of x, as the released code does in BERT and on graphs.
            Followed by a LayerNorm it is Eq. 6 with the step s / (1 + s).
        axis: "tokens" compares rows (N x N). "features" compares columns (D x D, the paper's D-ContraNorm):
            ``x - s x softmax_rows(x̂ᵀx̂ / tau)``.
        symmetric: both terms of the gradient ("dual softmax"): ``A + softmax_columns`` in place of ``A``.
        pre_norm: x̂ in place of x everywhere.
        mask: (B, N), or (N,) for an (N, D) input; True for real tokens. The others neither move nor count.
        exclude: sparse CSR (N, N) whose stored entries (i, j), whatever their values, leave row i's softmax: the graph
            form, with x (N, D). A row that has nothing left in its softmax has a contrast term of 0.
        implementation: "plain" stores the N x N matrix and is the definition; "fused" does so with a backward of its
            own; "blocked" is exact and never does; "sdpa" is attention with q = k = x̂; "linear" replaces exp by a
            polynomial, in time linear in N, or answers with "blocked", after a warning, where its error bound
            (`contranorm.kernels.linear`) is broken; "auto" chooses among the exact ones by shape and device.
        degree: of the polynomial, 1 (faster) or 2 (more exact); where the bound of 1 is broken, 2 is taken.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        ValueError: shapes, dtypes or switches that do not go together; the message names the one that is wrong.
    """
    check_switches(tau=tau, axis=axis, implementation=implementation, degree=degree)
    _check_tensors(x, scale, axis, mask, exclude)
    work = x if x.dtype == torch.float64 else x.float()
    batch = work if x.dim() == 3 else work.unsqueeze(0)  # (B, N, D)
    keep = None if mask is None else mask.reshape(batch.shape[:2])  # (B, N)
    unit = F.normalize(batch, dim=-1) if pre_norm or axis == "features" else None  # x̂; a zero row stays zero
    if pre_norm and unit is not None:
        batch = unit

    if axis == "features" and unit is not None:
        contrast = kernels.feature_contrast(unit, batch, tau=tau, symmetric=symmetric, keep=keep)
    else:
        name = kernels.resolve(implementation, batch, symmetric=symmetric, exclude=exclude)
        if name == "fused" and not isinstance(scale, Tensor):
            own = 1.0 + scale if identity else 1.0
            moved = kernels.fused_step(batch, own=own, scale=scale, tau=tau, keep=keep)
            return _restore(moved, x, keep if pre_norm else None)
        contrast = kernels.token_contrast(
            batch, tau=tau, symmetric=symmetric, keep=keep, exclude=exclude, implementation=name, degree=degree
        )
    if isinstance(scale, Tensor):
        step = scale.to(batch.dtype)
        moved = (1 + step) * batch - step * contrast if identity else batch - step * contrast
    elif identity:
        moved = torch.lerp(batch, contrast, -scale)  # x - s (A x - x), in one pass
    else:
        moved = torch.sub(batch, contrast, alpha=scale)
    return _restore(moved, x, keep)


def _restore(moved: Tensor, x: Tensor, keep: Tensor | None) -> Tensor:
    """The result in the shape and dtype of x, and the rows of x where `keep` is False."""
    if keep is not None:
        moved = torch.where(keep.unsqueeze(-1), moved, x.reshape(moved.shape).to(moved.dtype))
    return moved.reshape(x.shape).to(x.dtype)


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
        if exclude.layout != torch.sparse_csr:
            raise ValueError(f"exclude must be a torch.sparse_csr tensor, got {exclude.layout}: call .to_sparse_csr()")
        if x.dim() != 2 or exclude.shape != (shape[0], shape[0]):
            raise ValueError(f"exclude must be (N, N) for x of (N, D), got {tuple(exclude.shape)} for {shape}")
