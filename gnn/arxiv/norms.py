"""ContraNorm between RevGAT's layers: over features without memory that grows with depth, or over the nodes.

D-ContraNorm, with x̂ the rows of x at unit length and A = softmax_rows(x̂ᵀx̂ / τ), which is D x D:

    y = x M,        M = (1 + s) I - s A   (identity kept),        M = I - s A   (Eq. 6).

With the identity kept M has eigenvalues in [1, 1 + s], so that the backward pass can have x = y M⁻¹ back: A, which is
small, is stored in place of x.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from contranorm import contra_norm
from gnn.arxiv.config import Config
from gnn.layers import Adjacency
from repro.errors import UserError

EPS = 1e-12  # F.normalize's


@dataclass(frozen=True)
class Form:
    """One form of D-ContraNorm: the step s, the softmax's temperature, and the switches of `contra_norm`."""

    scale: float
    tau: float
    identity: bool
    pre_norm: bool
    centre: bool

    @property
    def invertible(self) -> bool:
        """Whether x can be had back from y up to rounding.

        Eq. 6's M may be singular. Rows at unit length could be multiplied by their stored lengths, but so would be
        their rounding errors, layer after layer.
        """
        return self.identity and not self.pre_norm

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each node's mean (N, 1), the centred rows, their lengths (N, 1), and the rows at unit length."""
        mean = x.mean(dim=1, keepdim=True) if self.centre else x.new_zeros(())
        rows = x - mean if self.centre else x
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(EPS)
        return mean, rows, length, rows / length

    def weights(self, unit: Tensor) -> Tensor:
        """A, (D, D)."""
        return (unit.mT @ unit).div_(self.tau).softmax(dim=1)

    def matrix(self, weights: Tensor) -> Tensor:
        """M, (D, D)."""
        own = 1 + self.scale if self.identity else 1.0
        return torch.diag_embed(weights.new_full(weights.shape[:1], own)).sub_(weights, alpha=self.scale)


class _FeatureStep(torch.autograd.Function):
    """x M with a backward of its own; with `free`, x's memory is given back until that backward restores it.

    As in PyG's `InvertibleFunction`, the output is kept as the very object that the next layer gets, since a reversible
    block frees and restores its input in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, free: bool) -> Tensor:
        mean, rows, length, unit = form.normalized(x)
        weights = form.weights(unit)
        y = (unit if form.pre_norm else rows) @ form.matrix(weights)
        ctx.form, ctx.free, ctx.x = form, free, x.detach()
        ctx.small = (weights, mean, length)
        ctx.y = y if free else None
        if free:
            del rows, unit  # rows may be x itself
            x.untyped_storage().resize_(0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        form, x = ctx.form, ctx.x
        weights, mean, length = ctx.small
        matrix = form.matrix(weights)
        if ctx.free:
            x.untyped_storage().resize_(x.numel() * x.element_size())
            torch.mm(ctx.y, torch.linalg.inv(matrix.double()).to(matrix.dtype), out=x)
            if form.centre:
                x.add_(mean)
        ctx.x = ctx.y = ctx.small = None
        rows = x - mean if form.centre else x
        unit = rows / length
        grad_weights = ((unit if form.pre_norm else rows).mT @ grad).mul_(-form.scale)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(dim=1, keepdim=True))
        grad_unit = unit @ (grad_logits + grad_logits.mT).div_(form.tau)
        grad_rows = grad @ matrix.mT
        if form.pre_norm:
            grad_unit += grad_rows
        inside = (unit * grad_unit).sum(dim=1, keepdim=True)  # the length of a row at unit length does not change
        grad_unit = grad_unit.addcmul_(unit, inside, value=-1).div_(length)
        grad_x = grad_unit if form.pre_norm else grad_rows.add_(grad_unit)
        return (grad_x - grad_x.mean(dim=1, keepdim=True) if form.centre else grad_x), None, None


class FeatureContraNorm(nn.Module):
    """D-ContraNorm: columns that agree over the nodes are pushed apart. No parameters.

    In evaluation it leaves in `activity` how much it did: the relative move ‖y - x‖ / ‖x‖, and the mean of 1 - A_aa,
    which is 0 where the softmax has become the identity matrix.

    Args:
        scale: the step s.
        tau: temperature.
        scaled_tau: multiply tau by N / D, the mean of the diagonal of x̂ᵀx̂.
        identity: (1+s)·x - s·x·A in place of x - s·x·A.
        pre_norm: rows of unit length in place of x everywhere.
        centre: subtract each node's mean over its columns first.
        reversible: in training, free the input until the backward pass, if the form is invertible; nothing else may
            read it in between.
    """

    def __init__(
        self,
        scale: float,
        tau: float = 1.0,
        *,
        scaled_tau: bool = False,
        identity: bool = True,
        pre_norm: bool = False,
        centre: bool = False,
        reversible: bool = False,
    ) -> None:
        super().__init__()
        self.form = Form(scale, tau, identity, pre_norm, centre)
        self.scaled_tau = scaled_tau
        self.reversible = reversible
        self.activity: tuple[float, float] | None = None

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """(N, D) → (N, D); the graph is not read."""
        form = self.form
        if self.scaled_tau:
            form = replace(form, tau=form.tau * x.shape[0] / x.shape[1])
        if torch.is_grad_enabled():
            step: Tensor = _FeatureStep.apply(x, form, self.reversible and form.invertible)
            return step
        _, rows, _, unit = form.normalized(x)
        weights = form.weights(unit)
        y = (unit if form.pre_norm else rows) @ form.matrix(weights)
        if not self.training:
            self.activity = (float((y - x).norm() / x.norm()), float((1 - weights.diagonal()).mean()))
        return y

    def extra_repr(self) -> str:
        """The form."""
        form = self.form
        tau = f"{form.tau:g}" + " N/D" * self.scaled_tau
        return (
            f"scale={form.scale:g}, tau={tau}, identity={form.identity}, pre_norm={form.pre_norm}, centre={form.centre}"
        )


class NodeContraNorm(nn.Module):
    """ContraNorm over the nodes of the graph, neighbours left out of the softmax; see `contra_norm`.

    With implementation "linear" a broken bound is an error: the exact form that would answer is too slow here.
    """

    def __init__(self, scale: float, **switches: Any) -> None:
        super().__init__()
        self.scale = scale
        self.switches = switches

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """(N, D) → (N, D)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="implementation='linear'", category=UserWarning)
            try:
                return contra_norm(x, self.scale, exclude=adjacency.excluded, **self.switches)
            except UserWarning as warning:
                raise UserError(f"--axis tokens: {str(warning).removesuffix(': the exact form is used instead')}: "
                                "use a larger --tau, or --axis features") from warning  # fmt: skip

    def extra_repr(self) -> str:
        """The form."""
        return f"scale={self.scale}, {self.switches}"


class NoNorm(nn.Module):
    """The identity, in the place of a norm."""

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """X itself."""
        return x


def build_norm(config: Config) -> nn.Module:
    """What `--norm` asks for, for one layer."""
    if config.norm == "none" or config.scale is None:
        return NoNorm()
    if config.axis == "tokens":
        switches = {
            name: getattr(config, name) for name in ("tau", "symmetric", "pre_norm", "implementation", "degree")
        }
        return NodeContraNorm(config.scale, identity=config.keeps_identity, **switches)
    return FeatureContraNorm(
        config.scale,
        config.tau,
        scaled_tau=config.scaled_tau,
        identity=config.keeps_identity,
        pre_norm=config.pre_norm,
        centre=config.dcn_use_mean,
        reversible=config.reversible,
    )
