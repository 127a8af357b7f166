"""ogbn-arxiv from OGB's raw files, PyG's processed file or OGB's archive, checked by counts; stand-ins; GIANT features.

The graph is looked for in `<data_root>/graphs/ogb/ogbn_arxiv`, then in the cache folder, and else downloaded into that
cache. What was parsed from text is cached too, as .npy files. Nothing is written below the data root.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gnn.arxiv.config import GIANT, Config
from gnn.data import SPLIT_SEED, Graph, as_graph, cache_folder, load_graph
from gnn.pyg import Data
from repro.errors import UserError

FOLDER = "graphs/ogb/ogbn_arxiv"
URL = "https://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Counts:
    """What a whole copy of ogbn-arxiv holds."""

    nodes: int = 169_343
    edges: int = 1_166_243
    features: int = 128
    classes: int = 40
    split: tuple[int, int, int] = (90_941, 29_799, 48_603)  # train, validation, test: by year of publication
    giant: int = 768


ARXIV = Counts()


def load(config: Config) -> Graph:
    """The graph that `--data` names, with the features that `--features` names.

    Raises:
        UserError: files missing, damaged, or not those of ogbn-arxiv.
    """
    if config.data == "ogbn-arxiv":
        graph = load_arxiv(Path(config.data_root))
        if config.features == "giant":
            graph.x = load_giant(Path(config.data_root) / GIANT)
        return graph
    graph = load_graph(config.data, config.data_root)
    train, validation, test = random_split(len(graph.y))
    return dataclasses.replace(graph, train=train, validation=validation, test=test)


def random_split(nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three (N,) masks with ogbn-arxiv's shares, 53.7 / 17.6 / 28.7 %, the same in every run.

    The usual 20 training nodes per class would leave the label reuse next to nothing to show.
    """
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(SPLIT_SEED))
    first, second = (round(nodes * sum(ARXIV.split[:k]) / sum(ARXIV.split)) for k in (1, 2))
    return _mask(order[:first], nodes), _mask(order[first:second], nodes), _mask(order[second:], nodes)


def _mask(indices: Tensor, nodes: int) -> Tensor:
    return torch.zeros(nodes, dtype=torch.bool).index_fill_(0, indices, True)


def load_giant(path: Path) -> Tensor:
    """GIANT-XRT's features, (N, 768) float32.

    Raises:
        UserError: no such file, not a plain .npy file, or of another shape.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"--features giant: {path} is missing: fetch it, or use --features raw") from error
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not readable as .npy: {error}") from error
    if array.shape != (ARXIV.nodes, ARXIV.giant):
        raise UserError(f"{path}: must be {(ARXIV.nodes, ARXIV.giant)}, got {array.shape}")
    features = torch.from_numpy(array).float()
    if not torch.isfinite(features).all():
        raise UserError(f"{path}: holds NaN or infinity: fetch the original again")
    return features


def load_arxiv(data_root: Path) -> Graph:
    """ogbn-arxiv with OGB's 128 features and its split by year.

    Raises:
        UserError: files missing, damaged, or with other counts than ogbn-arxiv's.
    """
    kept = cache_folder() / FOLDER
    folder = next((place for place in (data_root / FOLDER, kept) if place.is_dir()), None)
    if folder is None:
        folder = download(kept, data_root / FOLDER)
    processed = folder / "processed" / "geometric_data_processed.pt"
    if (folder / "raw").is_dir() or not processed.is_file():
        edges, x, y = (torch.from_numpy(a) for a in _tables(folder / "raw", ("edge", "node-feat", "node-label")))
        edges = edges.T
    else:
        edges, x, y = _read_processed(processed)
    _expect(x.shape == (ARXIV.nodes, ARXIV.features), f"{ARXIV.nodes} x {ARXIV.features} features", x, folder)
    _expect(edges.shape == (2, ARXIV.edges), f"{ARXIV.edges} edges", edges, folder)
    _expect(y.numel() == ARXIV.nodes, f"{ARXIV.nodes} labels", y, folder)
    if int(y.max()) + 1 != ARXIV.classes:
        raise UserError(
            f"{folder}: must have {ARXIV.classes} classes, has {int(y.max()) + 1}: fetch the original again"
        )
    indices = [torch.from_numpy(a).flatten() for a in _tables(folder / "split" / "time", PARTS)]
    for part, nodes, count in zip(PARTS, indices, ARXIV.split, strict=True):
        _expect(len(nodes.unique()) == len(nodes) == count, f"{count} different nodes in {part}", nodes, folder)
        if not 0 <= int(nodes.min()) <= int(nodes.max()) < ARXIV.nodes:
            raise UserError(f"{folder}: {part} names a missing node: fetch the original again")
    train, validation, test = (_mask(nodes.long(), ARXIV.nodes) for nodes in indices)
    data = Data(x=x.float(), y=y.flatten().long(), edge_index=edges.long())
    data.train_mask, data.val_mask, data.test_mask = train, validation, test
    return as_graph("ogbn-arxiv", data)


def _expect(right: bool, wanted: str, found: Tensor, folder: Path) -> None:
    if not right:
        raise UserError(f"{folder}: must have {wanted}, has {tuple(found.shape)}: fetch the original again")


def _tables(folder: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """The named .csv.gz files as arrays, parsed once: the cache's key is the sha256 of their bytes.

    Raises:
        UserError: a file is missing or not whole.
    """
    digest = hashlib.sha256()
    for name in names:
        path = folder / f"{name}.csv.gz"
        if not path.is_file():
            raise UserError(f"{path}: missing: fetch it, or remove {folder.parent}")
        digest.update(path.read_bytes())
    place = cache_folder() / "parsed" / digest.hexdigest()
    if not place.is_dir():
        arrays = [_parse(folder / f"{name}.csv.gz") for name in names]
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=place.parent))
        for name, array in zip(names, arrays, strict=True):
            np.save(part / f"{name}.npy", array)
        _rename(part, place)
    return [np.load(place / f"{name}.npy", allow_pickle=False) for name in names]


def _parse(path: Path) -> np.ndarray:
    import pandas as pd

    try:
        array: np.ndarray = pd.read_csv(path, header=None).to_numpy()
    except (EOFError, OSError, zlib.error, ValueError) as error:  # ValueError: pandas' own, and not UTF-8
        raise UserError(f"{path}: truncated or damaged ({error}): fetch the original again") from error
    if array.dtype.kind not in "if":
        raise UserError(f"{path}: holds something that is no number: fetch the original again")
    return array


def _read_processed(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Edges (2, E), features and labels of PyG's processed file, which is pickled: nothing but tensors is accepted."""
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    known = torch.serialization.get_safe_globals()  # the context below would forget those of them that PyG has named
    classes = [c for c in (Data, DataEdgeAttr, DataTensorAttr, GlobalStorage) if c not in known]
    try:
        with torch.serialization.safe_globals(classes):
            data, *_ = torch.load(path, weights_only=True)
        return data.edge_index, data.x, data.y
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, AttributeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: not readable as PyG's processed file: {reason}") from error


def download(place: Path, wanted: Path) -> Path:
    """Fetch OGB's archive and keep its folder as `place`.

    Raises:
        UserError: no connection, or not that archive.
    """
    print(f"downloading {URL} (no {wanted})")
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=place.parent))
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer, open(part / "arxiv.zip", "wb") as file:
            shutil.copyfileobj(answer, file)
        with zipfile.ZipFile(part / "arxiv.zip") as archive:
            archive.extractall(part)  # names that lead outside are made to stay inside
        _rename(part / "arxiv", place)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"ogbn-arxiv: no {wanted}, and {URL} could not be fetched: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _rename(part: Path, place: Path) -> None:
    """Move a finished folder into place in one step: another process sees none or all of it."""
    try:
        part.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(part)  # the other process was first, with the same files
