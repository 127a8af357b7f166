"""PyG's classes that the experiment uses, imported without what their import alone would bring along.

That is deprecation warnings, and transformers and pandas: optional for PyG, wanted by its language-model code only, and
a good part of the time in which a run starts.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Within the block, packages that are not loaded yet count as not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it raises ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with warnings.catch_warnings(), _absent("transformers", "pandas"):
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
