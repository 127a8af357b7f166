"""Optimizer and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from SSL_cifar.config import Config
from SSL_cifar.methods.base import Method

BETAS = (0.9, 0.95)  # of AdamW, as in MAE


def build_optimizer(method: Method, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the method's groups; each keeps `constant` and `factor` for `set_rates`.

    All but sgd leave 1-D parameters (biases, norms) without decay, and LARS, by timm's rule, without trust ratio.
    """
    groups = []
    for group in method.groups():
        rate = {"constant": group.get("constant", False), "factor": group.get("factor", 1.0)}
        trained = [p for p in group["params"] if p.requires_grad]
        flat = [p for p in trained if p.dim() <= 1 and config.opt != "sgd"]
        rest = [p for p in trained if p.dim() > 1 or config.opt == "sgd"]
        # Without always_adapt, timm's LARS is plain SGD where nothing decays.
        adapted = {"weight_decay": config.weight_decay, "always_adapt": True}
        groups += [{"params": rest, **adapted, **rate}] if rest else []
        groups += [{"params": flat, "weight_decay": 0.0, **rate}] if flat else []
    common: dict[str, Any] = {"lr": config.peak_lr}
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, **common)
    common["momentum"] = config.momentum
    if config.opt == "sgd":
        return torch.optim.SGD(groups, **common)
    return Lars(groups, trust_coeff=config.trust_coeff, trust_clip=config.opt == "larc", **common)


def rate_at(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step: linear from `warmup_lr` to the peak, then along a cosine to 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (config.peak_lr - config.warmup_lr) * step / warmup
    done = (step - warmup) / max(config.epochs * steps_per_epoch - warmup, 1)
    return config.peak_lr * (1 + math.cos(math.pi * done)) / 2


def set_rates(optimizer: torch.optim.Optimizer, config: Config, step: int, steps_per_epoch: int) -> float:
    """Give every group its rate for the step; returns the scheduled one."""
    rate = rate_at(config, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = group["factor"] * (config.peak_lr if group["constant"] else rate)
    return rate


def parameters(module: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
