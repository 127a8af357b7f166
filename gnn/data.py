"""Graphs: from checked local files, else by download, else embedded; never anything written next to raw files.

PyG's own readers do the reading, in a temporary folder that holds a copy of the raw files. Every copy is compared with
the recorded sha256 (`checksums.yaml`) before PyG opens it, because Planetoid's raw files are pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickletools
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gnn.pyg import Data, datasets, transforms, utils
from repro.config import load_yaml
from repro.errors import UserError

SPLIT_SEED = 0  # of the sets that come without a split: a property of the data, not of a run
TRAIN_PER_CLASS = 20
VALIDATION_NODES = 500
# Path below the data root → sha256 of the only file that is accepted there.
CHECKSUMS: dict[str, str] = load_yaml(Path(__file__).parent / "checksums.yaml")


@dataclass
class Graph:
    """One graph with labels and three disjoint sets of nodes; C classes, N nodes, E directed edges."""

    name: str
    x: Tensor  # (N, F) raw features, float32
    y: Tensor  # (N,) labels in 0..C-1
    edge_index: Tensor  # (2, E) node numbers, as in the raw files (possibly directed)
    train: Tensor  # (N,) bool
    validation: Tensor  # (N,) bool
    test: Tensor  # (N,) bool, the data set's own test nodes
    slow: Tensor | None = None  # (N,) bool, Half-Hop's nodes, in no set; the edges are then taken as they are directed

    @property
    def classes(self) -> int:
        """C."""
        return int(self.y.max()) + 1

    def test_nodes(self, protocol: str) -> Tensor:
        """(N,) bool: the nodes on which `protocol` tests."""
        if protocol != "reference":
            return self.test
        used = self.train | self.validation
        return ~(used if self.slow is None else used | self.slow)


@dataclass(frozen=True)
class Source:
    """Where a data set is below `graphs/` and which PyG class reads it."""

    reader: Any  # a class of torch_geometric.datasets
    root: str  # PyG's root folder
    raw: str  # the raw folder below it
    name: str | None = None  # PyG's name of the graph, where a class reads several
    downloads: bool = True


SOURCES = {
    "cora": Source(datasets.Planetoid, "planetoid", "Cora/raw", "Cora"),
    "citeseer": Source(datasets.Planetoid, "planetoid", "CiteSeer/raw", "CiteSeer"),
    "pubmed": Source(datasets.Planetoid, "planetoid", "PubMed/raw", "PubMed"),
    "chameleon": Source(datasets.WikipediaNetwork, "wikipedia", "chameleon/geom_gcn/raw", "chameleon"),
    "squirrel": Source(datasets.WikipediaNetwork, "wikipedia", "squirrel/geom_gcn/raw", "squirrel"),
    "texas": Source(datasets.WebKB, "webkb", "texas/raw", "texas"),
    "wisconsin": Source(datasets.WebKB, "webkb", "wisconsin/raw", "wisconsin"),
    "cornell": Source(datasets.WebKB, "webkb", "cornell/raw", "cornell"),
    "actor": Source(datasets.Actor, "actor", "raw"),
    # The recorded files hold the same arrays as the authors', in plain .npz containers; no checksum of the latter.
    "dblp": Source(datasets.CitationFull, "citationfull", "dblp/raw", "DBLP", downloads=False),
    "coauthor_cs": Source(datasets.Coauthor, "coauthor", "CS/raw", "CS", downloads=False),
}


def load_graph(name: str, data_root: str | Path, *, split: int | None = None) -> Graph:
    """Load one graph.

    Args:
        name: a key of `SOURCES`, or "digits".
        data_root: folder with `graphs/...`, only read.
        split: which of ten splits; None is 0 where there are ten.

    Raises:
        UserError: files missing, changed or damaged, no download possible, or a graph that makes no sense.
    """
    return as_graph(name, digits() if name == "digits" else _read(name, Path(data_root)), split)


def as_graph(name: str, data: Data, split: int | None = None) -> Graph:
    """Check a PyG graph and choose its split.

    Raises:
        UserError: NaN or infinite features, an edge to a missing node, wrong lengths, overlapping or empty node sets.
    """
    n = data.x.shape[0]
    if data.x.dim() != 2 or not data.x.is_floating_point():
        raise UserError(f"{name}: features must be a matrix of floats, got {data.x.dtype} {tuple(data.x.shape)}")
    for part, tensor in (("labels", data.y), ("edges", data.edge_index)):
        if tensor.is_floating_point():
            raise UserError(f"{name}: {part} must be whole numbers, got {tensor.dtype}: columns swapped?")
    if data.edge_index.dim() != 2 or data.edge_index.shape[0] != 2:
        raise UserError(f"{name}: edges must be two rows of node numbers, got {tuple(data.edge_index.shape)}")
    if not torch.isfinite(data.x).all():
        row = int((~torch.isfinite(data.x)).any(dim=1).nonzero()[0])
        raise UserError(f"{name}: the features of node {row} hold NaN or infinity: repair the raw file")
    outside = (data.edge_index < 0) | (data.edge_index >= n)
    if outside.any():
        a, b = data.edge_index[:, int(outside.any(dim=0).nonzero()[0])].tolist()
        raise UserError(f"{name}: the edge {a} - {b} leads to a missing node (there are 0 to {n - 1})")
    if data.y.shape != (n,) or not 0 <= int(data.y.min()) <= int(data.y.max()) < n:
        raise UserError(
            f"{name}: labels must be {n} numbers from 0 to fewer than {n}, got {tuple(data.y.shape)}, "
            f"{data.y.min()} to {data.y.max()}"
        )
    if "train_mask" not in data:
        data.train_mask, data.val_mask, data.test_mask = random_split(data.y)
    masks = [data.train_mask, data.val_mask, data.test_mask]
    masks = [m[:, split or 0] if m.dim() == 2 else m for m in masks]
    if any(m.shape != (n,) for m in masks) or int(sum(m.int() for m in masks).max()) > 1:
        raise UserError(f"{name}: train, validation and test must be disjoint sets of the {n} nodes")
    if empty := [what for mask, what in zip(masks, ("training", "validation", "test"), strict=True) if not mask.any()]:
        raise UserError(f"{name}: there is no {empty[0]} node")
    return Graph(name, data.x, data.y, data.edge_index, *masks)


def random_split(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """20 training nodes per class, 500 validation nodes, the rest test: three (N,) masks, the same in every run."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        train[order[y[order] == label][:TRAIN_PER_CLASS]] = True
    rest = order[~train[order]]
    validation = torch.zeros_like(train)
    validation[rest[:VALIDATION_NODES]] = True
    return train, validation, ~(train | validation)


@cache
def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits as a symmetric 10-nearest-neighbour graph of their 64 pixels."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    pixels, labels = load_digits(return_X_y=True)
    near = kneighbors_graph(pixels, n_neighbors=10)
    edges = np.stack((near + near.T).nonzero())
    return Data(
        x=torch.from_numpy(pixels).float(),
        y=torch.from_numpy(labels).long(),
        edge_index=torch.from_numpy(edges).long(),
    )


def features(graph: Graph, *, missing_rate: float, seed: int, normalize: bool = True) -> Tensor:
    """(N, F) model input: a random percentage of the nodes outside train erased, then rows divided by their sum."""
    outside = (~graph.train).nonzero().squeeze(1)
    order = torch.randperm(len(outside), generator=torch.Generator().manual_seed(seed))
    x = graph.x.clone()
    x[outside[order[: int(len(outside) * missing_rate / 100)]]] = 0
    return x / (x.sum(dim=1, keepdim=True) + 1e-6) if normalize else x


def half_hop(graph: Graph, x: Tensor, *, p: float, alpha: float, seed: int) -> tuple[Graph, Tensor]:
    """Half-Hop (Azabou et al., ICML 2023), PyG's: messages to a random share of the nodes take two steps.

    Each edge s → t to such a node becomes s → u → t and t → u through a slow node u with x_u = α x_s + (1−α) x_t. Slow
    nodes have no label and are in no set. p = 0 leaves the graph as it is. The authors' own transform raises a
    TypeError at its default p = 1, where no edge is kept; PyG's does not. The graph is changed once, before training.

    Args:
        graph: E edges.
        x: (N, F) features.
        p: share of the nodes.
        alpha: the weight of the source.
        seed: of the choice of nodes.

    Returns:
        The graph with its S slow nodes last, and (N + S, F) features.
    """
    n = len(graph.y)
    edges = utils.to_undirected(graph.edge_index, num_nodes=n)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        hopped = transforms.HalfHop(alpha, p)(Data(x=x, edge_index=edges))
    extra = (0, len(hopped.x) - n)
    masks = {name: F.pad(getattr(graph, name), extra) for name in ("train", "validation", "test")}
    changed = replace(
        graph, x=hopped.x, y=F.pad(graph.y, extra, value=-1), edge_index=hopped.edge_index,
        slow=hopped.slow_node_mask, **masks,
    )  # fmt: skip
    return changed, hopped.x


# -- raw files --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/contranorm, else ~/.cache/contranorm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contranorm"


def verify(path: Path, recorded_as: str) -> None:
    """Compare a file with its recorded sha256.

    PubMed has no recorded sums: its pickles are instead scanned, without running them, for anything but arrays.

    Raises:
        UserError: the file is not the recorded one, or not known.
    """
    data = path.read_bytes()
    expected = CHECKSUMS.get(recorded_as)
    if expected is None and "/PubMed/" in recorded_as:
        if not path.name.endswith("test.index"):
            _scan_pickle(data, recorded_as)
    elif expected is None:
        raise UserError(f"{recorded_as}: no sha256 is recorded for this file, so it is not read")
    elif (found := hashlib.sha256(data).hexdigest()) != expected:
        raise UserError(
            f"{recorded_as}: truncated or changed (sha256 {found[:12]}…, recorded {expected[:12]}…, {len(data)} bytes)"
            ": fetch the original again"
        )


_HARMLESS = (
    "copy_reg _reconstructor", "__builtin__ object", "__builtin__ list", "collections defaultdict",
    "scipy.sparse.csr csr_matrix", "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct",
)  # fmt: skip


def _scan_pickle(data: bytes, name: str) -> None:
    """Refuse a pickle that refers to anything but NumPy and SciPy arrays and plain containers."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            refers = opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
            if refers and argument not in _HARMLESS:
                raise UserError(f"{name}: a pickle that refers to {argument!r}, which no graph file does: not read")
    except ValueError as error:
        raise UserError(f"{name}: not a whole pickle ({error}): fetch the original again") from error


def _read(name: str, data_root: Path) -> Data:
    source = SOURCES[name]
    below = f"graphs/{source.root}/{source.raw}"
    places = [data_root / below, cache_folder() / below]
    local = next((p for p in places if p.is_dir()), None)
    if local is None and not source.downloads:
        raise UserError(f"{name}: no folder {places[0]}; set --data_root to a copy (see gnn/README.md for its files)")

    class Checked(source.reader):  # type: ignore[misc]
        """The PyG reader, fed with a checked copy of the raw files."""

        def download(self) -> None:
            if local is None:
                print(f"downloading {name} (not in {places[0]} or {places[1]})")
                super().download()
                return
            for file in map(Path, self.raw_paths):
                try:
                    shutil.copyfile(local / file.name, file)
                except FileNotFoundError as error:
                    raise UserError(f"{local / file.name}: missing: fetch it, or remove the folder") from error

        def process(self) -> None:
            for file in map(Path, self.raw_paths):
                verify(file, f"{below}/{file.name}")
            super().process()

    with tempfile.TemporaryDirectory(prefix="contranorm-") as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # PyG's "Processing..."
                dataset = Checked(str(Path(folder) / source.root), **({"name": source.name} if source.name else {}))
        except UserError:
            raise
        except Exception as error:  # whatever PyG or the network says becomes the one line
            what = "could not be downloaded" if local is None else f"{local} is not readable"
            raise UserError(f"{name}: {what}: {error or type(error).__name__}") from error
        if local is None:
            _keep(Path(dataset.raw_dir), places[1])
        return dataset[0]


def _keep(downloaded: Path, place: Path) -> None:
    """Move downloaded raw files to the cache in one step: another process sees none or all of them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=place.parent))
    shutil.copytree(downloaded, part, dirs_exist_ok=True)
    try:
        part.rename(place)
    except OSError:  # the other process was first, with the same files
        shutil.rmtree(part)
