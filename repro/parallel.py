"""What a loss over the whole batch needs of several processes: a gather with gradients, BatchNorm over all of them.

Both make several processes, with the batch's rows shared out in order, give one process's loss and gradients: every
process computes the loss of all rows, and the mean of the processes' gradients, which DistributedDataParallel takes, is
the gradient of one process. torch's SyncBatchNorm refuses CPU tensors, its differentiable collectives warn that they
are deprecated, and accelerate's `gather` carries no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from repro.errors import UserError


def check_processes(found: int) -> None:
    """Refuse a process that torchrun has started beside others, where it has `found` another number of them.

    Raises:
        UserError: each would take itself for the only one.
    """
    if found != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise UserError(f"started as one of {started} processes that do not find each other; use torchrun")


def world_size() -> int:
    """Number of processes; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows :][: ctx.rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, in the processes' order: (processes · B, ...); B is the same everywhere.

    The gradient of a process's rows is the sum over the processes' losses.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def all_names(names: Iterable[str]) -> list[str]:
    """The names that any process has, each once, in the processes' order."""
    parts: list[Any] = [list(names)]
    if world_size() > 1:
        (mine,), parts = parts, [None] * world_size()
        dist.all_gather_object(parts, mine)
    return list(dict.fromkeys(name for part in parts for name in part))


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization with the mean and variance of all processes' rows; every process has as many."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"needs (B, C, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (B, C, ...), feature by feature."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        count = x.numel() // x.shape[1] * world_size()
        mean: Tensor = _Sum.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance: Tensor = _Sum.apply(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm over all processes: torch's own on GPUs, `BatchNorm` on CPUs.

    The weights, buffers and names of the state dict stay. With one process nothing changes.
    """
    if world_size() == 1:
        return module
    if any(p.is_cuda for p in module.parameters()):
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = BatchNorm
    return module
