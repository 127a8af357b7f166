"""PyG, imported without deprecation warnings and without transformers and pandas.

Those two are for PyG's language-model code alone; loading them would take a good part of a run's start-up time.
"""

import sys
import warnings

_unused = [name for name in ("transformers", "pandas") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_unused))  # type: ignore[arg-type]  # None: importing it raises ImportError
try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated")
        from torch_geometric import datasets, nn, transforms, utils
        from torch_geometric.data import Data
finally:
    for _name in _unused:
        del sys.modules[_name]

__all__ = ["Data", "datasets", "nn", "transforms", "utils"]
