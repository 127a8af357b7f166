"""The losses: a robust logarithm of the cross-entropy, and distillation from a teacher's predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1 - math.log(2)


def log_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of log(ε + ce) - log ε with ε = 1 - ln 2: 0 at ce = 0, and growing slowly where a node is far off.

    Args:
        logits: (n, C).
        labels: (n,) class numbers.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses + EPSILON).log().mean() - math.log(EPSILON)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), summed and divided by N·C.

    That is KLDivLoss's "mean" of the released code, C times less than the usual mean over nodes. ("mean" itself warns.)

    Args:
        student: logits (N, C), over all nodes: labels are not needed.
        teacher: logits (N, C).
        temperature: T.
    """
    log_probabilities = F.log_softmax(student / temperature, dim=1)
    target = F.log_softmax(teacher / temperature, dim=1)
    total = F.kl_div(log_probabilities, target, reduction="sum", log_target=True)
    return total * (temperature**2 / student.numel())


def learning_rate(base: float, epoch: int) -> float:
    """Linear over the first 50 epochs, counted from 1, then constant."""
    return base * min(epoch, 50) / 50


def one_hot(labels: Tensor, nodes: Tensor, classes: int) -> Tensor:
    """(N, C): the labels of `nodes` (N,) bool, zero rows elsewhere."""
    shown = torch.zeros(len(labels), classes, device=labels.device)
    shown[nodes] = F.one_hot(labels[nodes], classes).float()
    return shown
