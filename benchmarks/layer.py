"""ContraNorm alone: time, memory and error of every implementation, at the shapes of the experiments.

`python -m benchmarks.layer --json out/layer.json` takes some minutes on two cores; `--only cora,squirrel` picks shapes.
Random features with ReLU stand in for a graph's hidden layer, random edges of the data set's number for its graph.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.approximations import nystrom, random_features
from benchmarks.common import DEVICE, Rows, alternate_ms, goal, names_in, peak_extra_mb, product_gflops, report
from contranorm import contra_norm, kernels
from contranorm.kernels.blocked import blocked_contrast
from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic


@dataclass(frozen=True)
class Shape:
    """One workload: features (N, D) or (B, N, D), and for a graph its number of stored entries."""

    dims: tuple[int, ...]
    edges: int = 0
    directed: bool = False

    @property
    def plain_gib(self) -> float:
        """Size of one float32 similarity matrix."""
        n = self.dims[-2]
        return (self.dims[0] if len(self.dims) == 3 else 1) * n * n * 4 / 2**30

    def operations(self, implementation: str) -> float:
        """Operations of forward and backward: 10 N²D where the matrix is kept or its symmetry is used."""
        *batch, n, d = self.dims
        return (batch[0] if batch else 1) * 10.0 * n * n * d if implementation != "linear" else float("nan")


SHAPES = {
    "cora": Shape((2708, 32), 13264),
    "squirrel": Shape((5201, 32), 222274, directed=True),
    "dblp": Shape((17716, 32), 123450),
    "n20000": Shape((20000, 32), 120000),
    "arxiv": Shape((169343, 32), 2484941),
    "bert": Shape((32, 128, 768)),
    "deit_tiny": Shape((64, 197, 192)),
    "deit_small": Shape((64, 197, 384)),
}
PLAIN_LIMIT_GIB = 1.5
COMPARED = (20000, 32)  # shape at which approximations are compared


@dataclass
class Config:
    """Settings of the benchmark."""

    only: str = ",".join(SHAPES)
    """names of shapes, separated by commas"""
    json: str | None = None
    """file for the result"""
    rounds: int = 7
    """timings of each implementation, taken in turns"""
    tiles: bool = False
    """compare edges of the blocked kernel's tiles instead"""
    chunks: bool = False
    """compare numbers of sequences that the fused kernel takes together instead"""
    approximations: bool = False
    """compare the polynomial with random features and Nyström's method at N = 20,000 instead"""
    crossover: bool = False
    """find from which number of rows on the blocked form is the fastest exact one instead"""
    update: bool = False
    """with --crossover: write what was found to contranorm/kernels/choices.json, which implementation="auto" reads"""
    growth: bool = False
    """time the linear form from N = 20,000 to 200,000 instead"""


def random_graph(n: int, edges: int, directed: bool) -> Tensor:
    """Sparse CSR (N, N) with self-loops and about `edges` stored entries."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, n, (2, (edges - n) if directed else (edges - n) // 2), generator=generator)
    loops = torch.arange(n).repeat(2, 1)
    indices = torch.cat([pairs, loops] if directed else [pairs, pairs.flip(0), loops], dim=1)
    codes = (indices[0] * n + indices[1]).unique()
    ones = torch.ones(codes.numel())
    indices = torch.stack([codes // n, codes % n])
    return torch.sparse_coo_tensor(indices, ones, (n, n), is_coalesced=True, check_invariants=True).to_sparse_csr()


def step(x: Tensor, upstream: Tensor, exclude: Tensor | None, **settings: Any) -> Callable[[], Tensor]:
    """Forward and backward of one layer."""

    def run() -> Tensor:
        y = contra_norm(x, 1.0, identity=True, exclude=exclude, **settings)
        return torch.autograd.grad(y, x, upstream)[0]

    return run


def variants(shape: Shape) -> dict[str, dict[str, Any]]:
    """Implementations that make sense at this shape."""
    chosen: dict[str, dict[str, Any]] = {}
    if shape.plain_gib <= PLAIN_LIMIT_GIB:
        chosen["plain"] = {"implementation": "plain"}
    if shape.dims[-2] <= 40000:
        chosen["blocked"] = {"implementation": "blocked"}
        if len(shape.dims) == 3:
            chosen["fused"] = {"implementation": "fused"}
            chosen["sdpa"] = {"implementation": "sdpa"}
    if len(shape.dims) == 2:
        chosen |= {f"linear-{degree}": {"implementation": "linear", "degree": degree} for degree in (1, 2)}
    return chosen


def measure(name: str, shape: Shape, rate: float, rounds: int) -> Rows:
    """Rows of the table for one shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.dims, generator=generator)
    x = (x.relu() if len(shape.dims) == 2 else x).to(DEVICE).requires_grad_()
    upstream = torch.randn(shape.dims, generator=generator).to(DEVICE)
    exclude = random_graph(shape.dims[0], shape.edges, shape.directed).to(DEVICE) if shape.edges else None
    steps = {label: step(x, upstream, exclude, **settings) for label, settings in variants(shape).items()}
    times = alternate_ms(steps, rounds=rounds if shape.dims[-2] <= 6000 else max(1, rounds // 3))
    exact = next((settings for label, settings in variants(shape).items() if label in ("plain", "blocked")), None)
    rows = []
    with torch.no_grad():
        reference = None if exact is None else contra_norm(x, 1.0, identity=True, exclude=exclude, **exact)
    for label, settings in variants(shape).items():
        row: dict[str, Any] = {"shape": name, "implementation": label, "ms": times[label]}
        for other in ("plain", "blocked"):
            row[f"times {other}"] = times[other] / times[label] if other in times else None
        row["extra MiB"] = peak_extra_mb(steps[label])
        operations = shape.operations(settings["implementation"])
        row["of product rate"] = operations / times[label] / 1e6 / rate if operations == operations else None
        if reference is not None:
            with torch.no_grad():
                y = contra_norm(x, 1.0, identity=True, exclude=exclude, **settings)
            row["output error"] = float((y - reference).norm() / reference.norm())
        rows.append(row)
    return rows


def check_goals(rows: Rows) -> Rows:
    """The goals that the measured shapes allow to check."""
    at = {(row["shape"], row["implementation"]): row for row in rows}

    def reached(shape: str, implementation: str, column: str) -> float:
        value = at.get((shape, implementation), {}).get(column)
        return float("nan") if value is None else float(value)

    memory = [reached("squirrel", implementation, "extra MiB") for implementation in ("blocked", "plain")]
    at_least = [
        ("cora: blocked against plain, times faster", reached("cora", "blocked", "times plain"), 3.5),
        ("squirrel: blocked against plain, times faster", reached("squirrel", "blocked", "times plain"), 5),
    ]
    at_most = [
        ("squirrel: extra memory, share of plain's", memory[0] / memory[1], 0.05),
        ("N = 20,000: blocked's extra memory, MiB", reached("n20000", "blocked", "extra MiB"), 200),
        ("N = 169,343: linear, seconds", reached("arxiv", "linear-2", "ms") / 1e3, 30),
        ("N = 169,343: linear, extra MiB", reached("arxiv", "linear-2", "extra MiB"), 4096),
    ]
    for degree in (1, 2):  # the goal of time was set with degree 2 in mind; degree 1 has its error
        error, faster = (reached("n20000", f"linear-{degree}", column) for column in ("output error", "times blocked"))
        at_most.append((f"N = 20,000: output error of degree {degree}", error, 3e-3))
        at_least.append((f"N = 20,000: linear (degree {degree}) against blocked, times faster", faster, 40))
    goals = [(*g, True) for g in at_least] + [(*g, False) for g in at_most]
    return [goal(name, value, target, at_least=least) for name, value, target, least in goals if not math.isnan(value)]


def compare_tiles() -> Rows:
    """Blocked form at several tile edges."""
    rows = []
    for name in ("cora", "squirrel"):
        shape = SHAPES[name]
        unit = torch.nn.functional.normalize(torch.randn(shape.dims).relu(), dim=1).requires_grad_()
        values = torch.randn(shape.dims)
        exclude = random_graph(shape.dims[0], shape.edges, shape.directed)

        def run(tile: int, unit: Tensor = unit, values: Tensor = values, exclude: Tensor = exclude) -> None:
            contrast = blocked_contrast(unit, values, exclude, tau=1.0, symmetric=False, tile=tile)
            torch.autograd.grad(contrast, unit, values)

        edges = {str(tile): functools.partial(run, tile) for tile in (256, 384, 512, 768, 1024, 1536)}
        rows += [{"shape": name, "tile": int(tile), "ms": ms} for tile, ms in alternate_ms(edges).items()]
    return rows


def compare_chunks() -> Rows:
    """Fused form at several sizes of its chunks."""
    rows = []
    for name in ("bert", "deit_tiny", "deit_small"):
        x = torch.randn(SHAPES[name].dims).requires_grad_()
        run = step(x, torch.randn(x.shape), None, implementation="fused")
        sizes = {}
        for chunk in (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 30):
            sizes[str(chunk)] = mock.patch("contranorm.kernels.fused.CHUNK", chunk)(run)
        rows += [{"shape": name, "chunk": int(c), "ms": ms} for c, ms in alternate_ms(sizes, rounds=9).items()]
    return rows


def compare_approximations(rounds: int) -> Rows:
    """Every way to a contrast term in linear time: forward and backward, and the error against the exact one."""
    x = torch.randn(COMPARED, generator=torch.Generator().manual_seed(0)).relu().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"polynomial of degree {p}": functools.partial(
            contra_norm, scale=1.0, identity=True, implementation="linear", degree=p
        )
        for p in (1, 2)
    }
    for name, way in (("random features", random_features), ("Nyström rows", nystrom)):
        for count in (64, 256, 1024):
            ways[f"{count} {name}"] = lambda x, way=way, count=count: 2 * x - way(x, count)  # type: ignore[misc]

    def gradient(way: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(way(x), x, upstream)[0]

    def exact(x: Tensor) -> Tensor:
        return contra_norm(x, 1.0, identity=True, implementation="blocked")

    y, grad = exact(x).detach(), gradient(exact)
    times = alternate_ms({name: functools.partial(gradient, way) for name, way in ways.items()}, rounds=rounds)
    rows: Rows = []
    for name, way in ways.items():
        error = (way(x).detach() - y).norm()
        rows.append({"approximation": name, "ms": times[name], "output error": float(error / y.norm())})
        rows[-1]["contrast error"] = float(error / (2 * x.detach() - y).norm())
        rows[-1]["gradient error"] = float((gradient(way) - grad).norm() / grad.norm())
    return rows


def find_crossover() -> Rows:
    """The exact forms side by side as N grows, with a graph (plain, blocked) and without (fused, blocked)."""
    rows = []
    for n in (64, 128, 192, 256, 384, 512, 768, 1024, 1536):
        for form, other in (("set", "fused"), ("graph", "plain")):
            x = torch.randn(n, 32).relu().requires_grad_()
            exclude = random_graph(n, 6 * n, False) if form == "graph" else None
            upstream = torch.randn(n, 32)
            steps = {i: step(x, upstream, exclude, implementation=i) for i in (other, "blocked")}
            times = alternate_ms(steps, rounds=25)
            ms = {"other ms": times[other], "blocked ms": times["blocked"]}
            rows.append({"form": form, "N": n, "other": other, **ms, "times other": times[other] / times["blocked"]})
    return rows


def update_choices(rows: Rows) -> None:
    """Write from which N on blocked is faster, at every measured N above too, to contranorm/kernels/choices.json."""
    path = Path(kernels.__file__).with_name("choices.json")
    choices = json.loads(path.read_text(encoding="utf-8"))
    for form in choices["blocked_from"]:
        slower = [row["N"] for row in rows if row["form"] == form and row["times other"] < 1]
        measured = sorted(row["N"] for row in rows if row["form"] == form)
        faster = [n for n in measured if n > max(slower, default=0)]
        choices["blocked_from"][form] = faster[0] if faster else 2 * measured[-1]
    write_atomic(path, (json.dumps(choices, indent=1) + "\n").encode())
    print(f"written: {choices['blocked_from']}")


def measure_growth() -> tuple[Rows, Rows]:
    """Linear form as N grows tenfold."""
    rows = []
    for n in (20000, 50000, 100000, 200000):
        x, upstream = torch.randn(n, 32).relu().requires_grad_(), torch.randn(n, 32)
        graph = random_graph(n, 7 * n, False)
        runs = {f"degree {p} ms": step(x, upstream, graph, implementation="linear", degree=p) for p in (1, 2)}
        rows.append({"N": n} | alternate_ms(runs))
    name = "linear, degree {}: time at N = 200,000 over time at 20,000"
    ratios = {p: rows[-1][f"degree {p} ms"] / rows[0][f"degree {p} ms"] for p in (1, 2)}
    return rows, [goal(name.format(p), ratio, 11, at_least=False) for p, ratio in ratios.items()]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.layer", description=__doc__ or "")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    names = names_in(config.only, SHAPES)
    if config.update and not config.crossover:
        raise UserError("--update belongs to --crossover: it writes what that finds")
    if config.tiles:
        return report("layer-tiles", compare_tiles(), [], config.json)
    if config.chunks:
        return report("layer-chunks", compare_chunks(), [], config.json)
    if config.approximations:
        return report("layer-approximations", compare_approximations(config.rounds), [], config.json)
    if config.crossover:
        rows = find_crossover()
        report("layer-crossover", rows, [], config.json)  # first: it names the commit, which the update makes dirty
        if config.update:
            update_choices(rows)
        return None
    if config.growth:
        return report("layer-growth", *measure_growth(), config.json)
    rate = product_gflops()
    print(f"large float32 products: {rate:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    rows = []
    for name in tqdm(names, desc="shapes"):
        rows += measure(name, SHAPES[name], rate, config.rounds)
    report("layer", rows, check_goals(rows), config.json)


if __name__ == "__main__":
    run_main(main)
