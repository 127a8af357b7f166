"""PyG's reversible block; `gnn.pyg` comes first, which loads PyG without its deprecation warnings."""

# isort: off
import gnn.pyg  # noqa: F401
from torch_geometric.nn.models.rev_gnn import GroupAddRev
# isort: on

__all__ = ["GroupAddRev"]
