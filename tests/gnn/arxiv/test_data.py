"""ogbn-arxiv from each of its layouts, on a small copy; damaged files; stand-ins."""

from __future__ import annotations

import dataclasses
import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gnn.arxiv import data as arxiv
from gnn.arxiv.config import GIANT, Config
from gnn.arxiv.data import FOLDER, Counts, load, load_arxiv, load_giant, random_split
from gnn.pyg import Data
from repro.errors import UserError

SMALL = Counts(nodes=20, edges=50, features=4, classes=3, split=(10, 4, 6), giant=7)


def small_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    order = generator.permutation(20)
    return {
        "raw/edge": generator.integers(0, 20, (50, 2)),
        "raw/node-feat": generator.normal(size=(20, 4)).round(4),
        "raw/node-label": np.arange(20).reshape(-1, 1) % 3,
        "split/time/train": order[:10].reshape(-1, 1),
        "split/time/valid": order[10:14].reshape(-1, 1),
        "split/time/test": order[14:].reshape(-1, 1),
    }


def write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    for name, array in arrays.items():
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(",".join(str(value) for value in row) for row in array.tolist()) + "\n"
        path.write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arxiv, "ARXIV", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / FOLDER, small_arrays())


def check(graph: arxiv.Graph) -> None:
    arrays = small_arrays()
    torch.testing.assert_close(graph.x, torch.from_numpy(arrays["raw/node-feat"]).float())
    assert graph.edge_index.tolist() == arrays["raw/edge"].T.tolist()
    assert graph.y.tolist() == (np.arange(20) % 3).tolist()
    assert sorted(arrays["split/time/test"].ravel()) == graph.test.nonzero().ravel().tolist()
    assert (int(graph.train.sum()), int(graph.validation.sum())) == (10, 4)


def test_raw_files_are_parsed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.joinpath("data").rglob("*"))
    check(load_arxiv(tmp_path / "data"))
    monkeypatch.setattr(arxiv, "_parse", None)  # not called again
    check(load_arxiv(tmp_path / "data"))
    assert sorted(tmp_path.joinpath("data").rglob("*")) == before  # nothing is written below the data root


def test_the_processed_file(folder: Path, tmp_path: Path) -> None:
    arrays = small_arrays()
    for path in (folder / "raw").iterdir():
        path.unlink()
    (folder / "raw").rmdir()
    data = Data(
        x=torch.from_numpy(arrays["raw/node-feat"]).float(),
        y=torch.from_numpy(arrays["raw/node-label"]),
        edge_index=torch.from_numpy(arrays["raw/edge"].T.copy()),
    )
    (folder / "processed").mkdir()
    path = folder / "processed" / "geometric_data_processed.pt"
    torch.save((data, None), path)
    check(load_arxiv(tmp_path / "data"))

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("this must not run",)

    torch.save((Harmful(), None), path)
    with pytest.raises(UserError, match="not readable as PyG's processed file"):
        load_arxiv(tmp_path / "data")
    path.write_bytes(pickle.dumps((1, 2), protocol=2))
    with pytest.raises(UserError, match="not readable as PyG's processed file"):
        load_arxiv(tmp_path / "data")


def test_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "made" / "arxiv", small_arrays())
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in source.rglob("*.gz"):
            archive.write(path, path.relative_to(source.parent))
    calls = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        calls.append(url)
        return io.BytesIO(content.getvalue())

    monkeypatch.setattr(arxiv.urllib.request, "urlopen", urlopen)
    check(load_arxiv(tmp_path / "data"))
    check(load_arxiv(tmp_path / "data"))  # from the cache
    assert calls == [arxiv.URL] and not (tmp_path / "data").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    content.truncate(100)
    with pytest.raises(UserError, match="could not be fetched"):
        load_arxiv(tmp_path / "data")
    assert not list((tmp_path / "other").rglob(".part-*"))


@pytest.mark.parametrize("name", list(small_arrays()))
def test_missing_and_damaged_files(name: str, folder: Path, tmp_path: Path) -> None:
    path = folder / f"{name}.csv.gz"
    whole = path.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "truncated or damaged"),
        (b"no gzip", "truncated or damaged"),
        (gzip.compress(b"a,b\nc,d\n"), "no number"),
        (gzip.compress(b"1,2,3\n"), "must have"),
        (gzip.compress(b""), "truncated or damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_arxiv(tmp_path / "data")
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match="missing: fetch it"):
        load_arxiv(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("raw/node-label", lambda a: a * 2, "3 classes, has 5"),
        ("raw/edge", lambda a: a + 1, "missing node"),
        ("raw/node-feat", lambda a: np.where(a == a.max(), np.nan, a), "NaN"),
        ("split/time/test", lambda a: a + 100, "missing node"),
        ("split/time/train", lambda a: np.concatenate([a[:9], a[:1]]), "must have 10 different"),
    ],
)
def test_wrong_contents(name: str, change: object, message: str, tmp_path: Path) -> None:
    arrays = small_arrays()
    arrays[name] = change(arrays[name])  # type: ignore[operator]
    write(tmp_path / "data" / FOLDER, arrays)
    with pytest.raises(UserError, match=message):
        load_arxiv(tmp_path / "data")


def test_giant_features(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / GIANT
    settings = {"output_dir": "x", "data_root": str(tmp_path / "data"), "data": "ogbn-arxiv"}
    with pytest.raises(UserError, match="--features giant: .* is missing"):
        load(Config(**settings, features="giant"))
    assert load(Config(**settings)).x.shape == (20, 4)
    path.parent.mkdir(parents=True)
    np.save(path, np.ones((20, 7), dtype=np.float16))
    assert load(Config(**settings)).x.shape == (20, 7) and load(Config(**settings)).x.dtype == torch.float32
    np.save(path, np.ones((20, 6)))
    with pytest.raises(UserError, match=r"must be \(20, 7\), got \(20, 6\)"):
        load_giant(path)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="not readable"):
        load_giant(path)
    np.save(path, np.full((20, 7), np.nan))
    with pytest.raises(UserError, match="NaN"):
        load_giant(path)


def test_shares_of_the_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arxiv, "ARXIV", Counts())
    masks = random_split(10_000)
    assert [int(mask.sum()) for mask in masks] == [5370, 1760, 2870]
    assert bool(sum(mask.int() for mask in masks).eq(1).all())
    assert all(torch.equal(a, b) for a, b in zip(masks, random_split(10_000), strict=True))
    assert sum(Counts().split) == Counts().nodes


@pytest.mark.parametrize(("name", "nodes"), [("cora", 2708), ("dblp", 17_716), ("coauthor_cs", 18_333)])
def test_stand_ins(name: str, nodes: int, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arxiv, "ARXIV", dataclasses.replace(Counts()))
    graph = load(Config(output_dir="x", data=name, data_root=str(data_root)))  # type: ignore[arg-type]
    assert int((graph.train | graph.validation | graph.test).sum()) == nodes
    assert float(graph.train.float().mean()) == pytest.approx(0.537, abs=1e-3)
