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
    def pairs(self) -> int:
        """Elements of the similarity matrices."""
        return math.prod(self.dims[:-1]) * self.dims[-2]


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
PLAIN_LIMIT = 4e8  # elements of the largest similarity matrix that the plain form is measured with
TILES = (256, 384, 512, 768, 1024, 1536)
CHUNKS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 30)
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
    pattern = torch.sparse_coo_tensor(indices, torch.ones(indices.shape[1]), (n, n), check_invariants=True).coalesce()
    pattern.values().fill_(1.0)
    return pattern.to_sparse_csr()


def inputs(shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Random features, and the graph if the shape has one."""
    x = torch.randn(shape.dims, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if len(shape.dims) == 3:
        return x.requires_grad_(), None
    return x.relu().requires_grad_(), random_graph(shape.dims[0], shape.edges, shape.directed).to(DEVICE)


def step(x: Tensor, upstream: Tensor, exclude: Tensor | None, **settings: Any) -> Callable[[], Tensor]:
    """Forward and backward of one layer."""

    def run() -> Tensor:
        return torch.autograd.grad(contra_norm(x, 1.0, identity=True, exclude=exclude, **settings), x, upstream)[0]

    return run


def variants(shape: Shape) -> dict[str, dict[str, Any]]:
    """Implementations that make sense at this shape."""
    graph = len(shape.dims) == 2
    sensible = {"plain": shape.pairs <= PLAIN_LIMIT, "blocked": shape.dims[-2] <= 40000, "fused": not graph}
    sensible["sdpa"] = not graph
    chosen: dict[str, dict[str, Any]] = {name: {"implementation": name} for name, yes in sensible.items() if yes}
    if graph:
        chosen |= {f"linear-{degree}": {"implementation": "linear", "degree": degree} for degree in (1, 2)}
    return chosen


def measure(name: str, shape: Shape, rate: float, rounds: int) -> Rows:
    """Rows of the table for one shape."""
    x, exclude = inputs(shape)
    upstream = torch.randn(shape.dims, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ways = variants(shape)
    steps = {label: step(x, upstream, exclude, **settings) for label, settings in ways.items()}
    times = alternate_ms(steps, rounds=rounds if shape.dims[-2] <= 6000 else max(1, rounds // 3))
    form = functools.partial(contra_norm, x.detach(), 1.0, identity=True, exclude=exclude)
    exact = ways.get("plain", ways.get("blocked"))
    reference = None if exact is None else form(**exact)
    rows = []
    for label, settings in ways.items():
        row: dict[str, Any] = {"shape": name, "implementation": label, "ms": times[label]}
        for other in ("plain", "blocked"):
            row[f"times {other}"] = times[other] / times[label] if other in times else None
        row["extra MiB"] = peak_extra_mb(steps[label])
        if settings["implementation"] != "linear":  # 10 N²D operations: the matrix kept, or its symmetry used
            row["of product rate"] = 10 * shape.pairs * shape.dims[-1] / times[label] / 1e6 / rate
        if reference is not None:
            row["output error"] = float((form(**settings) - reference).norm() / reference.norm())
        rows.append(row)
    return rows


def check_goals(rows: Rows) -> Rows:
    """The goals that the measured shapes allow to check."""
    at = {(row["shape"], row["implementation"]): row for row in rows}

    def reached(shape: str, implementation: str, column: str) -> float:
        return float(at.get((shape, implementation), {}).get(column) or "nan")

    memory = [reached("squirrel", implementation, "extra MiB") for implementation in ("blocked", "plain")]
    goals = [
        ("cora: blocked against plain, times faster", reached("cora", "blocked", "times plain"), 3.5, True),
        ("squirrel: blocked against plain, times faster", reached("squirrel", "blocked", "times plain"), 5, True),
        ("squirrel: extra memory, share of plain's", memory[0] / memory[1], 0.05, False),
        ("N = 20,000: blocked's extra memory, MiB", reached("n20000", "blocked", "extra MiB"), 200, False),
        ("N = 169,343: linear, seconds", reached("arxiv", "linear-2", "ms") / 1e3, 30, False),
        ("N = 169,343: linear, extra MiB", reached("arxiv", "linear-2", "extra MiB"), 4096, False),
    ]
    for degree in (1, 2):  # the goal of time was set with degree 2 in mind; degree 1 has its error
        error, faster = (reached("n20000", f"linear-{degree}", column) for column in ("output error", "times blocked"))
        goals.append((f"N = 20,000: output error of degree {degree}", error, 3e-3, False))
        goals.append((f"N = 20,000: linear (degree {degree}) against blocked, times faster", faster, 40, True))
    return [goal(name, value, target, at_least=least) for name, value, target, least in goals if not math.isnan(value)]


def compare_sizes(implementation: str, piece: str, shapes: tuple[str, ...], sizes: tuple[int, ...]) -> Rows:
    """A kernel with several sizes of the pieces that it works on, `piece` being its constant's name."""
    rows = []
    for name in shapes:
        x, exclude = inputs(SHAPES[name])
        run = step(x, torch.randn_like(x), exclude, implementation=implementation)
        constant = f"contranorm.kernels.{implementation}.{piece}"
        times = alternate_ms({str(size): mock.patch(constant, size)(run) for size in sizes}, rounds=9)
        rows += [{"shape": name, piece.lower(): int(size), "ms": ms} for size, ms in times.items()]
    return rows


def compare_approximations(rounds: int) -> Rows:
    """Every way to a contrast term in linear time: forward and backward, and the error against the exact one."""
    x = torch.randn(COMPARED, generator=torch.Generator().manual_seed(0)).relu().to(DEVICE).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    form = functools.partial(contra_norm, scale=1.0, identity=True)
    exact = functools.partial(form, implementation="blocked")
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        f"polynomial of degree {p}": functools.partial(form, implementation="linear", degree=p) for p in (1, 2)
    }
    for name, way in (("random features", random_features), ("Nyström rows", nystrom)):
        for count in (64, 256, 1024):
            ways[f"{count} {name}"] = lambda x, way=way, count=count: 2 * x - way(x, count)  # type: ignore[misc]

    def gradient(way: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(way(x), x, upstream)[0]

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
    rows: Rows = []
    for n in (64, 128, 192, 256, 384, 512, 768, 1024, 1536):
        for form, other in (("set", "fused"), ("graph", "plain")):
            x, graph = inputs(Shape((n, 32), 6 * n))
            exclude = graph if form == "graph" else None
            steps = [step(x, torch.randn_like(x), exclude, implementation=i) for i in (other, "blocked")]
            times = alternate_ms({"other ms": steps[0], "blocked ms": steps[1]}, rounds=25)
            faster = times["other ms"] / times["blocked ms"]
            rows.append({"form": form, "N": n, "other": other, **times, "times other": faster})
    return rows


def update_choices(rows: Rows) -> None:
    """Write from which N on blocked is faster, at every measured N above too, to contranorm/kernels/choices.json."""
    path = Path(kernels.__file__).with_name("choices.json")
    choices = json.loads(path.read_text(encoding="utf-8"))
    for form in choices["blocked_from"]:
        times = {row["N"]: row["times other"] for row in rows if row["form"] == form}
        slower = max((n for n, ratio in times.items() if ratio < 1), default=0)
        choices["blocked_from"][form] = min((n for n in times if n > slower), default=2 * slower)
    write_atomic(path, (json.dumps(choices, indent=1) + "\n").encode())
    print(f"written: {choices['blocked_from']}")


def measure_growth() -> tuple[Rows, Rows]:
    """Linear form as N grows tenfold."""
    rows = []
    for n in (20000, 50000, 100000, 200000):
        x, graph = inputs(Shape((n, 32), 7 * n))
        runs = {
            f"degree {p} ms": step(x, torch.randn_like(x), graph, implementation="linear", degree=p) for p in (1, 2)
        }
        rows.append({"N": n} | alternate_ms(runs))
    ratios = {p: rows[-1][f"degree {p} ms"] / rows[0][f"degree {p} ms"] for p in (1, 2)}
    name = "linear, degree {}: time at N = 200,000 over time at 20,000"
    return rows, [goal(name.format(p), ratio, 11, at_least=False) for p, ratio in ratios.items()]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.layer", description=__doc__ or "")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    names = names_in(config.only, SHAPES)
    if config.update and not config.crossover:
        raise UserError("--update belongs to --crossover: it writes what that finds")
    others: dict[str, Callable[[], tuple[Rows, Rows]]] = {
        "tiles": lambda: (compare_sizes("blocked", "TILE", ("cora", "squirrel"), TILES), []),
        "chunks": lambda: (compare_sizes("fused", "CHUNK", ("bert", "deit_tiny", "deit_small"), CHUNKS), []),
        "approximations": lambda: (compare_approximations(config.rounds), []),
        "crossover": lambda: (find_crossover(), []),
        "growth": measure_growth,
    }
    for name, compare in others.items():
        if getattr(config, name):
            rows, goals = compare()
            report(f"layer-{name}", rows, goals, config.json)  # first: the update makes the commit that it names dirty
            if config.update:
                update_choices(rows)
            return
    rate = product_gflops()
    print(f"large float32 products: {rate:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    rows = []
    for name in tqdm(names, desc="shapes"):
        rows += measure(name, SHAPES[name], rate, config.rounds)
    report("layer", rows, check_goals(rows), config.json)


if __name__ == "__main__":
    run_main(main)
