"""Distillation from a teacher (Touvron et al., ICML 2021): the student's second token learns what the teacher says."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.errors import UserError
from ViT_imagenet.config import Config
from ViT_imagenet.setup import load_weights


class DistillationLoss(nn.Module):
    """(1 - α)·base(logits, target) + α·distillation(logits of the distillation token, teacher).

    Hard: cross-entropy with the teacher's most likely class. Soft: τ²·KL(teacher ‖ student) at temperature τ, the mean
    over images (DeiT's code divides by the number of classes too, which all but switches it off at 1,000).

    Args:
        base: loss of the class token.
        teacher: gives logits (B, C); not trained.
        kind: "soft" or "hard".
        alpha: share of the distillation.
        tau: temperature of the soft kind.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base = base
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; images (B, 3, H, W), outputs two (B, C), target (B,) or (B, C)."""
        logits, distilled = outputs
        with torch.no_grad():
            said = self.teacher(images).float()  # (B, C)
        if self.kind == "hard":
            second = F.cross_entropy(distilled.float(), said.argmax(dim=1))
        else:
            student = F.log_softmax(distilled.float() / self.tau, dim=1)
            second = self.tau**2 * F.kl_div(
                student, F.log_softmax(said / self.tau, dim=1), reduction="batchmean", log_target=True
            )
        return (1 - self.alpha) * self.base(logits, target) + self.alpha * second


def build_teacher(config: Config, num_classes: int) -> nn.Module:
    """The teacher of the config with its weights.

    Raises:
        UserError: unknown name, weights that do not fit, no weights.
    """
    if not timm.is_model(config.teacher_model):
        raise UserError(f"--teacher_model {config.teacher_model}: timm has no such model")
    if config.teacher_path is None:
        raise UserError("--teacher_model needs --teacher_path: an untrained teacher teaches nothing")
    teacher: nn.Module = timm.create_model(config.teacher_model, num_classes=num_classes)
    load_weights(teacher, config.teacher_path, reset_head=False)
    return teacher
