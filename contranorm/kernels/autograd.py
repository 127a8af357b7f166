"""Second derivatives for kernels with a backward of their own, and how to see that torch records the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, definition: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.definition = definition
        ctx.save_for_backward(*inputs)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, again = ctx.needs_input_grad[2:], torch.is_grad_enabled()
        if not again and not torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched=True
            return grad, None, *(None for _ in needed)
        with torch.enable_grad():
            # One may be computed from another: each has its own share.
            inputs = [x.view_as(x) for x in ctx.saved_tensors]
            wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
            gradients = iter(torch.autograd.grad(ctx.definition(*inputs), wanted, grad, create_graph=again))
        return None, None, *(next(gradients) if need else None for need in needed)


def differentiable_twice(result: Tensor, definition: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`result`, computed from `inputs` by a function that has first derivatives only.

    Where a gradient will be differentiated again (create_graph=True), it is that of definition(*inputs), which autograd
    records; the function's own backward then gets None.
    """
    if not (torch.is_grad_enabled() and result.requires_grad):
        return result
    twice: Tensor = _Twice.apply(result, definition, *inputs)
    return twice


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_traced(x: Tensor) -> bool:
    """Whether torch records the program (compile, export, jit.trace), or x holds no numbers (meta, fake tensors)."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return recording or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter)
