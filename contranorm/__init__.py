"""ContraNorm: the layer, its graph form, and the metrics that tell whether features have collapsed."""

from contranorm.collapse import (
    CollapseProbe,
    attention_similarity,
    effective_rank,
    feature_variance,
    mean_cosine_similarity,
    singular_spectrum,
    uniformity,
)
from contranorm.functional import contra_norm
from contranorm.graph import CentreAndNormalize, GraphContraNorm, PairNorm
from contranorm.layer import ContraNorm, ContraStep

__all__ = [
    "CentreAndNormalize",
    "CollapseProbe",
    "ContraNorm",
    "ContraStep",
    "GraphContraNorm",
    "PairNorm",
    "attention_similarity",
    "contra_norm",
    "effective_rank",
    "feature_variance",
    "mean_cosine_similarity",
    "singular_spectrum",
    "uniformity",
]
