"""ContraNorm as a drop-in for nn.LayerNorm, and its step alone as a module."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, TypedDict, Unpack

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm.functional import apply_step, scripted_step
from contranorm.options import Axis, Implementation, check_positive, check_switches


class Switches(TypedDict, total=False):
    """The form of the step, as keywords of all three layers; meanings and defaults are `ContraStep`'s."""

    identity: bool
    scaled_identity: bool
    axis: Axis
    symmetric: bool
    pre_norm: bool
    learnable: bool
    positive: bool
    implementation: Implementation
    degree: int


# Keywords of `apply_step` that a module carries as attributes of the same names.
_FORM = ("tau", "identity", "scaled_identity", "axis", "symmetric", "pre_norm", "implementation", "degree")


class ContraStep(nn.Module):
    """The step without a LayerNorm: x - s·A·x with A = softmax(x̂ x̂ᵀ / τ), in every form of `contra_norm`.

    Base of `ContraNorm` and `GraphContraNorm`. No state, unless `learnable`: then `step`, (dim,).

    Args:
        scale: the step s. It has no default: 0 would silently be no step.
        tau: temperature.
        dim: number of features D; only `learnable` needs it.
        identity, scaled_identity, axis, symmetric, pre_norm, implementation, degree: the form, as in `contra_norm`.
        learnable: train one step per feature, starting from `scale`.
        positive: with `learnable`, train its logarithm so that the step stays > 0.
        device, dtype: of the learnable step.
        base: arguments of the class behind this one, as ContraNorm has nn.LayerNorm there.

    Raises:
        ValueError: switches that make no sense, alone or together; the message names the one that is wrong.
    """

    def __init__(
        self,
        scale: float,
        tau: float = 1.0,
        *,
        dim: int | None = None,
        identity: bool = False,
        scaled_identity: bool = False,
        axis: Axis = "tokens",
        symmetric: bool = False,
        pre_norm: bool = False,
        learnable: bool = False,
        positive: bool = False,
        implementation: Implementation = "auto",
        degree: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        base: dict[str, Any] | None = None,
    ) -> None:
        check_positive("scale", scale)
        check_positive("tau", tau)
        check_switches(
            axis=axis, symmetric=symmetric, learnable=learnable, positive=positive, implementation=implementation,
            degree=degree,
        )  # fmt: skip
        super().__init__(**(base or {}))
        self.scale = float(scale)
        self.tau = float(tau)
        self.identity = identity
        self.scaled_identity = scaled_identity
        self.axis: Axis = axis
        self.symmetric = symmetric
        self.pre_norm = pre_norm
        self.learnable = learnable
        self.positive = positive
        self.implementation: Implementation = implementation
        self.degree = degree
        if learnable:
            if dim is None:
                raise ValueError("learnable needs dim, the number of features: it trains one step for each of them")
            self.step = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
            ContraStep.reset_parameters(self)

    def reset_parameters(self) -> None:
        """A learnable step starts at `scale`."""
        if hasattr(self, "step"):
            nn.init.constant_(self.step, math.log(self.scale) if self.positive else self.scale)

    def effective_scale(self) -> float | Tensor:
        """The step s now in use: the constant, or a tensor of shape (D,)."""
        if not self.learnable:
            return self.scale
        return self.step.exp() if self.positive else self.step

    def take_step(self, x: Tensor, mask: Tensor | None = None, exclude: Tensor | None = None) -> Tensor:
        """`contra_norm` with this module's scale and switches; x (B, N, D) or (N, D)."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._apply_step(x, mask, exclude)
        step = torch.full([x.shape[-1]], self.scale, device=x.device, dtype=torch.float64)
        if hasattr(self, "step"):
            step = self.step.exp() if self.positive else self.step
        return scripted_step(
            x, step, self.tau, self.identity, self.scaled_identity, self.axis, self.symmetric, self.pre_norm, mask
        )

    def _apply_step(self, x: Tensor, mask: Tensor | None, exclude: Tensor | None) -> Tensor:
        return apply_step(x, mask=mask, exclude=exclude, **self.settings())

    def settings(self) -> dict[str, Any]:
        """The scale in use and the form, as keywords of `apply_step`."""
        return {"scale": self.effective_scale()} | {name: getattr(self, name) for name in _FORM}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The step on x, (B, N, D) or (N, D); `mask`, (B, N) or (N,), is False for rows that neither move nor count."""
        return self.take_step(x, mask)

    def extra_repr(self) -> str:
        """Scale, temperature and form, behind the line of a base class."""
        names = ("scale", *_FORM[:-2], "learnable", "positive")
        return ", ".join([*filter(None, [super().extra_repr()]), *(f"{name}={getattr(self, name)}" for name in names)])


class ContraNorm(ContraStep, nn.LayerNorm):
    """LayerNorm(H − s·softmax(ĤĤᵀ/τ)·H), Ĥ = rows of H at unit length, over the tokens of each sequence.

    Source: Guo et al., ICLR 2023, Eq. 6, which prints HHᵀ; the released code, and this layer, take rows of unit length.

    Sub-classes nn.LayerNorm and, unless `learnable`, adds no state: its state dict has the keys of a plain LayerNorm,
    so that checkpoints of vanilla models load. Works under torch.compile(fullgraph=True), torch.export, fx, torch.jit
    and torch.func, and differentiates twice: the plain form stands in wherever a kernel of its own cannot.

    Args:
        dim: number of features D.
        scale: the step s. It has no default: 0 would silently be a plain LayerNorm.
        tau: temperature.
        eps, elementwise_affine, bias, device, dtype: as in nn.LayerNorm.
        switches: those of `ContraStep`.
    """

    def __init__(
        self,
        dim: int,
        scale: float,
        *,
        tau: float = 1.0,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        base = {"normalized_shape": dim, "eps": eps, "elementwise_affine": elementwise_affine, "bias": bias, **place}
        super().__init__(scale, tau, dim=dim, base=base, **place, **switches)
        self._forward_pre_hooks = _NeverEmpty()

    def reset_parameters(self) -> None:
        """LayerNorm's ones and zeros; a learnable step starts at `scale`."""
        nn.LayerNorm.reset_parameters(self)
        super().reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The step on x, (B, N, D), then LayerNorm; `mask`, (B, N), is False for tokens that neither move nor count.

        A single sequence is (1, N, D): rows of (N, D) could as well be pooled vectors, which must not be contrasted.
        """
        return self.normalize(self.take_step(_sequences(x), mask))

    def normalize(self, x: Tensor) -> Tensor:
        """The LayerNorm behind the step."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _sequences(x: Tensor) -> Tensor:
    """X, if it is (B, N, D)."""
    if x.is_nested:  # by nn.TransformerEncoder, without gradients only: in training the padding would count
        raise ValueError(
            "ContraNorm got a nested tensor, as nn.TransformerEncoder makes of a padded batch in eval mode: use "
            "contranorm.convert.replace_layer_norms, which carries the padding mask in training as well, or "
            "enable_nested_tensor=False"
        )
    if x.dim() != 3:
        raise ValueError(
            f"ContraNorm contrasts the tokens of a sequence: x must be (B, N, D), got {list(x.shape)}. Pooled "
            "vectors (global_pool='avg') or per-head tensors (qk_norm) need a plain LayerNorm; rows of one graph "
            "need GraphContraNorm"
        )
    return x


for _function in ("apply_step", "_sequences"):
    torch.fx.wrap(_function)  # symbolic tracing calls them as they are, whatever the shapes will be


class _NeverEmpty(OrderedDict[int, Any]):
    """A module's hooks, whose number is never 0: the module must be called.

    In eval mode and without gradients, nn.TransformerEncoderLayer hands the weights of its norms to one fused kernel
    and never calls them, whatever their class. It does so only where no module inside has a forward hook, since hooks
    would be skipped as well. A hook that does nothing would have to be compiled by torch.jit.script, with the module.
    """

    def __len__(self) -> int:
        return super().__len__() + 1


# In TorchScript that path does not look for hooks, but a norm that may have no weights stops the compiler.
ContraNorm.__annotations__ = nn.LayerNorm.__annotations__ | {"weight": Tensor | None, "bias": Tensor | None}
