"""Losses: the values at the marks, and distillation as KLDivLoss's mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gnn.arxiv.loss import distillation, learning_rate, log_cross_entropy, one_hot


def test_log_cross_entropy_at_its_marks() -> None:
    right = torch.tensor([[200.0, 0.0]], dtype=torch.float64)
    assert float(log_cross_entropy(right, torch.tensor([0]))) == pytest.approx(0, abs=1e-12)
    undecided = torch.zeros(3, 2, dtype=torch.float64)  # ce = ln 2
    assert float(log_cross_entropy(undecided, torch.tensor([0, 1, 0]))) == pytest.approx(1.1814, abs=1e-4)
    assert float(log_cross_entropy(undecided, torch.tensor([0, 1, 0]))) == pytest.approx(-math.log(1 - math.log(2)))


def test_distillation() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 40, dtype=torch.float64), torch.randn(7, 40, dtype=torch.float64)
    t = 0.7
    per_node = F.kl_div((student / t).log_softmax(1), (teacher / t).softmax(1), reduction="batchmean")
    loss = distillation(student, teacher, t)
    assert float(loss) == pytest.approx(float(per_node) * t**2 / 40)  # 40 classes: 40 times less than over nodes
    assert float(distillation(teacher, teacher, t)) == pytest.approx(0, abs=1e-12)


def test_learning_rate() -> None:
    assert [learning_rate(0.002, epoch) for epoch in (1, 25, 50, 51, 1000)] == [0.00004, 0.001, 0.002, 0.002, 0.002]


def test_one_hot() -> None:
    shown = one_hot(torch.tensor([2, 0, 1]), torch.tensor([True, False, True]), 3)
    assert shown.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
