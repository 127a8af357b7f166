"""PyG's classes that the experiment uses, imported without deprecation warnings and without transformers and pandas.

Those two are for PyG's language-model code alone; loading them would take a good part of a run's start-up time.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Within the block, packages that are not loaded yet look as if they were not installed."""
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
