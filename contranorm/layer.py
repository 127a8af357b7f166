"""ContraNorm as a drop-in for nn.LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contranorm.functional import Axis, Implementation, contra_norm


class ContraNorm(nn.LayerNorm):
    """LayerNorm(H - s·softmax(HHᵀ/τ)·H) over the tokens of each sequence (Guo et al., ICLR 2023, Eq. 6).

    Sub-classes nn.LayerNorm and, unless `learnable`, adds no state: its state dict has the keys of a plain LayerNorm,
    so that checkpoints of vanilla models load.

    Args:
        dim: number of features D.
        scale: the step s. It has no default: 0 would silently be a plain LayerNorm.
        tau: temperature.
        identity: (1+s)·x - s·A·x in place of Eq. 6's x - s·A·x.
        axis: "tokens" contrasts tokens, "features" contrasts features (the paper's D-ContraNorm).
        symmetric: both gradient terms ("dual softmax").
        pre_norm: unit rows in place of x.
        learnable: train one step per feature, starting from `scale`.
        positive: with `learnable`, train its logarithm so that the step stays > 0.
        implementation: "auto", "plain", "fused", "blocked", "sdpa" or "linear", see `contra_norm`.
        degree: of "linear".
        eps: LayerNorm's epsilon.
        elementwise_affine: LayerNorm's weight and bias.
        bias: LayerNorm's bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `positive` without `learnable`, or with scale <= 0.
    """

    def __init__(
        self,
        dim: int,
        scale: float,
        *,
        tau: float = 1.0,
        identity: bool = False,
        axis: Axis = "tokens",
        symmetric: bool = False,
        pre_norm: bool = False,
        learnable: bool = False,
        positive: bool = False,
        implementation: Implementation = "auto",
        degree: int = 2,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if positive and not (learnable and scale > 0):
            raise ValueError(f"positive=True needs learnable=True and scale > 0, got {learnable=} and {scale=}")
        self.scale = scale
        self.tau = tau
        self.identity = identity
        self.axis: Axis = axis
        self.symmetric = symmetric
        self.pre_norm = pre_norm
        self.learnable = learnable
        self.positive = positive
        self.implementation: Implementation = implementation
        self.degree = degree
        super().__init__(dim, eps, elementwise_affine, bias=bias, device=device, dtype=dtype)
        if learnable:
            self.step = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """LayerNorm's ones and zeros; a learnable step starts at `scale`."""
        super().reset_parameters()
        if hasattr(self, "step"):
            start = torch.tensor(self.scale, dtype=torch.float64)
            nn.init.constant_(self.step, float(start.log() if self.positive else start))

    def effective_scale(self) -> float | Tensor:
        """The step s now in use: the constant, or a tensor of shape (D,)."""
        if not self.learnable:
            return self.scale
        return self.step.exp() if self.positive else self.step

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x.

        Args:
            x: (B, N, D). A single sequence is (1, N, D): an (N, D) tensor could as well be a batch of vectors, and
                contrasting those would mix samples.
            mask: (B, N), True for real tokens; the others neither move (before the LayerNorm) nor count.

        Returns:
            (B, N, D).
        """
        if x.dim() != 3:
            raise ValueError(
                f"ContraNorm contrasts the tokens of a sequence: x must be (B, N, D), got {tuple(x.shape)}. Pooled "
                "vectors (global_pool='avg') or per-head tensors (qk_norm) need a plain LayerNorm; rows of one graph "
                "need GraphContraNorm"
            )
        x = contra_norm(
            x,
            self.effective_scale(),
            tau=self.tau,
            identity=self.identity,
            axis=self.axis,
            symmetric=self.symmetric,
            pre_norm=self.pre_norm,
            mask=mask,
            implementation=self.implementation,
            degree=self.degree,
        )
        return super().forward(x)

    def extra_repr(self) -> str:
        """LayerNorm's line and the switches."""
        switches = ("scale", "tau", "identity", "axis", "symmetric", "pre_norm", "learnable", "positive")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in switches)])
