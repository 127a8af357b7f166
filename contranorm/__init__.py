"""ContraNorm: the layer, its graph form, and the metrics that tell whether features have collapsed.

What needs torch is imported when it is first asked for, so that `contranorm.options` can be read without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contranorm.collapse import (
        CollapseProbe,
        attention_similarity,
        effective_rank,
        feature_variance,
        mean_cosine_similarity,
        singular_spectrum,
        uniformity,
    )
    from contranorm.convert import replace_layer_norms, revert
    from contranorm.functional import contra_norm
    from contranorm.graph import CentreAndNormalize, GraphContraNorm, PairNorm, carry_edges
    from contranorm.layer import ContraNorm, ContraStep
    from contranorm.spectral import spectral_filter

__all__ = [
    "CentreAndNormalize",
    "CollapseProbe",
    "ContraNorm",
    "ContraStep",
    "GraphContraNorm",
    "PairNorm",
    "attention_similarity",
    "carry_edges",
    "contra_norm",
    "effective_rank",
    "feature_variance",
    "mean_cosine_similarity",
    "replace_layer_norms",
    "revert",
    "singular_spectrum",
    "spectral_filter",
    "uniformity",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("functional", "layer", "graph", "collapse", "convert", "spectral"):
            home = importlib.import_module(f"contranorm.{module}")
            if name in vars(home):
                return vars(home)[name]
    raise AttributeError(f"module 'contranorm' has no attribute {name!r}")
