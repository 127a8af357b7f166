"""PyG's classes that the experiment uses, imported without the deprecation warnings that the import itself sets off."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated", category=DeprecationWarning)
    from torch_geometric.data import Data
    from torch_geometric.datasets import Actor, CitationFull, Coauthor, Planetoid, WebKB, WikipediaNetwork
    from torch_geometric.nn import (
        BatchNorm,
        DiffGroupNorm,
        GATConv,
        GraphNorm,
        MeanSubtractionNorm,
        MessageNorm,
    )

__all__ = [
    "Actor",
    "BatchNorm",
    "CitationFull",
    "Coauthor",
    "Data",
    "DiffGroupNorm",
    "GATConv",
    "GraphNorm",
    "MeanSubtractionNorm",
    "MessageNorm",
    "Planetoid",
    "WebKB",
    "WikipediaNetwork",
]
