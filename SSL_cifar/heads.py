"""Projectors and predictors that lightly does not have in the authors' form, from its layers."""

from __future__ import annotations

from lightly.models.modules.heads import ProjectionHead
from torch import nn


def byol_head(input_dim: int, hidden_dim: int, output_dim: int) -> ProjectionHead:
    """BYOL's projector and predictor in solo-learn: one hidden layer with BatchNorm, biases in both layers."""
    return ProjectionHead(
        [(input_dim, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU(), True), (hidden_dim, output_dim, None, None)]
    )


def simclr_head(input_dim: int, hidden_dim: int, output_dim: int) -> ProjectionHead:
    """The projector of SimCLR-Attn's authors: BatchNorm after both layers, the last one without a trained shift."""
    last = nn.BatchNorm1d(output_dim)
    last.bias.requires_grad_(False)
    return ProjectionHead(
        [(input_dim, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU()), (hidden_dim, output_dim, last, None)]
    )
